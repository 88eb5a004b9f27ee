"""What layers are built with: the rank, its operations, the compute dtype and its end of the expert exchange."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nmoe_backend.environ import DebugSwitches
from nmoe_backend.layers.debug import NO_CHECKS, with_checks
from nmoe_backend.layers.ops import Ops, ops_for
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
    rdep: Rdep | None  # None: the model has no routed experts

    @classmethod
    def create(
        cls,
        rank: RankContext,
        spec: ModelSpec,
        max_tokens: int,
        dtype: torch.dtype,
        pass_rows: int = PASS_ROWS,
        switches: DebugSwitches = NO_CHECKS,
    ) -> LayerContext:
        """`max_tokens`: what a rank feeds in one step at most (max_batch_size + max_prefill_tokens)."""
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
        return cls(rank=rank, ops=ops, dtype=dtype, rdep=rdep)


class Weights:
    """A view of one rank's weights below a name prefix; checks what it hands out."""

    def __init__(
        self, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype, prefix: str = ""
    ) -> None:
        self._tensors = tensors
        self._device = device
        self._dtype = dtype
        self._prefix = prefix

    def below(self, name: str) -> Weights:
        """The tensors whose names start with `<prefix><name>.`"""
        return Weights(self._tensors, self._device, self._dtype, f"{self._prefix}{name}.")

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor of that name. Raises ConfigError unless it has this shape, the rank's device and the compute dtype
        (or `dtype`)."""
        full = self._prefix + name
        tensor = self._tensors.get(full)
        need = (shape, dtype or self._dtype, self._device)
        got = None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.device)
        if tensor is None or got != need:
            raise ConfigError(
                f"weight {full}: got {'nothing' if got is None else got}, need {need}. "
                "Check that config.json belongs to this checkpoint."
            )
        return tensor
