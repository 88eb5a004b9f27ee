"""Multi-head latent attention over many new tokens of several sequences, over paged latents, on Hopper GPUs (sm_90a).

A row is a chunk of one sequence: `length` new tokens at positions start, start + 1, ..., whose latents (the chunk's own
too) stand in the paged cache. With keys and values expanded from the latents c of the cache (mla_prefill.py says how),
    out[t, h] = sum_s softmax_s(scale * (q_nope[t, h] . k_nope[s, h] + q_rope[t, h] . k_rope[s])) * v[s, h],  s <= t.

Shapes: q [T, H, 192] bf16 (128 nope, then 64 turned), H a multiple of 4; cache [P, B, 576] bf16; block_tables [S, n]
int32; w_kv_b [H, 256, 512] bf16; out [T, H, 128] e4m3 with scales [H, >= T] fp32, or bf16; all contiguous, 16-byte
aligned (TMA). Rows of the step: tokens [cu_seqlens[s], cu_seqlens[s + 1]); tokens outside of every row are neither used
nor written.

Bounded memory. The keys of all rows, prefix and chunk, each row padded with zeros to whole blocks of 128, make one
list, which is worked off in pieces of `piece_keys`: gather the piece's latents, expand them by a matrix product,
attend. How many rows, blocks and items there are is on the device: a plan of more pieces than a step needs computes
nothing more, it only launches three kernels a piece that find nothing to do.

A tile is a row's queries at positions [128 k, 128 k + 128); it needs the row's key blocks 0 ... k, the last
under the causal mask. An item is a tile in a piece where it has keys; one whose keys lie in several pieces keeps its
running maximum, sum and unnormalised output in fp32 between them. prefill_plan.py makes the lists of them.

Numerics: bf16 products, fp32 scores, softmax (base 2) and accumulators; probabilities are rounded to bf16 before the
second product. Results are rounded to bf16 and quantised from that, a head's 128 values being a block of the
quantisation: s = max(max |v|, 1e-4) / 448, value = e4m3(v * (1 / s)). Blocks of keys and tiles of 128 queries are cut
at absolute positions, and what is kept between pieces is not rounded. The product that expands adds up 64 latents at a
time in one order, whatever the key's place. So a token's result depends neither on the other rows, nor on where chunks
and pieces end.

Grid: one program an SM. Work (a tile of 128 queries, one head) is handed out by a counter, longest first inside a group
of 4 heads, whose keys stay in L2: which program takes it changes no result. Two warpgroups take 64 queries each; a
third feeds the TMA queue. Shared memory: queries 48 KB, two stages of keys 96 KB and of values 64 KB. While a
warpgroup does the softmax of a block, its product of the block before and the other warpgroup's run.
"""

# A jit function has no types that mypy knows; launchers are typed.
# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: PLR0913
from __future__ import annotations

import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nmoe_backend.kernels.mla_sm90.prefill_keys import expand_keys, gather_keys
from nmoe_backend.kernels.mla_sm90.prefill_plan import (
    BLOCK,
    EXPANDED_DIM,
    HEAD_GROUP,
    LATENT_DIM,
    ROPE_DIM,
    VALUE_DIM,
    MlaPrefillPlan,
)

QUERY_DIM = 192
NOPE_DIM = 128

_BLOCK = gl.constexpr(128)
_STAGES = gl.constexpr(2)
_HEAD_GROUP = gl.constexpr(HEAD_GROUP)
_SHARED = gl.NVMMASharedLayout(128, 16, rank=2)
# To store a [64, 128] tile with 16 bytes a thread, where the accumulator's layout has 2 neighbours: bits of the place
# in a thread, of the lane, of the warp.
_WARPS = [[16, 0], [32, 0]]
_WIDE_BF16 = gl.constexpr(gl.DistributedLinearLayout(
    [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], _WARPS, [], [64, 128]
))  # fmt: skip
_WIDE_FP8 = gl.constexpr(gl.DistributedLinearLayout(
    [[0, 1], [0, 2], [0, 4], [0, 8], [4, 0], [8, 0]], [[0, 16], [0, 32], [0, 64], [1, 0], [2, 0]], _WARPS, [], [64, 128]
))  # fmt: skip


