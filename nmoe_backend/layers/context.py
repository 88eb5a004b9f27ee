"""What layers are built with: the rank, its operations, the compute dtype, the format of its weights and its end of the
expert exchange."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nmoe_backend.environ import DebugSwitches
from nmoe_backend.layers.debug import NO_CHECKS, with_checks
from nmoe_backend.layers.linear import Linear
from nmoe_backend.layers.ops import Ops, ops_for
from nmoe_backend.layers.quant import WeightFormat, weight_format
from nmoe_backend.layers.weights import Weights
from nmoe_backend.models.spec import ModelSpec, MoESpec
from nmoe_backend.parallel.ranks import RankContext
from nmoe_backend.parallel.rdep import Rdep, RdepShape
from nmoe_backend.types import ConfigError

PASS_ROWS = 512  # rows of an expert pass: 512 rows of DeepSeek-V3's widest intermediate are 16 MB in fp32


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerContext:
    """Made once per rank and model; frozen, and shared by all layers of that model."""

    rank: RankContext
    ops: Ops
    dtype: torch.dtype
    weight_format: WeightFormat
    rdep: Rdep | None  # None: the model has no routed experts

    @classmethod
    def create(
        cls,
        rank: RankContext,
        spec: ModelSpec,
        max_tokens: int,
        dtype: torch.dtype,
        *,
        keep_quantized: bool = False,
        pass_rows: int = PASS_ROWS,
        switches: DebugSwitches = NO_CHECKS,
    ) -> LayerContext:
        """`max_tokens`: what a rank feeds in one step at most (max_batch_size + max_prefill_tokens).
        `keep_quantized`: what `load_rank_weights` was told."""
        if dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(f"got compute dtype {dtype}; float32 and bfloat16 work. Set dtype to one of them.")
        ops = with_checks(ops_for(rank.device), switches)
        routers = [layer.ffn.router for layer in spec.layers if isinstance(layer.ffn, MoESpec)]
        rdep = None
        top_ks = {router.top_k for router in routers}
        if len(top_ks) > 1:
            raise ConfigError(f"got layers with top_k {sorted(top_ks)}; the exchange has slots for one value only.")
        if routers:
            shape = RdepShape(
                max_tokens=max_tokens,
                hidden_size=spec.hidden_size,
                top_k=routers[0].top_k,
                dtype=dtype,
                pass_rows=pass_rows,
            )
            rdep = Rdep(rank, shape, ops.rdep)
        weights = weight_format(spec.quant, keep_quantized)
        return cls(rank=rank, ops=ops, dtype=dtype, weight_format=weights, rdep=rdep)

    def linear(self, weights: Weights, in_size: int, out_size: int) -> Linear:
        """The linear whose tensors lie below a name, in this rank's format."""
        return self.weight_format.linear(self.ops, weights, in_size, out_size)
