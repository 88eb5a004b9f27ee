"""Linear layers without bias, y = x W^T, one class for each way of keeping W [out, in]."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from nmoe_backend.kernels.block_fp8 import Fp8Blocks
from nmoe_backend.layers.ops import Ops
from nmoe_backend.layers.weights import Weights


class Linear(Protocol):
    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out] in x's dtype"""


class PlainLinear:
    """W in the compute dtype."""

    def __init__(self, ops: Ops, weights: Weights, in_size: int, out_size: int) -> None:
        self._linear = ops.linear
        self._weight = weights.take("weight", out_size, in_size)

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]"""
        return self._linear(x, self._weight)


class BlockFp8Linear:
    """W in e4m3, with fp32 scales."""

    def __init__(self, ops: Ops, weights: Weights, in_size: int, out_size: int, block: tuple[int, int]) -> None:
        self._linear = ops.block_fp8_linear
        scale_shape = (-(-out_size // block[0]), -(-in_size // block[1]))
        self._weight = Fp8Blocks(
            weights.take("weight", out_size, in_size, dtype=torch.float8_e4m3fn),
            weights.take("weight_scale_inv", *scale_shape, dtype=torch.float32),
            block,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]"""
        return self._linear(x, self._weight)
