"""How a rank keeps the weights of linears and experts, and what builds the layers that multiply by them.

The only place where the name of a quantisation format selects code, once, at load. Embedding, head, norms and router
are in the checkpoint's own wide dtype in every format, and no business of this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from nmoe_backend.layers.experts import BlockFp8Experts, PlainExperts
from nmoe_backend.layers.linear import BlockFp8Linear, Linear, PlainLinear
from nmoe_backend.layers.ops import Ops
from nmoe_backend.layers.weights import Weights
from nmoe_backend.models.spec import QuantSpec
from nmoe_backend.parallel.rdep import Experts
from nmoe_backend.types import ConfigError


class WeightFormat(Protocol):
    """Builds layers from the tensors below a name; raises ConfigError for one that is missing or does not fit."""

    def linear(self, ops: Ops, weights: Weights, in_size: int, out_size: int) -> Linear:
        """From `weight` [out, in] and what the format keeps beside it."""

    def experts(self, ops: Ops, weights: Weights, num_local: int, hidden_size: int, intermediate_size: int) -> Experts:
        """From `w13` [E, 2 I, D], `w2` [E, D, I] and what the format keeps beside them."""


@dataclass(frozen=True, slots=True)
class Plain:
    """Weights in the compute dtype: the checkpoint's own, or dequantised at load."""

    def linear(self, ops: Ops, weights: Weights, in_size: int, out_size: int) -> Linear:
        return PlainLinear(ops, weights, in_size, out_size)

    def experts(self, ops: Ops, weights: Weights, num_local: int, hidden_size: int, intermediate_size: int) -> Experts:
        return PlainExperts(ops, weights, num_local, hidden_size, intermediate_size)


@dataclass(frozen=True, slots=True)
class BlockFp8:
    """e4m3 values with an fp32 scale for each block: 1 byte a weight in memory."""

    block: tuple[int, int]  # (rows, columns)

    def linear(self, ops: Ops, weights: Weights, in_size: int, out_size: int) -> Linear:
        return BlockFp8Linear(ops, weights, in_size, out_size, self.block)

    def experts(self, ops: Ops, weights: Weights, num_local: int, hidden_size: int, intermediate_size: int) -> Experts:
        return BlockFp8Experts(ops, weights, num_local, hidden_size, intermediate_size, self.block)


FORMATS: Mapping[str, Callable[[QuantSpec], WeightFormat]] = MappingProxyType(
    {"fp8_block": lambda quant: BlockFp8(quant.block)}
)


def weight_format(quant: QuantSpec | None, keep_quantized: bool) -> WeightFormat:
    """The format of a rank's tensors, as `load_rank_weights` leaves them with the same `keep_quantized`."""
    if quant is None:
        return Plain()
    if quant.format not in FORMATS:
        raise ConfigError(
            f"got quantisation format {quant.format!r}; {', '.join(sorted(FORMATS))} can be served. "
            "Use a checkpoint in one of these, or in bf16."
        )
    return FORMATS[quant.format](quant) if keep_quantized else Plain()
