"""Attention kinds. A spec's type picks its class; everything else (cache, plan, forward) follows from the class."""

from __future__ import annotations

from nmoe_backend.layers.attention.mla import MLA
from nmoe_backend.layers.attention.spec import Attention, CacheSpec
from nmoe_backend.layers.context import LayerContext
from nmoe_backend.layers.rope import rope_table
from nmoe_backend.layers.weights import Weights
from nmoe_backend.models.spec import MLASpec, ModelSpec

__all__ = ["Attention", "CacheSpec", "build_attention", "cache_specs"]


def build_attention(context: LayerContext, weights: Weights, spec: ModelSpec) -> list[Attention]:
    """The attention of every layer; layers with the same rope share one table."""
    tables = {
        rope: rope_table(rope, spec.max_position, context.rank.device)
        for rope in {layer.attn.rope for layer in spec.layers}
    }
    return [
        _kind(layer.attn)(
            context, weights.below(f"layers.{i}.attn"), layer.attn, spec.hidden_size, tables[layer.attn.rope]
        )
        for i, layer in enumerate(spec.layers)
    ]


def cache_specs(spec: ModelSpec) -> tuple[CacheSpec, ...]:
    """What each layer keeps per token; known before anything is loaded."""
    return tuple(_kind(layer.attn).cache_spec(layer.attn) for layer in spec.layers)


def _kind(spec: MLASpec) -> type[MLA]:
    return {MLASpec: MLA}[type(spec)]
