"""SwiGLU and fp8 quantisation in one pass, between the two linears of an MLP.

    h = silu(gate) * up,  values = e4m3(h * (1 / s)),  s = max(max |h|, 1e-4) / 448 over 128 neighbours of a row

gate_up [T, 2 I] bf16, gate first; values [T, I] e4m3; scales [I / 128, >= T] fp32; all with contiguous rows: what the
GEMM reads (block_fp8_gemm_sm90.py). I a multiple of 128. fp32 between load and store, as in the epilogue of
the expert GEMM: h itself is never rounded to bf16. One program for 8 blocks of a row.
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
_GROUPS = 8  # blocks of a program


@triton.jit
def _swiglu_kernel(  # noqa: PLR0913
    x_ptr, values_ptr, scales_ptr, x_stride, values_stride, scales_stride, SIZE: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK: tl.constexpr, INVERSE_MAX: tl.constexpr, MIN_AMAX: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = column < SIZE
    gdc_wait()
    gdc_launch_dependents()
    gate = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + SIZE + column, mask=mask, other=0.0).to(tl.float32)
    h = gate / (1.0 + tl.exp(-gate)) * up
    scale = tl.maximum(tl.max(tl.abs(h), axis=1), MIN_AMAX) * INVERSE_MAX
    values = h * tl.math.div_rn(tl.full((GROUPS,), 1.0, tl.float32), scale)[:, None]
    tl.store(values_ptr + row * values_stride + column, values.to(values_ptr.dtype.element_ty), mask=mask)
    tl.store(scales_ptr + group.to(tl.int64) * scales_stride + row, scale, mask=group * BLOCK < SIZE)


def swiglu_rows(gate_up: Tensor, values: Tensor, scales: Tensor) -> None:
    """gate_up [T, 2 I] -> values [T, I], scales [I / 128, >= T]"""
    num_tokens, size = values.shape
    if gate_up.shape != (num_tokens, 2 * size) or size % BLOCK or values.dtype != torch.float8_e4m3fn:
        raise ValueError(
            f"got gate_up {tuple(gate_up.shape)}, values {tuple(values.shape)} {values.dtype}; need [T, 2 I], [T, I] "
            "e4m3, and I a multiple of 128."
        )
    if scales.shape[0] != size // BLOCK or scales.shape[1] < num_tokens or scales.stride(1) != 1:
        raise ValueError(f"got scales {tuple(scales.shape)}; need contiguous rows [{size // BLOCK}, >= {num_tokens}].")
    if gate_up.stride(1) != 1 or values.stride(1) != 1:
        raise ValueError(f"got strides {gate_up.stride()}, {values.stride()}; need contiguous rows.")
    if num_tokens:
        _swiglu_kernel[(num_tokens, triton.cdiv(size, _GROUPS * BLOCK))](
            gate_up, values, scales, gate_up.stride(0), values.stride(0), scales.stride(0), size, _GROUPS, BLOCK,
            INVERSE_MAX, MIN_AMAX, num_warps=4, launch_pdl=True,
        )  # fmt: skip


def swiglu_rows_reference(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """gate_up [T, 2 I] -> values [T, I] e4m3, scales [I / 128, T] fp32"""
    gate, up = gate_up.float().chunk(2, dim=-1)
    blocks = (torch.nn.functional.silu(gate) * up).unflatten(-1, (-1, BLOCK))
    scales = blocks.abs().amax(-1).clamp(min=MIN_AMAX) * INVERSE_MAX
    values = (blocks * scales.reciprocal().unsqueeze(-1)).flatten(1)
    return values.to(torch.float8_e4m3fn), scales.t().contiguous()
