"""The plain-torch table: every device, dtype, weight format and dims. What each operation computes stands at its
reference in kernels/."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nmoe_backend.kernels.block_fp8 import Fp8Blocks
from nmoe_backend.layers.batch import Batch
from nmoe_backend.layers.layer_ops import ExpertWeights, LinearWeight, MLAWeights, SharedExpert, StepShape
from nmoe_backend.layers.ops import Ops
from nmoe_backend.layers.rows import Form, Rows
from nmoe_backend.models.spec import MLASpec, RouterSpec
from nmoe_backend.parallel.rdep import Rdep


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainMLAPlan:
    batch: Batch
    turns: Tensor  # [T, R / 2] complex64


class PlainExperts:
    """`parallel.rdep.Experts` over either way of keeping the weights."""

    def __init__(self, ops: Ops, weights: ExpertWeights) -> None:
        self.weights = weights
        self._ops = ops

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [X, D], ids [X, K] local, weights [X, K] fp32 -> [X, D] fp32"""
        w13, w2 = self.weights.w13, self.weights.w2
        if isinstance(w13, Fp8Blocks) and isinstance(w2, Fp8Blocks):
            return self._ops.block_fp8_experts(x, ids, weights, w13, w2)
        assert isinstance(w13, Tensor) and isinstance(w2, Tensor), "both stacks are kept in one format"
        return self._ops.experts(x, ids, weights, w13, w2)


class PlainOps:
    """Steps of any size; keeps no buffers."""

    pads_steps = False
    captures = False
    has_sampler = False

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    def allocate(self, shape: StepShape) -> None:
        """Nothing is kept between operations."""

    def norm(self, x: Tensor, weight: Tensor, eps: float, form: Form, residual: Tensor | None = None) -> Rows:
        if residual is not None:
            x = residual.add_(x)
        return Rows(self._ops.rms_norm(x, weight, eps))

    def pack_linear(self, parts: Sequence[LinearWeight]) -> tuple[LinearWeight, ...]:
        return tuple(parts)

    def linear(self, rows: Rows, weight: tuple[LinearWeight, ...], *, beside_next: bool = False) -> Tensor:
        outs = [self._linear(rows.require_wide(), part) for part in weight]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)

    def _linear(self, x: Tensor, weight: LinearWeight) -> Tensor:
        if isinstance(weight, Fp8Blocks):
            return self._ops.block_fp8_linear(x, weight)
        return self._ops.linear(x, weight)

    def swiglu(self, gate_up: Tensor) -> Rows:
        gate, up = gate_up.chunk(2, dim=-1)
        return Rows(F.silu(gate) * up)

    def pack_router(self, weight: Tensor) -> Tensor:
        return weight

    def route(self, rows: Rows, weight: Tensor, bias: Tensor, spec: RouterSpec) -> tuple[Tensor, Tensor]:
        logits = self._ops.linear(rows.require_wide().float(), weight)
        return self._ops.router(
            logits, bias, spec.top_k, spec.num_groups, spec.topk_groups, spec.renormalize, spec.scale
        )

    def pack_mla(self, weights: MLAWeights) -> MLAWeights:
        return weights

    def plan_mla(self, batch: Batch, spec: MLASpec, rope_table: Tensor) -> PlainMLAPlan:
        return PlainMLAPlan(batch=batch, turns=rope_table.index_select(0, batch.positions))

    def mla(self, q: Tensor, kv: Tensor, weights: MLAWeights, plan: PlainMLAPlan, cache: Tensor) -> Rows:
        spec, ops, batch = weights.spec, self._ops, plan.batch
        q_nope, q_rope = q.unflatten(-1, (spec.num_heads, -1)).split(
            (spec.qk_nope_head_dim, spec.qk_rope_head_dim), dim=-1
        )
        q_rope = ops.rope(q_rope, plan.turns, spec.rope.interleaved)
        latent, k_rope = kv.split((spec.kv_lora_rank, spec.qk_rope_head_dim), dim=-1)
        latent = ops.rms_norm(latent, weights.kv_norm, spec.latent_norm_eps)
        k_rope = ops.rope(k_rope.unsqueeze(1), plan.turns, spec.rope.interleaved).squeeze(1)
        ops.kv_write(cache, batch.cache_idx, latent, k_rope)
        parts = self._prefill(q_nope, q_rope, torch.cat((latent, k_rope), dim=-1), weights, batch, cache)
        if batch.num_decode:
            rows = slice(batch.num_decode)
            tables, lens = batch.block_tables, batch.context_lens
            parts.insert(
                0,
                ops.mla_decode(q_nope[rows], q_rope[rows], cache, tables, lens, weights.w_kv_b, spec.softmax_scale),
            )
        return Rows((parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1))

    def _prefill(
        self, q_nope: Tensor, q_rope: Tensor, keys: Tensor, weights: MLAWeights, batch: Batch, cache: Tensor
    ) -> list[Tensor]:
        """[rows' tokens, H, V] of each prefill row. keys [T, C + R]: this step's, as they were written to the cache.
        A prompt's first chunk runs over the step's own latents, a later one over the paged prefix."""
        scale, w_kv_b, parts = weights.spec.softmax_scale, weights.w_kv_b, []
        for row in batch.prefill:
            tokens = slice(row.first, row.last)
            q = q_nope[tokens], q_rope[tokens]
            if row.start == 0:
                parts.append(self._ops.mla_prefill(*q, keys[tokens], w_kv_b, scale))
            else:
                parts.append(self._ops.mla_prefill_paged(*q, cache, row.pages, row.start, w_kv_b, scale))
        return parts

    def pack_experts(self, weights: ExpertWeights) -> PlainExperts:
        return PlainExperts(self._ops, weights)

    def head(self, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        logits = self._ops.linear(x, weight)
        return logits.float() if out is None else out.copy_(logits)


class PlainExchange:
    """RDEP in plain torch, with a rendezvous on the host."""

    error_word = None

    def __init__(self, rdep: Rdep) -> None:
        self.rdep = rdep

    @property
    def expert_rows(self) -> Tensor:
        return self.rdep.expert_rows

    def forward(
        self,
        rows: Rows,
        choice: tuple[Tensor, Tensor],
        experts: PlainExperts,
        batch: Batch,
        shared: SharedExpert | None,
    ) -> Tensor:
        x = rows.require_wide()
        out = self.rdep.forward(x, *choice, experts, batch.step_tokens)
        if shared is not None:
            out += shared.down(shared.up(rows))
        return out.to(x.dtype)
