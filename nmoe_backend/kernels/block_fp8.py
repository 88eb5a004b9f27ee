"""Block-quantised weights: e4m3 values with one fp32 scale for each block of rows x columns; weight = value * scale.

The last block of a row or column may be cut off ("ragged"): a [200, 130] weight in blocks of 128 x 128 has [2, 2]
scales.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dequantize_blocks_reference(values: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """values [..., rows, columns] e4m3, scales [..., ceil(rows / block[0]), ceil(columns / block[1])] fp32 -> dtype.

    Raises ValueError when the scales do not cover the values.
    """
    rows, columns = values.shape[-2:]
    need = (*values.shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
    if tuple(scales.shape) != need:
        raise ValueError(
            f"got scales of shape {tuple(scales.shape)} for values {tuple(values.shape)} in blocks of {block}; "
            f"need {need}. Check that weight and scale are of one tensor."
        )
    wide = scales.repeat_interleave(block[0], dim=-2)[..., :rows, :].repeat_interleave(block[1], dim=-1)[..., :columns]
    return (values.float() * wide).to(dtype)
