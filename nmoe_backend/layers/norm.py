"""RMSNorm with a learned weight."""

from __future__ import annotations

from torch import Tensor

from nmoe_backend.layers.context import LayerContext
from nmoe_backend.layers.weights import Weights


class RMSNorm:
    def __init__(self, context: LayerContext, weights: Weights, size: int, eps: float) -> None:
        self._rms_norm = context.ops.rms_norm
        self._weight = weights.take("weight", size)
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]"""
        return self._rms_norm(x, self._weight, self._eps)
