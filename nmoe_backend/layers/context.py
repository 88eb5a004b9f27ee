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
from nmoe_backend.models.spec import ModelSpec, MoESpec
from nmoe_backend.parallel.ranks import RankContext
from nmoe_backend.types import ConfigError

PASS_ROWS = 512  # rows of an expert pass: 512 rows of DeepSeek-V3's widest intermediate are 16 MB in fp32


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
    def create(
        cls,
        rank: RankContext,
        spec: ModelSpec,
        max_tokens: int,
        dtype: torch.dtype,
        *,
        keep_quantized: bool = False,
        loopback_ranks: int = 0,
        pass_rows: int = PASS_ROWS,
        switches: DebugSwitches = NO_CHECKS,
    ) -> LayerContext:
        """`max_tokens`: what a rank feeds in one step at most (max_batch_size + max_prefill_tokens).
        `keep_quantized`: what `load_rank_weights` was told. `loopback_ranks`: ranks that this lone one stands for."""
        if dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(f"got compute dtype {dtype}; float32 and bfloat16 work. Set dtype to one of them.")
        top_ks = {layer.ffn.router.top_k for layer in spec.layers if isinstance(layer.ffn, MoESpec)}
        if len(top_ks) > 1:
            raise ConfigError(f"got layers with top_k {sorted(top_ks)}; the exchange has slots for one value only.")
        request = TableRequest(
            spec=spec,
            max_tokens=max_tokens,
            dtype=dtype,
            keep_quantized=keep_quantized,
            loopback_ranks=loopback_ranks,
            pass_rows=pass_rows,
        )
        ops, exchange = build_table(rank, request, switches)
        weights = weight_format(spec.quant, keep_quantized)
        return cls(
            rank=rank,
            ops=ops,
            dtype=dtype,
            weight_format=weights,
            exchange=exchange,
            num_expert_ranks=loopback_ranks or rank.world_size,
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
