"""Token embedding and language-model head, replicated on every rank."""

from __future__ import annotations

from torch import Tensor

from nmoe_backend.layers.context import LayerContext
from nmoe_backend.layers.weights import Weights


class Embedding:
    def __init__(self, weights: Weights, vocab_size: int, hidden_size: int) -> None:
        self.weight = weights.take("weight", vocab_size, hidden_size)

    def forward(self, token_ids: Tensor) -> Tensor:
        """[T] int64 -> [T, D]"""
        return self.weight.index_select(0, token_ids)


class Head:
    """The product is in the compute dtype, the logits are fp32: sampling never works in less."""

    def __init__(self, context: LayerContext, weight: Tensor) -> None:
        self._ops = context.ops
        self._weight = weight

    def forward(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, V] fp32, in `out` where it is given"""
        return self._ops.head(hidden, self._weight, out)
