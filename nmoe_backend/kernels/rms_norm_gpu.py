"""RMSNorm on a GPU, with the residual addition before it and the fp8 quantisation after it in one pass.

    h = x + residual                          rounded to the compute dtype and written back to `residual`
    y = weight * cast(h * rsqrt(mean(h^2) + eps))
    values, scales = e4m3(y * (1 / s)), s     s = max(max |y|, 1e-4) * (1 / 448) over 128 neighbours of a row

Everything between loads and stores is fp32, rounded to the compute dtype exactly where plain torch rounds: after the
addition, after the normalisation (the weight is multiplied after that cast) and after the weight. Quantisation starts
from the rounded y, so that it equals quantising the plain operation's result. One IEEE division a group: dividing every
value costs 3 us even for one row.

One program a row; a row is read once and stays in registers. D is a multiple of 128 where quantised and at most 16,384.
Layouts: x, residual and outputs have contiguous rows and any row stride; scales [T, D / 128] fp32 have any strides (a
GEMM that wants them column-major gets the transpose of its buffer).
"""

# A jit function has no types that mypy knows; launchers are typed.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

GROUP = 128
INVERSE_MAX = 1.0 / 448.0  # e4m3's largest value
MIN_AMAX = 1e-4


@triton.jit
def _rms_norm_kernel(  # noqa: PLR0913
    x_ptr,
    weight_ptr,
    residual_ptr,
    out_ptr,
    values_ptr,
    scales_ptr,
    x_stride,
    residual_stride,
    out_stride,
    values_stride,
    scales_stride,
    scales_group_stride,
    eps,
    D: tl.constexpr,
    GROUPS: tl.constexpr,  # power of two
    GROUP: tl.constexpr,
    INVERSE_MAX: tl.constexpr,
    MIN_AMAX: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = column < D
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0)
    gdc_wait()
    gdc_launch_dependents()
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0)
    dtype = x.dtype
    x = x.to(tl.float32)
    if residual_ptr is not None:
        residual = residual_ptr + row * residual_stride + column
        summed = (x + tl.load(residual, mask=mask, other=0.0).to(tl.float32)).to(dtype)
        tl.store(residual, summed, mask=mask)
        x = summed.to(tl.float32)
    mean = tl.sum(tl.sum(x * x, axis=1), axis=0) / D
    normed = (x * tl.rsqrt(mean + eps)).to(dtype).to(tl.float32)
    y = (normed * weight.to(tl.float32)).to(dtype)
    if out_ptr is not None:
        tl.store(out_ptr + row * out_stride + column, y, mask=mask)
    if values_ptr is not None:
        y = y.to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(y), axis=1), MIN_AMAX) * INVERSE_MAX
        inverse = tl.math.div_rn(tl.full((GROUPS,), 1.0, tl.float32), scale)
        values = y * inverse[:, None]
        tl.store(values_ptr + row * values_stride + column, values.to(values_ptr.dtype.element_ty), mask=mask)
        scales = scales_ptr + row * scales_stride + group * scales_group_stride
        tl.store(scales, scale, mask=group * GROUP < D)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    values: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    """x [T, D], weight [D]; adds into residual [T, D], and writes what is given of out [T, D], values [T, D] e4m3 with
    scales [T, D / 128] fp32. `out` may be x."""
    num_tokens, dim = x.shape
    if (values is None) != (scales is None) or (values is not None and dim % GROUP):
        raise ValueError(f"got D={dim}, values and scales given: {values is not None}, {scales is not None}; need both "
                         f"or none, and D a multiple of {GROUP}.")  # fmt: skip
    rows = [t for t in (x, residual, out, values) if t is not None]
    if any(t.shape != x.shape or t.stride(1) != 1 for t in rows) or dim > 16384 or weight.shape != (dim,):
        raise ValueError(
            f"got shapes {[tuple(t.shape) for t in rows]}, weight {tuple(weight.shape)}; need [T, D] with contiguous "
            "rows, [D], and D <= 16384."
        )
    if num_tokens == 0:
        return
    groups = triton.next_power_of_2(triton.cdiv(dim, GROUP))
    _rms_norm_kernel[(num_tokens,)](
        x, weight, residual, out, values, scales, *(_row_stride(t) for t in (x, residual, out, values, scales)),
        0 if scales is None else scales.stride(1), eps, dim, groups, GROUP, INVERSE_MAX, MIN_AMAX,
        num_warps=max(1, min(16, groups // 8)), launch_pdl=True,
    )  # fmt: skip


def quantize_rows_reference(y: Tensor) -> tuple[Tensor, Tensor]:
    """y [T, D] -> values [T, D] e4m3, scales [T, D / 128] fp32"""
    groups = y.float().unflatten(-1, (-1, GROUP))
    scales = groups.abs().amax(-1).clamp(min=MIN_AMAX) * INVERSE_MAX
    return (groups * scales.reciprocal().unsqueeze(-1)).flatten(-2).to(torch.float8_e4m3fn), scales


def _row_stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)
