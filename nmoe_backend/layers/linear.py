"""Linear layers without bias, y = x W^T, over one weight or over several that share their input."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nmoe_backend.layers.layer_ops import LayerOps, LinearWeight
from nmoe_backend.layers.rows import Rows


class Linear:
    def __init__(self, ops: LayerOps, parts: Sequence[LinearWeight]) -> None:
        self._ops = ops
        self._weight = ops.pack_linear(parts)

    def forward(self, rows: Rows, *, beside_next: bool = False) -> Tensor:
        """[T, in] -> [T, sum of outs] in the compute dtype; beside_next: see LayerOps.linear."""
        return self._ops.linear(rows, self._weight, beside_next=beside_next)
