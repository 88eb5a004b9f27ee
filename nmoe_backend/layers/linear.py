"""Linear layers and the SwiGLU MLP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from nmoe_backend.layers.context import LayerContext, Weights


class Linear:
    """y = x W^T with a weight [out, in] in the compute dtype."""

    def __init__(self, context: LayerContext, weights: Weights, in_size: int, out_size: int) -> None:
        self._linear = context.ops.linear
        self.weight = weights.take("weight", out_size, in_size)

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]"""
        return self._linear(x, self.weight)


class SwiGLU:
    """w2(silu(w1 x) * w3 x)"""

    def __init__(self, context: LayerContext, weights: Weights, hidden_size: int, intermediate_size: int) -> None:
        self._w1 = Linear(context, weights.below("w1"), hidden_size, intermediate_size)
        self._w2 = Linear(context, weights.below("w2"), intermediate_size, hidden_size)
        self._w3 = Linear(context, weights.below("w3"), hidden_size, intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]"""
        return self._w2.forward(F.silu(self._w1.forward(x)) * self._w3.forward(x))
