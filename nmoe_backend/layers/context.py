"""What layers are built with: the rank, its operations, the compute dtype, the format of its weights and its end of the
expert exchange."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nmoe_backend.environ import DebugSwitches
from nmoe_backend.layers.debug import NO_CHECKS
from nmoe_backend.layers.layer_ops import Exchange, LayerOps
from nmoe_backend.layers.linear import Linear
from nmoe_backend.layers.quant import WeightFormat, weight_format
from nmoe_backend.layers.table import TableRequest, build_table
from nmoe_backend.layers.weights import Weights
from nmoe_backend.models.spec import MoESpec
from nmoe_backend.parallel.ranks import RankContext
from nmoe_backend.types import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerContext:
    """Made once per rank and model; frozen, and shared by all layers of that model."""

    rank: RankContext
    ops: LayerOps
    dtype: torch.dtype
    weight_format: WeightFormat
    exchange: Exchange | None  # None: the model has no routed experts
    num_expert_ranks: int  # that the routed experts are split over

    @classmethod
    def create(cls, rank: RankContext, request: TableRequest, switches: DebugSwitches = NO_CHECKS) -> LayerContext:
        """With the table of operations that the request gets on the rank's device. Raises ConfigError."""
        if request.dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(
                f"got compute dtype {request.dtype}; float32 and bfloat16 work. Set dtype to one of them."
            )
        top_ks = {layer.ffn.router.top_k for layer in request.spec.layers if isinstance(layer.ffn, MoESpec)}
        if len(top_ks) > 1:
            raise ConfigError(f"got layers with top_k {sorted(top_ks)}; the exchange has slots for one value only.")
        ops, exchange = build_table(rank, request, switches)
        return cls(
            rank=rank,
            ops=ops,
            dtype=request.dtype,
            weight_format=weight_format(request.spec.quant, request.keep_quantized),
            exchange=exchange,
            num_expert_ranks=request.loopback_ranks or rank.world_size,
        )

    def linear(self, in_size: int, *parts: tuple[Weights, int]) -> Linear:
        """The linear over one or more weights (where its tensors lie, its out size), in this rank's format."""
        return Linear(self.ops, [self.weight_format.linear(weights, in_size, size) for weights, size in parts])

    def num_local_experts(self, num_experts: int) -> int:
        """Routed experts of this rank. Raises ConfigError where the ranks cannot hold equally many."""
        if num_experts % self.num_expert_ranks:
            raise ConfigError(
                f"got {self.num_expert_ranks} ranks for {num_experts} routed experts; every rank holds equally many. "
                "Choose a number of GPUs that divides the number of experts."
            )
        return num_experts // self.num_expert_ranks
