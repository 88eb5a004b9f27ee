"""Feed-forward layers: the dense SwiGLU MLP, and the mixture of experts (router, routed experts over the ranks, shared
expert)."""

from __future__ import annotations

import torch
from torch import Tensor

from nmoe_backend.layers.batch import Batch
from nmoe_backend.layers.context import LayerContext
from nmoe_backend.layers.rows import Form, Rows
from nmoe_backend.layers.weights import Weights
from nmoe_backend.models.spec import DenseSpec, MoESpec, RouterSpec
from nmoe_backend.types import ConfigError


class SwiGLU:
    """w2(silu(w1 x) * w3 x)"""

    def __init__(self, context: LayerContext, weights: Weights, hidden_size: int, intermediate_size: int) -> None:
        self._ops = context.ops
        into = [(weights.below(name), intermediate_size) for name in ("w1", "w3")]
        self._w13 = context.linear(hidden_size, *into)
        self._w2 = context.linear(intermediate_size, (weights.below("w2"), hidden_size))

    def forward(self, rows: Rows) -> Tensor:
        """[T, D] -> [T, D]"""
        return self.down(self.up(rows))

    def up(self, rows: Rows, *, beside_next: bool = False) -> Tensor:
        """[T, D] -> gate and up [T, 2 I]; see SharedExpert."""
        return self._w13.forward(rows, beside_next=beside_next)

    def down(self, gate_up: Tensor, *, beside_next: bool = False) -> Tensor:
        """[T, 2 I] -> [T, D]"""
        return self._w2.forward(self._ops.swiglu(gate_up), beside_next=beside_next)


class Router:
    """Which experts a token visits, and with which weights. Weight and bias are fp32, and so is everything computed."""

    def __init__(self, context: LayerContext, weights: Weights, spec: RouterSpec, hidden_size: int) -> None:
        if spec.score != "sigmoid":
            raise ConfigError(f"got router score {spec.score!r}; 'sigmoid' is supported. Use a model with that router.")
        self._ops = context.ops
        self._spec = spec
        self._weight = self._ops.pack_router(weights.take("weight", spec.num_experts, hidden_size, dtype=torch.float32))
        self._bias = weights.take("bias", spec.num_experts, dtype=torch.float32)

    def forward(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """[T, D] -> expert ids [T, K], weights [T, K] fp32"""
        return self._ops.route(rows, self._weight, self._bias, self._spec)


class MoE:
    """This rank's share: it holds its own routed experts and no other."""

    form = Form.BOTH

    def __init__(self, context: LayerContext, weights: Weights, spec: MoESpec, hidden_size: int) -> None:
        if context.exchange is None:
            raise AssertionError("a model with routed experts needs LayerContext.exchange")
        num_local = context.num_local_experts(spec.router.num_experts)
        self._exchange = context.exchange
        self._router = Router(context, weights.below("gate"), spec.router, hidden_size)
        self._experts = context.ops.pack_experts(
            context.weight_format.experts(weights, num_local, hidden_size, spec.intermediate_size)
        )
        self._shared = None
        if spec.shared_intermediate_size:
            self._shared = SwiGLU(context, weights.below("shared"), hidden_size, spec.shared_intermediate_size)
        no_choice = torch.empty(0, spec.router.top_k, device=context.rank.device)
        self._no_choice = no_choice.to(torch.int64), no_choice

    def forward(self, rows: Rows, batch: Batch) -> Tensor:
        """[T, D] -> [T, D]; routed and shared experts are added in fp32."""
        if batch.num_tokens == 0:  # no work of our own, but peers' tokens may want our experts
            return self._exchange.forward(rows, self._no_choice, self._experts, batch, None)
        return self._exchange.forward(rows, self._router.forward(rows), self._experts, batch, self._shared)


class Dense:
    """The MLP of a layer without routed experts."""

    form = Form.LINEAR

    def __init__(self, context: LayerContext, weights: Weights, spec: DenseSpec, hidden_size: int) -> None:
        self._mlp = SwiGLU(context, weights, hidden_size, spec.intermediate_size)

    def forward(self, rows: Rows, batch: Batch) -> Tensor:
        """[T, D] -> [T, D]"""
        return self._mlp.forward(rows)


def build_ffn(context: LayerContext, weights: Weights, spec: DenseSpec | MoESpec, hidden_size: int) -> Dense | MoE:
    """The feed-forward half of a layer, as its spec says."""
    if isinstance(spec, MoESpec):
        return MoE(context, weights, spec, hidden_size)
    return Dense(context, weights, spec, hidden_size)
