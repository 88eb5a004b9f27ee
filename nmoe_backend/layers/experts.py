"""A rank's own routed experts, one class for each way of keeping them. Both are `parallel.rdep.Experts`.

`w13` holds each expert's gate rows and then its up rows, as the checkpoint does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nmoe_backend.kernels.block_fp8 import Fp8Blocks
from nmoe_backend.layers.ops import Ops
from nmoe_backend.layers.weights import Weights


class PlainExperts:
    """w13 [E, 2 I, D] and w2 [E, D, I] in the compute dtype; E is this rank's number of experts."""

    def __init__(self, ops: Ops, weights: Weights, num_local: int, hidden_size: int, intermediate_size: int) -> None:
        self.num_local = num_local
        self._experts = ops.experts
        self._w13 = weights.take("w13", num_local, 2 * intermediate_size, hidden_size)
        self._w2 = weights.take("w2", num_local, hidden_size, intermediate_size)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [X, D], ids [X, K] local, weights [X, K] fp32 -> [X, D] fp32"""
        return self._experts(x, ids, weights, self._w13, self._w2)


class BlockFp8Experts:
    """w13 [E, 2, I, D] and w2 [E, D, I] in e4m3, with fp32 scales; E is this rank's number of experts.

    Gate and up are apart: each has ceil(I / block) rows of scales, which are those of one [2 I, D] matrix only where
    the block divides I.
    """

    def __init__(
        self,
        ops: Ops,
        weights: Weights,
        num_local: int,
        hidden_size: int,
        intermediate_size: int,
        block: tuple[int, int],
    ) -> None:
        self.num_local = num_local
        self._experts = ops.block_fp8_experts
        d, i = hidden_size, intermediate_size
        up, down = ((-(-rows // block[0]), -(-columns // block[1])) for rows, columns in ((i, d), (d, i)))
        fp8, fp32 = torch.float8_e4m3fn, torch.float32
        self._w13 = Fp8Blocks(
            weights.take("w13", num_local, 2 * i, d, dtype=fp8).view(num_local, 2, i, d),
            weights.take("w13_scale", num_local, 2 * up[0], up[1], dtype=fp32).view(num_local, 2, *up),
            block,
        )
        self._w2 = Fp8Blocks(
            weights.take("w2", num_local, d, i, dtype=fp8),
            weights.take("w2_scale", num_local, *down, dtype=fp32),
            block,
        )

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [X, D], ids [X, K] local, weights [X, K] fp32 -> [X, D] fp32"""
        return self._experts(x, ids, weights, self._w13, self._w2)
