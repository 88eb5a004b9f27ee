"""The table for Hopper GPUs: fused kernels on fp8 weights, DeepSeek's head geometry (what fits: table.py).

Every operation launches the same kernels with the same grids whatever the rows hold, reads what differs between steps
from device memory, and waits for nothing: a step of these is captured in a graph as it stands. Steps come padded to a
size that all ranks share; what padding rows compute is never looked at, and they write no cache (cache_idx -1).

fp8 products take activations in blocks of 128 with a scale each; fp32 sums, bf16 out. Between the two products of
absorbed attention, for router and head, values stay bf16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nmoe_backend.kernels.block_fp8 import Fp8Blocks
from nmoe_backend.kernels.block_fp8_gemm_sm90 import block_fp8_gemm
from nmoe_backend.kernels.mla_absorb_sm90 import absorb_queries, expand_values
from nmoe_backend.kernels.mla_sm90.decode import mla_decode
from nmoe_backend.kernels.mla_sm90.decode_plan import MlaDecodePlan, make_mla_decode_plan, plan_mla_decode
from nmoe_backend.kernels.mla_sm90.prefill import mla_prefill
from nmoe_backend.kernels.mla_sm90.prefill_plan import MlaPrefillPlan, make_mla_prefill_plan, plan_mla_prefill
from nmoe_backend.kernels.rms_norm_gpu import rms_norm
from nmoe_backend.kernels.rope_cache_gpu import Rotation, rope_cache
from nmoe_backend.kernels.router_gpu import router, router_logits, split_weight
from nmoe_backend.kernels.swiglu_rows_gpu import swiglu_rows
from nmoe_backend.layers.batch import Batch, PrefillColumns
from nmoe_backend.layers.layer_ops import ExpertWeights, LinearWeight, MLAWeights, StepShape
from nmoe_backend.layers.rows import Form, Rows
from nmoe_backend.models.spec import MLASpec, RouterSpec

GROUP = 128  # neighbours that share a scale
PIECE_KEYS = 8192  # keys that prefill expands at once: 512 MB at 128 heads
# Keys of a piece of a context in decode. Short pieces of many rows would send 268 MB of partial sums a layer through
# memory; few rows leave SMs idle where a context is one piece, but what changes with the rows changes a row's bits.
SPLIT, FEW_ROWS = 4096, 64
SPARE_SMS = 44  # left to dispatch and give_back beside a linear: with fewer they end later, with more the linear does


@dataclass(frozen=True, kw_only=True)
class HopperMLAWeights:
    spec: MLASpec
    kv_norm: Tensor
    w_kv_b: Tensor  # [H, N + V, C]


@dataclass(frozen=True, kw_only=True, slots=True)
class HopperMLAPlan:
    batch: Batch
    turns: Tensor  # [num_positions, R / 2] complex64
    decode: MlaDecodePlan | None
    prefill: MlaPrefillPlan | None


class HopperOps:
    """`LayerOps` of one rank; its scratch serves one stream. Used by that rank's thread only.

    `deterministic`: a row's bits depend on nothing but its own sequence: contexts are cut at the same keys in every
    step. Otherwise the contexts of few rows are shared evenly among the SMs.
    """

    pads_steps = True
    captures = True
    has_sampler = True

    def __init__(self, device: torch.device, num_sms: int, *, deterministic: bool) -> None:
        self._device = device
        self._num_sms = num_sms
        self._deterministic = deterministic
        self._shape: StepShape | None = None
        self._decode_plans: dict[tuple[int, int | None], MlaDecodePlan] = {}  # by heads and split
        self._prefill_plans: dict[int, MlaPrefillPlan] = {}  # by heads

    def allocate(self, shape: StepShape) -> None:
        self._shape = shape

    def norm(self, x: Tensor, weight: Tensor, eps: float, form: Form, residual: Tensor | None = None) -> Rows:
        num_tokens, size = x.shape
        wide = None if form is Form.LINEAR else torch.empty(num_tokens, size, dtype=x.dtype, device=x.device)
        rows = Rows(wide) if form is Form.WIDE else _fp8_rows(num_tokens, size, x.device, wide)
        scales = None if rows.scales is None else rows.scales.t()
        rms_norm(x, weight, eps, residual=residual, out=wide, values=rows.values, scales=scales)
        return rows

    def pack_linear(self, parts: Sequence[LinearWeight]) -> Fp8Blocks:
        blocks = [part for part in parts if isinstance(part, Fp8Blocks)]
        assert len(blocks) == len(parts), "table.py lets only fp8 weights through"
        if len(blocks) == 1:
            return blocks[0]
        ragged = [tuple(part.values.shape) for part in blocks[:-1] if part.values.shape[0] % part.block[0]]
        assert not ragged, f"weights {ragged} end inside a block of rows: they cannot stand above another"
        values = torch.cat([part.values.view(torch.uint8) for part in blocks]).view(torch.float8_e4m3fn)
        return Fp8Blocks(values, torch.cat([part.scales for part in blocks]), blocks[0].block)

    def linear(self, rows: Rows, weight: Fp8Blocks, *, beside_next: bool = False) -> Tensor:
        values, scales = rows.require_fp8()
        out = torch.empty(values.shape[0], weight.values.shape[0], dtype=torch.bfloat16, device=values.device)
        spare_sms = SPARE_SMS if beside_next else 0
        block_fp8_gemm(values, scales, weight.values, weight.scales, out, self._num_sms, spare_sms)
        return out

    def swiglu(self, gate_up: Tensor) -> Rows:
        rows = _fp8_rows(gate_up.shape[0], gate_up.shape[1] // 2, gate_up.device)
        swiglu_rows(gate_up, *rows.require_fp8())
        return rows

    def pack_router(self, weight: Tensor) -> Tensor:
        return split_weight(weight)

    def route(self, rows: Rows, weight: Tensor, bias: Tensor, spec: RouterSpec) -> tuple[Tensor, Tensor]:
        logits = router_logits(rows.require_wide(), weight)
        return router(logits, bias, spec.top_k, spec.num_groups, spec.topk_groups, spec.renormalize, spec.scale)

    def pack_mla(self, weights: MLAWeights) -> HopperMLAWeights:
        return HopperMLAWeights(spec=weights.spec, kv_norm=weights.kv_norm, w_kv_b=weights.w_kv_b)

    def plan_mla(self, batch: Batch, spec: MLASpec, rope_table: Tensor) -> HopperMLAPlan:
        decode = prefill = None
        if batch.num_decode:
            decode = self._decode_plan(batch.num_decode, spec.num_heads)
            plan_mla_decode(decode, batch.context_lens)
        if batch.padded_prefill is not None:
            prefill = self._prefill_plan(batch.padded_prefill, spec.num_heads)
        return HopperMLAPlan(batch=batch, turns=rope_table, decode=decode, prefill=prefill)

    def _decode_plan(self, num_rows: int, num_heads: int) -> MlaDecodePlan:
        shape = self._require_shape()
        few = num_rows <= FEW_ROWS and not self._deterministic
        split = None if few else SPLIT
        rows = min(FEW_ROWS, shape.max_rows) if few else shape.max_rows
        if (num_heads, split) not in self._decode_plans:  # the first step of a kind, which warm-up runs
            self._decode_plans[num_heads, split] = make_mla_decode_plan(
                rows, shape.max_seq_len, min(rows * shape.max_seq_len, shape.max_keys), num_heads, self._device, split
            )
        return self._decode_plans[num_heads, split]

    def _prefill_plan(self, rows: PrefillColumns, num_heads: int) -> MlaPrefillPlan:
        shape = self._require_shape()
        if num_heads not in self._prefill_plans:
            self._prefill_plans[num_heads] = make_mla_prefill_plan(
                shape.max_rows, shape.max_tokens, -(-shape.max_keys // PIECE_KEYS), num_heads, self._device, PIECE_KEYS
            )
        plan = self._prefill_plans[num_heads].part(-(-rows.max_keys // PIECE_KEYS), min(PIECE_KEYS, rows.max_keys))
        plan_mla_prefill(plan, rows.bounds, rows.starts, rows.num_rows)
        return plan

    def mla(self, q: Tensor, kv: Tensor, weights: HopperMLAWeights, plan: HopperMLAPlan, cache: Tensor) -> Rows:
        spec, batch, num_tokens = weights.spec, plan.batch, q.shape[0]
        num_decode, nope, heads = batch.num_decode, spec.qk_nope_head_dim, spec.num_heads
        q = q.view(num_tokens, heads, nope + spec.qk_rope_head_dim)
        latent = torch.empty(
            num_decode, heads, spec.kv_lora_rank + spec.qk_rope_head_dim, dtype=q.dtype, device=q.device
        )
        kv_norm = weights.kv_norm, spec.latent_norm_eps
        decoded, every = slice(num_decode), slice(num_tokens)
        turns = [(decoded, latent[..., spec.kv_lora_rank :])]  # decode queries into the latent query
        if plan.prefill is not None:  # in place, decode's too: only the device knows where prefill begins
            turns.append((every, q[..., nope:]))
        for tokens, target in turns:
            rotation = Rotation(turns=plan.turns, positions=batch.positions[tokens], interleaved=spec.rope.interleaved)
            rope_cache(q[tokens, :, nope:], target, kv[tokens], kv_norm, rotation, cache, batch.cache_idx[tokens])
        attended = torch.empty(num_decode, heads, spec.kv_lora_rank, dtype=q.dtype, device=q.device)
        if plan.decode is not None:
            absorb_queries(q[decoded], weights.w_kv_b, latent)
            mla_decode(latent, cache, batch.block_tables, plan.decode, attended, spec.softmax_scale)
        rows = _fp8_rows(num_tokens, heads * spec.v_head_dim, q.device)
        values, scales = rows.require_fp8()
        expand_values(attended, weights.w_kv_b, values[decoded], scales)
        if plan.prefill is not None and batch.padded_prefill is not None:
            tables = batch.padded_prefill.tables  # over what decode wrote for rows of its own
            out = values.view(num_tokens, heads, spec.v_head_dim)
            mla_prefill(q, cache, tables, weights.w_kv_b, plan.prefill, out, spec.softmax_scale, scales)
        return rows

    def pack_experts(self, weights: ExpertWeights) -> ExpertWeights:
        return weights

    def head(self, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)

    def _require_shape(self) -> StepShape:
        assert self._shape is not None, "allocate() comes before the first step"
        return self._shape


def _fp8_rows(num_tokens: int, size: int, device: torch.device, wide: Tensor | None = None) -> Rows:
    """Room for rows [T, size]; a row of scales begins at a multiple of 64 bytes."""
    values = torch.empty(num_tokens, size, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(size // GROUP, -(-num_tokens // 16) * 16, dtype=torch.float32, device=device)
    return Rows(wide, values, scales[:, :num_tokens])
