"""Block-quantised weights: e4m3 values with one fp32 scale for each block of rows x columns; weight = value * scale.

The last block of a row or column may be cut off ("ragged"): a [200, 130] weight in blocks of 128 x 128 has [2, 2]
scales. The product value * scale is rounded to fp32 and then to the compute dtype, at load and in an operation alike:
an operation on kept values gives bit for bit what the plain one gives on weights that were dequantised before.

`linear` and `experts` are those of linear.py and experts.py, with the weights dequantised for the one call: one weight,
or one expert, at a time exists in the compute dtype, so the extra memory does not grow with the number of experts.

Activations come in blocks of 128 of a row: what the kernels' epilogues write is `quantize_rows_reference`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Fp8Blocks:
    """A weight as it is stored; the shapes are those of `dequantize_blocks_reference`."""

    values: Tensor
    scales: Tensor
    block: tuple[int, int]


def dequantize_blocks_reference(values: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """values [..., rows, columns] e4m3, scales [..., ceil(rows / block[0]), ceil(columns / block[1])] fp32 -> dtype.

    In memory at most 4 bytes a value beside the result. Raises ValueError when the scales do not cover the values.
    """
    rows, columns = values.shape[-2:]
    need = (*values.shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
    if tuple(scales.shape) != need:
        raise ValueError(
            f"got scales of shape {tuple(scales.shape)} for values {tuple(values.shape)} in blocks of {block}; "
            f"need {need}. Check that weight and scale are of one tensor."
        )
    by_column = scales.repeat_interleave(block[1], dim=-1)[..., :columns]  # [..., row blocks, columns]
    result = values.to(torch.float32, copy=True)
    num_whole = rows // block[0]
    whole, ragged = result.split((num_whole * block[0], rows - num_whole * block[0]), dim=-2)
    whole.unflatten(-2, (num_whole, block[0])).mul_(by_column[..., :num_whole, None, :])
    ragged.mul_(by_column[..., num_whole:, :])
    return result.to(dtype)


def block_fp8_linear_reference(x: Tensor, weight: Fp8Blocks) -> Tensor:
    """[T, in], [out, in] -> [T, out] in x's dtype."""
    return F.linear(x, dequantize_blocks_reference(weight.values, weight.scales, weight.block, x.dtype))


def block_fp8_experts_reference(x: Tensor, ids: Tensor, weights: Tensor, w13: Fp8Blocks, w2: Fp8Blocks) -> Tensor:
    """x [X, D], ids [X, K] int32 (-1 = none), weights [X, K] fp32, w13 [E, 2, I, D], w2 [E, D, I] -> [X, D] fp32.

    Gate and up rows of w13 are two matrices, each with scales of its own: no block spans both, whatever I is.
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(w13.values.shape[0]):
        rows, choices = (ids == expert).nonzero(as_tuple=True)
        if rows.shape[0] == 0:
            continue
        up_projection = dequantize_blocks_reference(w13.values[expert], w13.scales[expert], w13.block, x.dtype)
        gate, up = F.linear(x.index_select(0, rows), up_projection.flatten(0, 1)).chunk(2, dim=-1)
        down_projection = dequantize_blocks_reference(w2.values[expert], w2.scales[expert], w2.block, x.dtype)
        y = F.linear(F.silu(gate) * up, down_projection)
        out.index_add_(0, rows, y.float() * weights[rows, choices, None])
    return out


def quantize_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] -> values [T, K] e4m3 = x * (1 / s), scales [ceil(K / 128), T] fp32 = s = max(max |x|, 1e-4) / 448."""
    num_tokens, k = x.shape
    blocks = F.pad(x.float(), (0, -k % 128)).view(num_tokens, -1, 128)
    scales = blocks.abs().amax(-1).clamp(min=1e-4) * (1.0 / 448.0)
    values = (blocks * scales.reciprocal().unsqueeze(-1)).flatten(1)[:, :k]
    return values.to(torch.float8_e4m3fn), scales.t().contiguous()