def mla_prefill(
    q: Tensor, cache: Tensor, block_tables: Tensor, w_kv_b: Tensor, plan: MlaPrefillPlan, out: Tensor, scale: float,
    out_scales: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes the rows' tokens of out [T, H, 128] e4m3 and out_scales [H, >= T] fp32; without these, of out in bf16. The
    plan is that of this step (`plan_mla_prefill`).

    Under a graph: 3 launches a piece, no allocation, work for the keys that there are. Table entries beyond a row's own
    pages are not read; keys of the cache beyond a row's end are not used, NaN included.
    """
    _check(q, cache, block_tables, w_kv_b, plan, out, out_scales)
    for piece in range(plan.num_pieces):
        gather_keys(plan, cache, block_tables, piece)
        expand_keys(plan, w_kv_b, piece)
        attend(q, plan, piece, out, scale, out_scales)


def attend(
    q: Tensor, plan: MlaPrefillPlan, piece: int, out: Tensor, scale: float, out_scales: Tensor | None = None
) -> None:
    """One piece of `mla_prefill`, whose keys are expanded and whose counter is 0."""
    queries, expanded = q.flatten(1), plan.expanded.flatten(1)
    _attend_kernel[(plan.num_programs,)](
        TensorDescriptor.from_tensor(queries, [BLOCK // 2, NOPE_DIM], _SHARED),
        TensorDescriptor.from_tensor(queries, [BLOCK // 2, ROPE_DIM], _SHARED),
        TensorDescriptor.from_tensor(expanded, [BLOCK, VALUE_DIM], _SHARED),
        TensorDescriptor.from_tensor(plan.keys, [BLOCK, ROPE_DIM], _SHARED),
        plan.items[piece],
        plan.num_items[piece:],
        plan.counters[piece:],
        plan.sums,
        plan.maxima,
        out,
        out_scales,
        0 if out_scales is None else out_scales.stride(0),
        scale * math.log2(math.e),
        H=q.shape[1],
        num_warps=4,
    )


def _check(
    q: Tensor, cache: Tensor, block_tables: Tensor, w_kv_b: Tensor, plan: MlaPrefillPlan, out: Tensor,
    out_scales: Tensor | None,
) -> None:  # fmt: skip
    num_tokens, num_heads, dim = q.shape
    width = LATENT_DIM + ROPE_DIM
    if dim != QUERY_DIM or cache.shape[2] != width or w_kv_b.shape != (num_heads, EXPANDED_DIM, LATENT_DIM):
        raise ValueError(
            f"got q {tuple(q.shape)}, cache {tuple(cache.shape)}, w_kv_b {tuple(w_kv_b.shape)}; need "
            f"[T, H, {QUERY_DIM}], [P, B, {width}], [H, {EXPANDED_DIM}, {LATENT_DIM}]."
        )
    if out.shape != (num_tokens, num_heads, VALUE_DIM) or plan.expanded.shape[1] != num_heads:
        raise ValueError(
            f"got out {tuple(out.shape)} and a plan of {plan.expanded.shape[1]} heads for q {tuple(q.shape)}; need "
            f"[T, H, {VALUE_DIM}] and a plan of as many heads."
        )
    if plan.num_pieces > 1 and plan.sums.shape[0] < num_tokens:
        raise ValueError(f"got {num_tokens} tokens; this plan carries sums of {plan.sums.shape[0]}. Make it larger.")
    if any(t.dtype != torch.bfloat16 for t in (q, cache, w_kv_b)) or block_tables.dtype != torch.int32:
        dtypes = [t.dtype for t in (q, cache, w_kv_b, block_tables)]
        raise ValueError(f"got q, cache, w_kv_b, block_tables of {dtypes}; need bfloat16 three times, then int32.")
    if not all(t.is_contiguous() for t in (q, cache, w_kv_b, out)) or block_tables.stride(1) != 1:
        raise ValueError("got a strided q, cache, w_kv_b, out or block table; need contiguous ones.")
    if out.dtype != (torch.bfloat16 if out_scales is None else torch.float8_e4m3fn):
        raise ValueError(
            f"got out {out.dtype}, scales: {out_scales is not None}; need e4m3 with scales or bfloat16 without."
        )
    if out_scales is not None and (
        out_scales.shape[0] != num_heads or out_scales.shape[1] < num_tokens or out_scales.stride(1) != 1
    ):
        raise ValueError(
            f"got out_scales {tuple(out_scales.shape)}; need contiguous rows [{num_heads}, >= {num_tokens}]."
        )


@gluon.jit
def _unit(items_ptr, num_items, unit):
    """Entry of the item, and head: item after item for 4 heads, then the next 4."""
    group = num_items * _HEAD_GROUP
    return items_ptr + (unit % group) // _HEAD_GROUP * 8, (unit // group) * _HEAD_GROUP + unit % _HEAD_GROUP


@gluon.jit
def _publish(unit, units, unit_full, unit_empty, turn):
    mbarrier.wait(unit_empty.index(turn % 2), ((turn // 2) & 1) ^ 1)
    units.index(turn % 2).store(gl.full([1], unit, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    gl.thread_barrier()
    mbarrier.arrive(unit_full.index(turn % 2), count=1)


@gluon.jit
def _next_unit(units, unit_full, unit_empty, turn):
    mbarrier.wait(unit_full.index(turn % 2), (turn // 2) & 1)
    unit = gl.max(units.index(turn % 2).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
    gl.thread_barrier()
    mbarrier.arrive(unit_empty.index(turn % 2), count=1)
    return unit


@gluon.jit
def _load_partition(
    q_desc, q_rope_desc, kv_desc, rope_desc, q_nope, q_rope, k_nope, k_rope, v, units, q_full, q_empty, k_full, k_empty,
    v_full, v_empty, unit_full, unit_empty, items_ptr, num_items_ptr, counter_ptr, H: gl.constexpr
):  # fmt: skip
    """Draws units of work from the counter, tells them to the others, and loads what they need."""
    num_items = gl.load(num_items_ptr)
    num_units = num_items * H
    turn = 0  # units so far
    step = 0  # blocks so far
    unit = gl.atomic_add(counter_ptr, 1, sem="relaxed")
    while unit < num_units:
        _publish(unit, units, unit_full, unit_empty, turn)
        entry, head = _unit(items_ptr, num_items, unit)
        row = gl.load(entry)  # may be negative, or past the end: TMA fills with zeros
        key_row = gl.load(entry + 3)
        num_blocks = gl.load(entry + 4)
        for j in range(num_blocks):
            stage = step % _STAGES
            phase = ((step // _STAGES) & 1) ^ 1
            key = key_row + j * _BLOCK
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), _BLOCK * 192 * 2)
            tma.async_copy_global_to_shared(kv_desc, [key, head * 256], k_full.index(stage), k_nope.index(stage))
            tma.async_copy_global_to_shared(rope_desc, [key, 512], k_full.index(stage), k_rope.index(stage))
            if j == 0:  # the first keys need not wait until the last unit is done with its queries
                mbarrier.wait(q_empty, (turn & 1) ^ 1)
                mbarrier.expect(q_full, 128 * 192 * 2)
                for i in gl.static_range(2):
                    tma.async_copy_global_to_shared(q_desc, [row + i * 64, head * 192], q_full, q_nope.index(i))
                    tma.async_copy_global_to_shared(
                        q_rope_desc, [row + i * 64, head * 192 + 128], q_full, q_rope.index(i)
                    )
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), _BLOCK * 128 * 2)
            tma.async_copy_global_to_shared(kv_desc, [key, head * 256 + 128], v_full.index(stage), v.index(stage))
            step += 1
        turn += 1
        unit = gl.atomic_add(counter_ptr, 1, sem="relaxed")
    _publish(unit, units, unit_full, unit_empty, turn)


@gluon.jit
def _scores(q_nope, q_rope, k_nope, k_rope, zero):
    token = warpgroup_mma(q_rope, k_rope.permute((1, 0)), zero, use_acc=False, is_async=True)
    return warpgroup_mma(q_nope, k_nope.permute((1, 0)), token, is_async=True)


@gluon.jit
def _softmax(s, m, total, scale_log2, is_diagonal, first_row, layout: gl.constexpr):
    """Probabilities of a block as the next product's operand; new maximum, sum, and the factor of what was before."""
    if is_diagonal:
        rows = gl.arange(0, 64, gl.SliceLayout(1, layout)) + first_row
        columns = gl.arange(0, _BLOCK, gl.SliceLayout(0, layout))
        s = gl.where(columns[None, :] <= rows[:, None], s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, 1))
    alpha = gl.exp2((m - m_new) * scale_log2)
    p = gl.exp2(gl.fma(s, scale_log2, (-m_new * scale_log2)[:, None]))
    total = total * alpha + gl.sum(p, 1)
    return gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, layout, 2)), m_new, total, alpha


