"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), over a paged cache of latents.

A cached token is C normed latent values and R rotated key values, shared by all heads. A step uses up to three forms:
decode rows run absorbed (attention in the latent space), a prompt's first chunk runs dense (keys and values expanded
from the step's own latents), a later chunk runs over the paged prefix (expanded from gathered latents, its own
included).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nmoe_backend.layers.attention.spec import CacheSpec
from nmoe_backend.layers.batch import Batch
from nmoe_backend.layers.context import LayerContext
from nmoe_backend.layers.norm import RMSNorm
from nmoe_backend.layers.weights import Weights
from nmoe_backend.models.spec import MLASpec


@dataclass(frozen=True, kw_only=True, slots=True)
class MLAPlan:
    batch: Batch
    turns: Tensor  # [T, R / 2] complex64


class MLA:
    def __init__(
        self, context: LayerContext, weights: Weights, spec: MLASpec, hidden_size: int, rope_table: Tensor
    ) -> None:
        self._ops = context.ops
        self._spec = spec
        self._rope_table = rope_table
        heads, qk_dim = spec.num_heads, spec.qk_nope_head_dim + spec.qk_rope_head_dim
        kv_dim = spec.qk_nope_head_dim + spec.v_head_dim
        self._wq_a = context.linear(weights.below("wq_a"), hidden_size, spec.q_lora_rank)
        self._q_norm = RMSNorm(context, weights.below("q_norm"), spec.q_lora_rank, spec.latent_norm_eps)
        self._wq_b = context.linear(weights.below("wq_b"), spec.q_lora_rank, heads * qk_dim)
        self._wkv_a = context.linear(weights.below("wkv_a"), hidden_size, spec.kv_lora_rank + spec.qk_rope_head_dim)
        self._kv_norm = RMSNorm(context, weights.below("kv_norm"), spec.kv_lora_rank, spec.latent_norm_eps)
        # In the compute dtype in every format: the absorbed form needs the values themselves, in every decode step.
        wkv_b = weights.take("wkv_b.weight", heads * kv_dim, spec.kv_lora_rank)
        self._w_kv_b = wkv_b.view(heads, kv_dim, spec.kv_lora_rank)  # per head: W_UK's rows, then W_UV's
        self._wo = context.linear(weights.below("wo"), heads * spec.v_head_dim, hidden_size)

    @staticmethod
    def cache_spec(spec: MLASpec) -> CacheSpec:
        return CacheSpec(width=spec.kv_lora_rank + spec.qk_rope_head_dim)

    @property
    def plan_key(self) -> MLASpec:
        return self._spec

    def plan(self, batch: Batch) -> MLAPlan:
        """Rotations of the step's tokens."""
        return MLAPlan(batch=batch, turns=self._rope_table.index_select(0, batch.positions))

    def forward(self, x: Tensor, plan: MLAPlan, cache: Tensor) -> Tensor:
        """x [T, D], cache [P, B, C + R] -> [T, D]"""
        spec, ops = self._spec, self._ops
        q = self._wq_b.forward(self._q_norm.forward(self._wq_a.forward(x))).view(x.shape[0], spec.num_heads, -1)
        q_nope, q_rope = q.split((spec.qk_nope_head_dim, spec.qk_rope_head_dim), dim=-1)
        q_rope = ops.rope(q_rope, plan.turns, spec.rope.interleaved)
        latent, k_rope = self._wkv_a.forward(x).split((spec.kv_lora_rank, spec.qk_rope_head_dim), dim=-1)
        latent = self._kv_norm.forward(latent)
        k_rope = ops.rope(k_rope.unsqueeze(1), plan.turns, spec.rope.interleaved).squeeze(1)
        ops.kv_write(cache, plan.batch.cache_idx, latent, k_rope)
        parts = self._prefill(q_nope, q_rope, torch.cat((latent, k_rope), dim=-1), plan.batch, cache)
        num_decode = plan.batch.num_decode
        if num_decode:
            decoded = ops.mla_decode(
                q_nope[:num_decode],
                q_rope[:num_decode],
                cache,
                plan.batch.block_tables,
                plan.batch.context_lens,
                self._w_kv_b,
                spec.softmax_scale,
            )
            parts.insert(0, decoded)
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._wo.forward(out.flatten(1))

    def _prefill(self, q_nope: Tensor, q_rope: Tensor, keys: Tensor, batch: Batch, cache: Tensor) -> list[Tensor]:
        """[rows' tokens, H, V] of each prefill row. keys [T, C + R]: this step's, as they were written to the cache."""
        scale, parts = self._spec.softmax_scale, []
        for row in batch.prefill:
            tokens = slice(row.first, row.last)
            q = q_nope[tokens], q_rope[tokens]
            if row.start == 0:
                parts.append(self._ops.mla_prefill(*q, keys[tokens], self._w_kv_b, scale))
            else:
                parts.append(self._ops.mla_prefill_paged(*q, cache, row.pages, row.start, self._w_kv_b, scale))
        return parts
