"""Feed-forward layers: the dense SwiGLU MLP, and the mixture of experts (router, routed experts over the ranks, shared
expert)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nmoe_backend.layers.batch import Batch
from nmoe_backend.layers.context import LayerContext
from nmoe_backend.layers.weights import Weights
from nmoe_backend.models.spec import DenseSpec, MoESpec, RouterSpec
from nmoe_backend.types import ConfigError


class SwiGLU:
    """w2(silu(w1 x) * w3 x)"""

    def __init__(self, context: LayerContext, weights: Weights, hidden_size: int, intermediate_size: int) -> None:
        self._w1 = context.linear(weights.below("w1"), hidden_size, intermediate_size)
        self._w2 = context.linear(weights.below("w2"), intermediate_size, hidden_size)
        self._w3 = context.linear(weights.below("w3"), hidden_size, intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]"""
        return self._w2.forward(F.silu(self._w1.forward(x)) * self._w3.forward(x))


class Router:
    """Which experts a token visits, and with which weights. Weight and bias are fp32, and so is everything computed."""

    def __init__(self, context: LayerContext, weights: Weights, spec: RouterSpec, hidden_size: int) -> None:
        if spec.score != "sigmoid":
            raise ConfigError(f"got router score {spec.score!r}; 'sigmoid' is supported. Use a model with that router.")
        self._ops = context.ops
        self._spec = spec
        self._weight = weights.take("weight", spec.num_experts, hidden_size, dtype=torch.float32)
        self._bias = weights.take("bias", spec.num_experts, dtype=torch.float32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[T, D] -> expert ids [T, K] int64, weights [T, K] fp32"""
        spec = self._spec
        logits = self._ops.linear(x.float(), self._weight)
        return self._ops.router(
            logits, self._bias, spec.top_k, spec.num_groups, spec.topk_groups, spec.renormalize, spec.scale
        )


class MoE:
    """This rank's share: it holds its own routed experts and no other."""

    def __init__(self, context: LayerContext, weights: Weights, spec: MoESpec, hidden_size: int) -> None:
        if context.rdep is None:
            raise AssertionError("a model with routed experts needs LayerContext.rdep")
        world_size = context.rank.world_size
        if spec.router.num_experts % world_size:
            raise ConfigError(
                f"got {world_size} ranks for {spec.router.num_experts} routed experts; every rank holds equally many. "
                "Choose a number of GPUs that divides the number of experts."
            )
        num_local = spec.router.num_experts // world_size
        self._rdep = context.rdep
        self._router = Router(context, weights.below("gate"), spec.router, hidden_size)
        self._experts = context.weight_format.experts(
            context.ops, weights, num_local, hidden_size, spec.intermediate_size
        )
        self._shared = None
        if spec.shared_intermediate_size:
            self._shared = SwiGLU(context, weights.below("shared"), hidden_size, spec.shared_intermediate_size)
        self._no_ids = torch.empty(0, spec.router.top_k, dtype=torch.int64, device=context.rank.device)
        self._no_weights = torch.empty(0, spec.router.top_k, device=context.rank.device)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """[T, D] -> [T, D]; routed and shared experts are added in fp32."""
        if batch.num_tokens == 0:  # no work of our own, but peers' tokens may want our experts
            self._rdep.forward(x, self._no_ids, self._no_weights, self._experts, batch.step_tokens)
            return x
        ids, weights = self._router.forward(x)
        out = self._rdep.forward(x, ids, weights, self._experts, batch.step_tokens)
        if self._shared is not None:
            out += self._shared.forward(x)
        return out.to(x.dtype)


class Dense:
    """The MLP of a layer without routed experts."""

    def __init__(self, context: LayerContext, weights: Weights, spec: DenseSpec, hidden_size: int) -> None:
        self._mlp = SwiGLU(context, weights, hidden_size, spec.intermediate_size)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """[T, D] -> [T, D]"""
        return self._mlp.forward(x) if batch.num_tokens else x


def build_ffn(context: LayerContext, weights: Weights, spec: DenseSpec | MoESpec, hidden_size: int) -> Dense | MoE:
    """The feed-forward half of a layer, as its spec says."""
    if isinstance(spec, MoESpec):
        return MoE(context, weights, spec, hidden_size)
    return Dense(context, weights, spec, hidden_size)