@gluon.jit
def _store_rows(out_ptr, x, row, low, high, head, first_row, H: gl.constexpr, layout: gl.constexpr):
    rows = gl.arange(0, 64, gl.SliceLayout(1, layout)) + first_row
    columns = gl.arange(0, 128, gl.SliceLayout(0, layout))
    target = out_ptr + ((row + rows).to(gl.int64) * H + head)[:, None] * 128 + columns[None, :]
    used = (rows >= low) & (rows < high)
    gl.store(target, gl.convert_layout(x, layout), mask=used[:, None])


@gluon.jit
def _store_out(
    out_ptr, scales_ptr, scales_stride, acc, row, low, high, head, first_row, H: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """acc [64, 128], of `layout`: rounded to bf16, and quantised from that where there are scales."""
    rounded = acc.to(gl.bfloat16)
    if scales_ptr is None:
        _store_rows(out_ptr, rounded, row, low, high, head, first_row, H, _WIDE_BF16)
    else:
        x = rounded.to(gl.float32)
        scale = gl.maximum(gl.max(gl.abs(x), 1), 1e-4) * (1.0 / 448.0)
        rows = gl.arange(0, 64, gl.SliceLayout(1, layout)) + first_row
        used = (rows >= low) & (rows < high)
        gl.store(scales_ptr + head.to(gl.int64) * scales_stride + row + rows, scale, mask=used)
        x = x * gl.div_rn(gl.full([64], 1.0, gl.float32, gl.SliceLayout(1, layout)), scale)[:, None]
        _store_rows(out_ptr, x.to(gl.float8e4nv), row, low, high, head, first_row, H, _WIDE_FP8)


@gluon.jit
def _attend_partition(
    q_nope, q_rope, k_nope, k_rope, v, units, q_full, q_empty, k_full, k_empty, v_full, v_empty, unit_full, unit_empty,
    items_ptr, num_items_ptr, sums_ptr, maxima_ptr, out_ptr, scales_ptr, scales_stride, scale_log2, H: gl.constexpr,
    SIDE: gl.constexpr
):  # fmt: skip
    """Queries [64 SIDE, 64 SIDE + 64) of each tile."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    rows_layout: gl.constexpr = gl.SliceLayout(1, layout)
    FIRST: gl.constexpr = SIDE * 64
    num_items = gl.load(num_items_ptr)
    num_units = num_items * H
    zero = gl.zeros([64, _BLOCK], gl.float32, layout)
    rows = gl.arange(0, 64, rows_layout) + FIRST
    columns = gl.arange(0, 128, gl.SliceLayout(0, layout))
    turn = 0
    step = 0
    unit = _next_unit(units, unit_full, unit_empty, turn)
    while unit < num_units:
        entry, head = _unit(items_ptr, num_items, unit)
        row = gl.load(entry)
        low = gl.load(entry + 1)
        high = gl.load(entry + 2)
        num_blocks = gl.load(entry + 4)
        is_first = gl.load(entry + 5)
        is_last = gl.load(entry + 6)
        used = (rows >= low) & (rows < high)
        token = (row + rows).to(gl.int64) * H + head
        m = gl.full([64], -1e30, gl.float32, rows_layout)
        total = gl.zeros([64], gl.float32, rows_layout)
        acc = gl.zeros([64, 128], gl.float32, layout)
        if is_first == 0:
            m = gl.load(maxima_ptr + token * 2, mask=used, other=-1e30)
            total = gl.load(maxima_ptr + token * 2 + 1, mask=used, other=0.0)
            acc = gl.load(sums_ptr + token[:, None] * 128 + columns[None, :], mask=used[:, None], other=0.0)
        stage = step % _STAGES
        mbarrier.wait(q_full, turn & 1)
        mbarrier.wait(k_full.index(stage), (step // _STAGES) & 1)
        pending_s = _scores(q_nope, q_rope, k_nope.index(stage), k_rope.index(stage), zero)
        s = warpgroup_mma_wait(0, deps=[pending_s])
        gl.thread_barrier()
        mbarrier.arrive(k_empty.index(stage), count=1)
        p, m, total, alpha = _softmax(s, m, total, scale_log2, (num_blocks == 1) & (is_last == 1), FIRST, layout)
        acc = acc * alpha[:, None]
        for j in range(1, num_blocks):  # scores of block j, and the values of block j - 1 while its softmax runs
            before = stage
            before_phase = (step // _STAGES) & 1
            step += 1
            stage = step % _STAGES
            mbarrier.wait(k_full.index(stage), (step // _STAGES) & 1)
            pending_s = _scores(q_nope, q_rope, k_nope.index(stage), k_rope.index(stage), zero)
            mbarrier.wait(v_full.index(before), before_phase)
            pending = warpgroup_mma(p, v.index(before), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=[pending_s])
            gl.thread_barrier()
            mbarrier.arrive(k_empty.index(stage), count=1)
            is_diagonal = (j == num_blocks - 1) & (is_last == 1)
            p, m, total, alpha = _softmax(s, m, total, scale_log2, is_diagonal, FIRST, layout)
            acc = warpgroup_mma_wait(0, deps=[pending])
            gl.thread_barrier()
            mbarrier.arrive(v_empty.index(before), count=1)
            acc = acc * alpha[:, None]
        gl.thread_barrier()
        mbarrier.arrive(q_empty, count=1)
        mbarrier.wait(v_full.index(stage), (step // _STAGES) & 1)
        pending = warpgroup_mma(p, v.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[pending])
        gl.thread_barrier()
        mbarrier.arrive(v_empty.index(stage), count=1)
        step += 1
        turn += 1
        unit = _next_unit(units, unit_full, unit_empty, turn)
        if is_last == 1:
            acc = acc * (1.0 / total)[:, None]
            _store_out(out_ptr, scales_ptr, scales_stride, acc, row, low, high, head, FIRST, H, layout)
        else:
            gl.store(maxima_ptr + token * 2, m, mask=used)
            gl.store(maxima_ptr + token * 2 + 1, total, mask=used)
            gl.store(sums_ptr + token[:, None] * 128 + columns[None, :], acc, mask=used[:, None])


@gluon.jit(do_not_specialize=["scales_stride"], do_not_specialize_on_alignment=["num_items_ptr", "counter_ptr"])
def _attend_kernel(
    q_desc, q_rope_desc, kv_desc, rope_desc, items_ptr, num_items_ptr, counter_ptr, sums_ptr, maxima_ptr, out_ptr,
    scales_ptr, scales_stride, scale_log2, H: gl.constexpr
):  # fmt: skip
    bf16: gl.constexpr = gl.bfloat16
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    flag: gl.constexpr = mbarrier.MBarrierLayout()
    q_nope = gl.allocate_shared_memory(bf16, [2, 64, 128], tile)
    q_rope = gl.allocate_shared_memory(bf16, [2, 64, 64], tile)
    k_nope = gl.allocate_shared_memory(bf16, [_STAGES, _BLOCK, 128], tile)
    k_rope = gl.allocate_shared_memory(bf16, [_STAGES, _BLOCK, 64], tile)
    v = gl.allocate_shared_memory(bf16, [_STAGES, _BLOCK, 128], tile)
    units = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    q_full = gl.allocate_shared_memory(gl.int64, [1], flag)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], flag)
    k_full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], flag)
    k_empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], flag)
    v_full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], flag)
    v_empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], flag)
    unit_full = gl.allocate_shared_memory(gl.int64, [2, 1], flag)
    unit_empty = gl.allocate_shared_memory(gl.int64, [2, 1], flag)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)  # both warpgroups
    for i in gl.static_range(2):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
        mbarrier.init(unit_full.index(i), count=1)
        mbarrier.init(unit_empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize([
        (_attend_partition, (
            q_nope.index(0), q_rope.index(0), k_nope, k_rope, v, units, q_full, q_empty, k_full, k_empty, v_full,
            v_empty, unit_full, unit_empty, items_ptr, num_items_ptr, sums_ptr, maxima_ptr, out_ptr, scales_ptr,
            scales_stride, scale_log2, H, gl.constexpr(0))),
        (_attend_partition, (
            q_nope.index(1), q_rope.index(1), k_nope, k_rope, v, units, q_full, q_empty, k_full, k_empty, v_full,
            v_empty, unit_full, unit_empty, items_ptr, num_items_ptr, sums_ptr, maxima_ptr, out_ptr, scales_ptr,
            scales_stride, scale_log2, H, gl.constexpr(1))),
        (_load_partition, (
            q_desc, q_rope_desc, kv_desc, rope_desc, q_nope, q_rope, k_nope, k_rope, v, units, q_full, q_empty, k_full,
            k_empty, v_full, v_empty, unit_full, unit_empty, items_ptr, num_items_ptr, counter_ptr, H)),
    ], [4, 1], [232, 40])  # fmt: skip
