"""A decoder assembled from a ModelSpec. Knows no family: what differs between models is in the spec.

Owns one rank's layers. Holds no state between steps; the KV cache is the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from nmoe_backend.layers.attention import Attention, build_attention
from nmoe_backend.layers.batch import Batch
from nmoe_backend.layers.context import LayerContext
from nmoe_backend.layers.embedding import Embedding, Head
from nmoe_backend.layers.moe import Dense, MoE, build_ffn
from nmoe_backend.layers.norm import RMSNorm
from nmoe_backend.layers.rows import Form, Rows
from nmoe_backend.layers.weights import Weights
from nmoe_backend.models.spec import ModelSpec


class DecoderLayer:
    """residual += attention(norm(residual)), then residual += ffn(norm(residual)).

    The second addition is left to the next norm, which does it in its own pass: a layer takes and returns the residual
    stream (changed in place) and what is still to be added to it.
    """

    def __init__(self, attn_norm: RMSNorm, attn: Attention, ffn_norm: RMSNorm, ffn: Dense | MoE) -> None:
        self.attn = attn
        self._attn_norm = attn_norm
        self._ffn_norm = ffn_norm
        self._ffn = ffn

    def forward(self, residual: Tensor, delta: Tensor | None, batch: Batch, plan: Any, cache: Tensor) -> Tensor:
        """[T, D], [T, D] -> [T, D]. Without tokens only the exchange with the peers is left."""
        if batch.num_tokens == 0:
            return self._ffn.forward(Rows(residual), batch) if isinstance(self._ffn, MoE) else residual
        delta = self.attn.forward(normed_sum(self._attn_norm, residual, delta), plan, cache)
        return self._ffn.forward(self._ffn_norm.forward(delta, residual), batch)


def normed_sum(norm: RMSNorm, residual: Tensor, delta: Tensor | None) -> Rows:
    """The norm of residual + delta, which becomes the residual; nothing is added before the first layer."""
    return norm.forward(residual) if delta is None else norm.forward(delta, residual)


class DecoderModel:
    """`weights`: one rank's tensors under their nmoe-sharded names, on its device, in the compute dtype (router
    fp32) or in the context's weight format.

    Raises ConfigError for a weight that is missing or does not fit the spec.
    """

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Tensor], context: LayerContext) -> None:
        self.spec = spec
        self.ops = context.ops
        self.exchange = context.exchange
        named = Weights(weights, context.rank.device, context.dtype)
        self._embed = Embedding(named.below("embed"), spec.vocab_size, spec.hidden_size)
        attention = build_attention(context, named, spec)
        self._layers = []
        for i, (layer, attn) in enumerate(zip(spec.layers, attention, strict=True)):
            below = named.below(f"layers.{i}")
            size, eps = spec.hidden_size, spec.norm_eps
            attn_norm = RMSNorm(context, below.below("attn_norm"), size, eps, Form.LINEAR)
            ffn = build_ffn(context, below.below("ffn"), layer.ffn, size)
            ffn_norm = RMSNorm(context, below.below("ffn_norm"), size, eps, ffn.form)
            self._layers.append(DecoderLayer(attn_norm, attn, ffn_norm, ffn))
        self._norm = RMSNorm(context, named.below("norm"), spec.hidden_size, spec.norm_eps, Form.WIDE)
        tied = spec.tie_word_embeddings
        head = self._embed.weight if tied else named.take("lm_head.weight", spec.vocab_size, spec.hidden_size)
        self._head = Head(context, head)

    def forward(self, batch: Batch, caches: Sequence[Tensor]) -> Tensor:
        """caches: one [P, B, width] a layer, written in place -> [T, D] hidden states after the final norm.

        Every rank of the group calls it once a step, with its own batch, which may be empty.
        """
        residual, delta = self._embed.forward(batch.token_ids), None
        plans: dict[object, Any] = {}
        for layer, cache in zip(self._layers, caches, strict=True):
            key = layer.attn.plan_key
            if key not in plans and batch.num_tokens:
                plans[key] = layer.attn.plan(batch)
            delta = layer.forward(residual, delta, batch, plans.get(key), cache)
        return normed_sum(self._norm, residual, delta).require_wide()

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, V] fp32, in `out` where it is given"""
        return self._head.forward(hidden, out)
