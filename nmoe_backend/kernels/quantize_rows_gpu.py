"""Activations in blocks of 128: values = e4m3(x * (1 / s)), s = max(max |x|, 1e-4) / 448 over 128 neighbours of a row.

x [T, K] bf16 or fp32, values [T, K] e4m3, both with contiguous rows; scales [ceil(K / 128), >= T] fp32, one block of K
a row: what the GEMM reads (block_fp8_gemm_sm90.py). A ragged last block counts what is there. fp32 inside; one IEEE
division a block, the same rule as the norm's quantisation (rms_norm_gpu.py). One program for 16 blocks of a row.
"""

# A jit function has no types that mypy knows; launchers are typed.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

BLOCK = 128
INVERSE_MAX = 1.0 / 448.0  # e4m3's largest value
MIN_AMAX = 1e-4


@triton.jit
def _quantize_kernel(  # noqa: PLR0913
    x_ptr, values_ptr, scales_ptr, x_stride, values_stride, scales_stride, K: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK: tl.constexpr, INVERSE_MAX: tl.constexpr, MIN_AMAX: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    gdc_wait()
    gdc_launch_dependents()
    x = tl.load(x_ptr + row * x_stride + column, mask=column < K, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=1), MIN_AMAX) * INVERSE_MAX
    values = x * tl.math.div_rn(tl.full((GROUPS,), 1.0, tl.float32), scale)[:, None]
    tl.store(values_ptr + row * values_stride + column, values.to(values_ptr.dtype.element_ty), mask=column < K)
    tl.store(scales_ptr + group.to(tl.int64) * scales_stride + row, scale, mask=group * BLOCK < K)


def quantize_rows(x: Tensor, values: Tensor, scales: Tensor) -> None:
    """x [T, K] -> values [T, K] e4m3 = x / s, scales [ceil(K / 128), >= T] fp32 = s = max(max |x|, 1e-4) / 448 over 128
    neighbours. One program for 16 groups of a row."""
    num_tokens, k = x.shape
    num_groups = -(-k // BLOCK)
    if values.shape != x.shape or scales.shape[0] != num_groups or scales.shape[1] < num_tokens:
        raise ValueError(
            f"got x {tuple(x.shape)}, values {tuple(values.shape)}, scales {tuple(scales.shape)}; need [T, K], [T, K], "
            "[ceil(K / 128), >= T]."
        )
    if x.stride(1) != 1 or values.stride(1) != 1 or scales.stride(1) != 1:
        raise ValueError(f"got strides {x.stride()}, {values.stride()}, {scales.stride()}; need contiguous rows.")
    if num_tokens:
        _quantize_kernel[(num_tokens, -(-num_groups // 16))](
            x, values, scales, x.stride(0), values.stride(0), scales.stride(0), k, 16, BLOCK, INVERSE_MAX, MIN_AMAX,
            num_warps=4, launch_pdl=True,
        )  # fmt: skip


def quantize_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] -> values [T, K] e4m3, scales [ceil(K / 128), T] fp32"""
    num_tokens, k = x.shape
    blocks = torch.nn.functional.pad(x.float(), (0, -k % BLOCK)).view(num_tokens, -1, BLOCK)
    scales = blocks.abs().amax(-1).clamp(min=MIN_AMAX) * INVERSE_MAX
    values = (blocks * scales.reciprocal().unsqueeze(-1)).flatten(1)[:, :k]
    return values.to(torch.float8_e4m3fn), scales.t().contiguous()
