"""The best other libraries' kernels for DeepSeek's operations, called on the same inputs as ours.

For benchmarks only and never a part of the product: the folder that holds them is an option of bench_kernels.py. It has
a module `peers` whose load_* functions import FlashMLA, DeepGEMM and FlashInfer. A method returns name -> a call that
does the operation again and gives its output; what a library wants prepared (plans, layouts) is done before and not
timed. Without a folder there are no peers.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Calls = dict[str, Callable[[], Tensor]]
PAGE = 64
LATENT, ROPE = 512, 64
_WORKSPACE_BYTES = 256 << 20


class Peers:
    """Libraries are imported when the first operation asks for them."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None and not (folder / "peers.py").exists():
            raise SystemExit(f"{folder} has no peers.py. --peers names the unpacked folder of the peers' kernels.")

    @cached_property
    def _loader(self) -> Any:
        sys.path.insert(0, str(self._folder))
        return importlib.import_module("peers")

    @cached_property
    def _deep_gemm(self) -> tuple[Any, Callable[[Tensor], Tensor]]:
        library = self._loader.load_deep_gemm("vllm")
        layout = importlib.import_module("deep_gemm.utils.layout")
        return library, layout.get_mn_major_tma_aligned_tensor

    @cached_property
    def _flashinfer(self) -> Any:
        return self._loader.load_flashinfer()

    def mla_decode(self, q: Tensor, cache: Tensor, tables: Tensor, lens: Tensor, scale: float) -> Calls:
        """q [S, H, 576], cache [P, 64, 576], tables [S, n], lens [S] int32; all contexts fill their tables' pages."""
        if self._folder is None:
            return {}
        flashmla, flashinfer = self._loader.load_flashmla(), self._flashinfer
        rows, heads, _ = q.shape
        schedule = flashmla.FlashMLASchedMeta()
        paged = cache.unsqueeze(2)

        def by_flashmla() -> Tensor:
            out = flashmla.flash_mla_with_kvcache(
                q.unsqueeze(1), paged, tables, lens, LATENT, schedule, softmax_scale=scale, causal=True
            )
            return out[0].squeeze(1)

        wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(
            torch.empty(_WORKSPACE_BYTES, dtype=torch.int8, device=q.device), backend="fa3"
        )
        bounds = torch.arange(rows + 1, dtype=torch.int32, device=q.device)
        pages = tables.shape[1]
        bf16 = torch.bfloat16
        wrapper.plan(
            bounds, bounds * pages, tables.flatten(), lens, heads, LATENT, ROPE, PAGE, True, scale, bf16, bf16
        )  # fmt: skip
        parts = [part.contiguous() for whole in (q, cache) for part in whole.split((LATENT, ROPE), dim=-1)]
        return {"FlashMLA": by_flashmla, "FlashInfer fa3": lambda: wrapper.run(*parts, return_lse=False)}

    def gemm(self, x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor) -> Calls:
        """x [T, K] e4m3, x_scales [T, K / 128], w [N, K], w_scales [N / 128, K / 128] -> [T, N] bf16"""
        if self._folder is None:
            return {}
        library, aligned = self._deep_gemm
        out = torch.empty(x.shape[0], w.shape[0], dtype=torch.bfloat16, device=x.device)
        scales = aligned(x_scales)

        def by_deep_gemm() -> Tensor:
            library.fp8_gemm_nt((x, scales), (w, w_scales), out)
            return out

        return {"DeepGEMM": by_deep_gemm}

    def grouped(self, counts: Tensor, w: Tensor, w_scales: Tensor, rows_expected: int) -> Calls:
        """counts [E] rows of each expert, w [E, N, K] e4m3, w_scales [E, N / 128, K / 128]; rows lie ready, sorted by
        expert: up to 128 a mean expert in DeepGEMM's masked form, beyond in its contiguous one."""
        if self._folder is None:
            return {}
        library, aligned = self._deep_gemm
        num_experts, n, k = w.shape
        device, fp8 = w.device, torch.float8_e4m3fn

        def random_rows(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=torch.bfloat16).to(fp8)

        if rows_expected <= 128:
            room = -(-int(counts.max()) // 64) * 64
            x = random_rows(num_experts, room, k), aligned(torch.rand(num_experts, room, k // 128, device=device))
            out = torch.empty(num_experts, room, n, dtype=torch.bfloat16, device=device)
            masked_counts = counts.to(torch.int32)

            def masked() -> Tensor:
                library.m_grouped_fp8_gemm_nt_masked(x, (w, w_scales), out, masked_counts, rows_expected)
                return out

            return {"DeepGEMM masked": masked}
        sizes = -(-counts // 128) * 128
        total = int(sizes.sum())
        x = random_rows(total, k), aligned(torch.rand(total, k // 128, device=device))
        out = torch.empty(total, n, dtype=torch.bfloat16, device=device)
        owners = torch.arange(num_experts, dtype=torch.int32, device=device).repeat_interleave(sizes)

        def contiguous() -> Tensor:
            library.m_grouped_fp8_gemm_nt_contiguous(x, (w, w_scales), out, owners)
            return out

        return {"DeepGEMM contiguous": contiguous}

    def mla_prefill(self, q: Tensor, k: Tensor, v: Tensor, length: int, scale: float) -> Calls:
        """q, k [rows * length, H, 192], v [rows * length, H, 128]: causal, rows of equal length back to back."""
        if self._folder is None:
            return {}
        tokens, heads, dim = q.shape
        wrapper = self._flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
            torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=q.device), "NHD", backend="fa3"
        )
        bounds = torch.arange(tokens // length + 1, dtype=torch.int32, device=q.device) * length
        wrapper.plan(
            bounds, bounds, heads, heads, dim, head_dim_vo=v.shape[-1], causal=True, sm_scale=scale,
            q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
        )  # fmt: skip
        split = [part.unflatten(0, (-1, length)).transpose(1, 2).contiguous() for part in (q, k, v)]

        def by_cudnn() -> Tensor:
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
                out = torch.nn.functional.scaled_dot_product_attention(*split, is_causal=True, scale=scale)
            return out.transpose(1, 2).flatten(0, 1)

        return {"FlashInfer fa3": lambda: wrapper.run(q, k, v), "cuDNN": by_cudnn}
