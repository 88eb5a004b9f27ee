"""Multi-head latent attention for one absorbed query a sequence, over paged latents, on Hopper GPUs (sm_90a), in Gluon.

With the query already taken into the latent space (mla_decode.py says how), for each row s and head h:
    out[s, h] = sum_t softmax_t(scale * q[s, h] . cache[t]) * cache[t, :512],   t over the row's context.

Shapes: q [S, H, 576] bf16, H a multiple of 64; cache [P, B, 576] bf16, B 16, 32 or 64; block_tables [S, n] int32;
context_lens [S] integer (0 gives zeros); out [S, H, 512] bf16. All contiguous, 16-byte aligned (TMA). P * B < 2**31.

Splits. A row's context is cut at multiples of `split` keys, a constant of the plan: results depend neither on the other
rows nor on the size of the batch. The pieces of one row are joined by a second kernel in ascending order. The work list
(one item a piece, longest first) is made on the device by `plan_mla_decode`, once a step for all layers.

Numerics: bf16 products, fp32 scores, softmax (base 2) and accumulators; probabilities are rounded to bf16 before the
second product. What lies beyond a row's length is never used, NaN included.

Grid: one program an SM, whatever the batch; program i takes the (item, tile of 64 heads) pairs i, i + grid, ... so that
the head tiles of an item run side by side and share its keys through L2. Three warpgroups: "scores" computes q . k and
the softmax, two "values" ones hold 64 x 256 accumulators each; the first of them also feeds the TMA queue. A thread has
168 registers; shared memory is nearly full: queries 72 KB, two stages of 64 keys 144 KB. Probabilities overwrite their
stage's rope keys, which are dead by then.
"""

# A jit function has no types that mypy knows; launchers are typed.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_wait

LATENT_DIM = 512
ROPE_DIM = 64
HEAD_TILE = 64
MERGE_HEADS = 8
# Pieces of 2,048 keys: a context of 2,000 is one piece, so that no partial result goes through memory at 256 rows.
DEFAULT_SPLIT = 2048

_TILE = gl.constexpr(64)  # heads of a program
_BLOCK = gl.constexpr(64)  # keys of a stage
_STAGES = gl.constexpr(2)
_SHARED = gl.NVMMASharedLayout(128, 16, rank=2)


@dataclass(frozen=True, kw_only=True)
class MlaDecodePlan:
    """Static device buffers: the work list of a step and the partial results of rows in several pieces."""

    split: int
    items: Tensor  # [I, 4] int32: row, first key, keys, partial slot (-1: writes `out` itself)
    num_items: Tensor  # [1] int32
    row_slots: Tensor  # [S, 2] int32: first partial slot (-1: none), pieces
    partial: Tensor  # [slots, H, 512] fp32
    lse: Tensor  # [slots, H] fp32, base 2
    num_programs: int


def make_mla_decode_plan(
    max_rows: int, max_len: int, max_tokens: int, num_heads: int, device: torch.device, split: int = DEFAULT_SPLIT
) -> MlaDecodePlan:
    """Buffers for steps of at most `max_rows` rows of at most `max_len` keys, `max_tokens` keys in all.

    Rows that share pages count them each. Raises ValueError for a shape that the kernel does not have.
    """
    if split % 64 or split <= 0 or num_heads % HEAD_TILE or max_rows <= 0:
        raise ValueError(
            f"got split={split}, num_heads={num_heads}, max_rows={max_rows}; need a positive multiple of 64, a "
            f"multiple of {HEAD_TILE}, and at least one row."
        )
    num_items = min(max_rows * math.ceil(max_len / split), max_rows + max_tokens // split)
    # A row in n > 1 pieces holds more than (n - 1) * split >= n * split / 2 keys.
    num_slots = min(num_items, 2 * max_tokens // split) if max_len > split else 0

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return MlaDecodePlan(
        split=split,
        items=zeros(num_items, 4),
        num_items=zeros(1),
        row_slots=zeros(max_rows, 2),
        partial=zeros(num_slots, num_heads, LATENT_DIM, dtype=torch.float32),
        lse=zeros(num_slots, num_heads, dtype=torch.float32),
        num_programs=torch.cuda.get_device_properties(device).multi_processor_count,
    )


def plan_mla_decode(plan: MlaDecodePlan, context_lens: Tensor) -> None:
    """Fills the plan from context_lens [S] on the device; once a step, before the first layer."""
    num_rows = context_lens.shape[0]
    if num_rows > plan.row_slots.shape[0]:
        raise ValueError(f"got {num_rows} rows; this plan holds {plan.row_slots.shape[0]}. Make it larger.")
    _plan_kernel[(1,)](
        context_lens,
        plan.items,
        plan.num_items,
        plan.row_slots,
        num_rows,
        plan.split,
        ROWS=triton.next_power_of_2(max(num_rows, 32)),
        num_warps=8,
    )


def mla_decode(q: Tensor, cache: Tensor, block_tables: Tensor, plan: MlaDecodePlan, out: Tensor, scale: float) -> None:
    """Writes out [S, H, 512]; the plan is that of this step's context_lens. Table entries beyond a row's own pages are
    not read."""
    _check_shapes(q, cache, block_tables, out)
    num_rows, num_heads, dim = q.shape
    page_size = cache.shape[1]
    flat_q, flat_cache = q.view(-1, dim), cache.view(-1, dim)
    _mla_decode_kernel[(plan.num_programs,)](
        TensorDescriptor.from_tensor(flat_q, [HEAD_TILE, LATENT_DIM], _SHARED),
        TensorDescriptor.from_tensor(flat_q, [HEAD_TILE, ROPE_DIM], _SHARED),
        TensorDescriptor.from_tensor(flat_cache, [page_size, LATENT_DIM], _SHARED),
        TensorDescriptor.from_tensor(flat_cache, [page_size, ROPE_DIM], _SHARED),
        block_tables,
        block_tables.stride(0),
        plan.items,
        plan.num_items,
        out,
        plan.partial,
        plan.lse,
        scale * math.log2(math.e),
        TILES=num_heads // HEAD_TILE,
        PAGE=page_size,
        num_warps=4,
        launch_pdl=True,
    )
    if plan.partial.shape[0]:
        num_groups = num_rows * (num_heads // MERGE_HEADS)
        _merge_kernel[(plan.num_programs * 4,)](
            plan.partial,
            plan.lse,
            plan.row_slots,
            out,
            num_groups,
            H=num_heads,
            GROUP=MERGE_HEADS,
            num_warps=4,
            launch_pdl=True,
        )


def _check_shapes(q: Tensor, cache: Tensor, block_tables: Tensor, out: Tensor) -> None:
    num_rows, num_heads, dim = q.shape
    num_pages, page_size, _ = cache.shape
    if dim != LATENT_DIM + ROPE_DIM or cache.shape[2] != dim or num_heads % HEAD_TILE or page_size not in (16, 32, 64):
        raise ValueError(
            f"got q {tuple(q.shape)} and cache {tuple(cache.shape)}; need rows of {LATENT_DIM} + {ROPE_DIM} values, a "
            f"multiple of {HEAD_TILE} heads and pages of 16, 32 or 64 tokens."
        )
    if tuple(out.shape) != (num_rows, num_heads, LATENT_DIM) or num_pages * page_size >= 2**31:
        raise ValueError(f"got out {tuple(out.shape)} and {num_pages} pages of {page_size}; need [S, H, 512], < 2**31.")
    dtypes = (q.dtype, cache.dtype, out.dtype, block_tables.dtype)
    if dtypes != (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.int32):
        raise ValueError(f"got q, cache, out, block_tables of {dtypes}; need bfloat16 three times, then int32.")
    if not (q.is_contiguous() and cache.is_contiguous() and out.is_contiguous() and block_tables.stride(1) == 1):
        raise ValueError("got a strided q, cache, out or block table; need contiguous ones: the kernel addresses rows.")


@gluon.jit
def _item(items_ptr, work, TILES: gl.constexpr):
    entry = items_ptr + (work // TILES) * 4
    return gl.load(entry), gl.load(entry + 1), gl.load(entry + 2), gl.load(entry + 3)


@gluon.jit
def _page_row(table, key, last_key, PAGE: gl.constexpr):
    """Row of the flat cache where the page of `key` starts; a key past the item's end gives its last page."""
    return gl.load(table + gl.minimum(key, last_key) // PAGE) * PAGE


@gluon.jit
def _page_rows(tables_ptr, table_stride, row, first, num_keys, j, PAGE: gl.constexpr):
    table = tables_ptr + row.to(gl.int64) * table_stride
    key = first + j * _BLOCK
    last_key = first + gl.maximum(num_keys - 1, 0)
    y0 = _page_row(table, key, last_key, PAGE)
    y1 = y0
    y2 = y0
    y3 = y0
    if PAGE == 32:
        y1 = _page_row(table, key + 32, last_key, PAGE)
    if PAGE == 16:
        y1 = _page_row(table, key + 16, last_key, PAGE)
        y2 = _page_row(table, key + 32, last_key, PAGE)
        y3 = _page_row(table, key + 48, last_key, PAGE)
    return y0, y1, y2, y3


@gluon.jit
def _fetch_page(rope_desc, k_latent, k_rope, bar, y, page, pred, PAGE: gl.constexpr):
    """A page of fewer than 64 tokens: one box a 128-byte column, since its rows are not a whole tile's."""
    PAGES: gl.constexpr = _BLOCK // PAGE
    columns = k_latent._reinterpret(gl.bfloat16, [8 * PAGES, PAGE, 64], k_rope.layout)
    for c in gl.static_range(8):
        tma.async_copy_global_to_shared(rope_desc, [y, c * 64], bar, columns.index(c * PAGES + page), pred=pred)
    ends = k_rope._reinterpret(gl.bfloat16, [PAGES, PAGE, 64], k_rope.layout)
    tma.async_copy_global_to_shared(rope_desc, [y, 512], bar, ends.index(page), pred=pred)


@gluon.jit
def _fetch_keys(  # noqa: PLR0913
    kv_desc, rope_desc, k_latent, k_rope, bar, y0, y1, y2, y3, pred, PAGE: gl.constexpr
):  # fmt: skip
    mbarrier.expect(bar, 64 * 576 * 2, pred=pred)
    if PAGE == _BLOCK:
        tma.async_copy_global_to_shared(kv_desc, [y0, 0], bar, k_latent, pred=pred)
        tma.async_copy_global_to_shared(rope_desc, [y0, 512], bar, k_rope, pred=pred)
    else:
        _fetch_page(rope_desc, k_latent, k_rope, bar, y0, 0, pred, PAGE)
        _fetch_page(rope_desc, k_latent, k_rope, bar, y1, 1, pred, PAGE)
        if PAGE == 16:
            _fetch_page(rope_desc, k_latent, k_rope, bar, y2, 2, pred, PAGE)
            _fetch_page(rope_desc, k_latent, k_rope, bar, y3, 3, pred, PAGE)


@gluon.jit
def _fetch_queries(q_desc, q_rope_desc, q_latent, q_rope, bar, head):
    mbarrier.expect(bar, 64 * 576 * 2)
    tma.async_copy_global_to_shared(q_desc, [head, 0], bar, q_latent)
    tma.async_copy_global_to_shared(q_rope_desc, [head, 512], bar, q_rope)


@gluon.jit
def _advance(items_ptr, num_work, work, j, row, first, num_keys, TILES: gl.constexpr):
    """The load cursor's next block, across items."""
    j += 1
    if j * _BLOCK >= num_keys:
        j = 0
        work += gl.num_programs(0)
        if work < num_work:
            row, first, num_keys, _ = _item(items_ptr, work, TILES)
    return work, j, row, first, num_keys


@gluon.jit
def _scores_partition(  # noqa: PLR0913
    q_desc, q_rope_desc, q_latent, q_rope, k_latent, k_rope, factors, q_full, k_full, p_full, p_empty, items_ptr,
    num_items_ptr, lse_ptr, scale_log2, TILES: gl.constexpr
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    rows_layout: gl.constexpr = gl.SliceLayout(1, layout)
    gdc_wait()
    num_work = gl.load(num_items_ptr) * TILES
    columns = gl.arange(0, _BLOCK, layout=gl.SliceLayout(0, layout))
    heads = gl.arange(0, _TILE, layout=rows_layout)
    start = gl.program_id(0)
    stride = gl.num_programs(0)
    row, _, num_keys, slot = _item(items_ptr, gl.minimum(start, num_work - 1), TILES)
    if start < num_work:
        _fetch_queries(q_desc, q_rope_desc, q_latent, q_rope, q_full, (row * TILES + start % TILES) * _TILE)
    step = 0  # blocks so far
    sent = 0  # messages to the values partitions so far: blocks and item ends
    turn = 0  # items so far
    for work in range(start, num_work, stride):
        m = gl.full([_TILE], -1e30, gl.float32, layout=rows_layout)
        total = gl.zeros([_TILE], gl.float32, layout=rows_layout)
        mbarrier.wait(q_full, turn & 1)
        # Half of the queries stay in registers: with both operands in shared memory its bandwidth is the bound.
        q_first = q_latent.slice(0, 256, 1).load(gl.DotOperandLayout(0, layout, 2))
        for j in range(gl.maximum((num_keys + _BLOCK - 1) // _BLOCK, 1)):
            stage = step % _STAGES
            buffer = sent % 2
            k = k_latent.index(stage)
            mbarrier.wait(k_full.index(stage), (step // _STAGES) & 1)
            token = warpgroup_mma_init(gl.zeros([_TILE, _BLOCK], gl.float32, layout=layout))
            token = warpgroup_mma(q_rope, k_rope.index(stage).permute((1, 0)), token, is_async=True)
            token = warpgroup_mma(q_first, k.slice(0, 256, 1).permute((1, 0)), token, is_async=True)
            token = warpgroup_mma(
                q_latent.slice(256, 256, 1), k.slice(256, 256, 1).permute((1, 0)), token, is_async=True
            )
            s = warpgroup_mma_wait(0, deps=[token])
            s = gl.where((columns < num_keys - j * _BLOCK)[None, :], s * scale_log2, float("-inf"))
            m_new = gl.maximum(m, gl.max(s, 1))
            alpha = gl.exp2(m - m_new)
            p = gl.exp2(s - m_new[:, None])
            m = m_new
            mbarrier.wait(p_empty.index(buffer), ((sent // 2) & 1) ^ 1)
            factors.index(buffer).store(alpha)
            k_rope.index(stage).store(p.to(gl.bfloat16))
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(p_full.index(buffer), count=1)
            total = total * alpha + gl.sum(p, 1)
            step += 1
            sent += 1
        if slot >= 0:
            lse = gl.where(total > 0, m + gl.log2(total), float("-inf"))
            gl.store(lse_ptr + (slot.to(gl.int64) * TILES + work % TILES) * _TILE + heads, lse)
        turn += 1  # noqa: SIM113
        following = work + stride
        if following < num_work:
            row, _, num_keys, slot = _item(items_ptr, following, TILES)
            gl.thread_barrier()
            head = (row * TILES + following % TILES) * _TILE
            _fetch_queries(q_desc, q_rope_desc, q_latent, q_rope, q_full, head)
        buffer = sent % 2
        mbarrier.wait(p_empty.index(buffer), ((sent // 2) & 1) ^ 1)
        factors.index(buffer).store(gl.where(total > 0, 1.0 / total, 0.0))
        gl.thread_barrier()
        mbarrier.arrive(p_full.index(buffer), count=1)
        sent += 1


@gluon.jit
def _values_partition(  # noqa: PLR0913
    kv_desc, rope_desc, k_latent, k_rope, factors, k_full, p_full, p_empty, items_ptr, num_items_ptr, tables_ptr,
    table_stride, out_ptr, partial_ptr, TILES: gl.constexpr, PAGE: gl.constexpr, SIDE: gl.constexpr
):  # fmt: skip
    HALF: gl.constexpr = 256
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    rows_layout: gl.constexpr = gl.SliceLayout(1, layout)
    tail_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    gdc_wait()
    num_work = gl.load(num_items_ptr) * TILES
    heads = gl.arange(0, _TILE, layout=rows_layout)
    columns = gl.arange(0, HALF, layout=gl.SliceLayout(0, layout)) + SIDE * HALF
    offsets = heads[:, None] * 512 + columns[None, :]
    tail_rows = gl.arange(0, _BLOCK, layout=gl.SliceLayout(1, tail_layout))
    start = gl.program_id(0)
    l_work = start
    l_j = 0
    if SIDE == 0:  # this side loads: first a block for each stage, then block j + 2 once block j is used up
        l_row, l_first, l_keys, _ = _item(items_ptr, gl.minimum(start, num_work - 1), TILES)
        for i in gl.static_range(_STAGES):
            if i > 0:
                l_work, l_j, l_row, l_first, l_keys = _advance(
                    items_ptr, num_work, l_work, l_j, l_row, l_first, l_keys, TILES
                )
            y0, y1, y2, y3 = _page_rows(tables_ptr, table_stride, l_row, l_first, l_keys, l_j, PAGE)
            _fetch_keys(
                kv_desc, rope_desc, k_latent.index(i), k_rope.index(i), k_full.index(i), y0, y1, y2, y3,
                l_work < num_work, PAGE
            )  # fmt: skip
    step = 0
    sent = 0
    for work in range(start, num_work, gl.num_programs(0)):
        row, _, num_keys, slot = _item(items_ptr, work, TILES)
        acc = gl.zeros([_TILE, HALF], gl.float32, layout=layout)
        for j in range(gl.maximum((num_keys + _BLOCK - 1) // _BLOCK, 1)):
            stage = step % _STAGES
            buffer = sent % 2
            value = k_latent.index(stage).slice(SIDE * HALF, HALF, 1)
            mbarrier.wait(p_full.index(buffer), (sent // 2) & 1)
            if num_keys - j * _BLOCK < _BLOCK:  # keys past the end have p = 0, but 0 * NaN is NaN
                parts = k_latent.index(stage)._reinterpret(gl.bfloat16, [8, _BLOCK, 64], k_rope.layout)
                for c in gl.static_range(4):
                    x = parts.index(SIDE * 4 + c).load(tail_layout)
                    parts.index(SIDE * 4 + c).store(gl.where((tail_rows < num_keys - j * _BLOCK)[:, None], x, 0.0))
                fence_async_shared()
                gl.thread_barrier()
            acc = acc * factors.index(buffer).load(rows_layout)[:, None]
            token = warpgroup_mma(k_rope.index(stage), value, acc, is_async=True)
            if SIDE == 0:
                l_work, l_j, l_row, l_first, l_keys = _advance(
                    items_ptr, num_work, l_work, l_j, l_row, l_first, l_keys, TILES
                )
                y0, y1, y2, y3 = _page_rows(tables_ptr, table_stride, l_row, l_first, l_keys, l_j, PAGE)
            acc = warpgroup_mma_wait(0, deps=[token])
            gl.thread_barrier()
            mbarrier.arrive(p_empty.index(buffer), count=1)
            if SIDE == 0:
                mbarrier.wait(p_empty.index(buffer), (sent // 2) & 1)
                _fetch_keys(
                    kv_desc, rope_desc, k_latent.index(stage), k_rope.index(stage), k_full.index(stage), y0, y1, y2, y3,
                    l_work < num_work, PAGE
                )  # fmt: skip
            step += 1
            sent += 1
        buffer = sent % 2
        mbarrier.wait(p_full.index(buffer), (sent // 2) & 1)
        inverse = factors.index(buffer).load(rows_layout)
        gl.thread_barrier()
        mbarrier.arrive(p_empty.index(buffer), count=1)
        sent += 1
        acc = acc * inverse[:, None]
        if slot >= 0:
            gl.store(partial_ptr + (slot.to(gl.int64) * TILES + work % TILES) * (_TILE * 512) + offsets, acc)
        else:
            gl.store(out_ptr + (row.to(gl.int64) * TILES + work % TILES) * (_TILE * 512) + offsets, acc.to(gl.bfloat16))


@gluon.jit(do_not_specialize=["table_stride"])
def _mla_decode_kernel(  # noqa: PLR0913
    q_desc, q_rope_desc, kv_desc, rope_desc, tables_ptr, table_stride, items_ptr, num_items_ptr, out_ptr, partial_ptr,
    lse_ptr, scale_log2, TILES: gl.constexpr, PAGE: gl.constexpr
):  # fmt: skip
    bf16: gl.constexpr = gl.bfloat16
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    q_latent = gl.allocate_shared_memory(bf16, [_TILE, 512], tile)
    q_rope = gl.allocate_shared_memory(bf16, [_TILE, 64], tile)
    k_latent = gl.allocate_shared_memory(bf16, [_STAGES, _BLOCK, 512], tile)
    k_rope = gl.allocate_shared_memory(bf16, [_STAGES, _BLOCK, 64], tile)
    factors = gl.allocate_shared_memory(gl.float32, [2, _TILE], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    p_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    p_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(2):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(p_full.index(i), count=1)
        mbarrier.init(p_empty.index(i), count=2)  # both values partitions
    fence_async_shared()
    gl.warp_specialize([
        (_scores_partition, (
            q_desc, q_rope_desc, q_latent, q_rope, k_latent, k_rope, factors, q_full, k_full, p_full, p_empty,
            items_ptr, num_items_ptr, lse_ptr, scale_log2, TILES)),
        (_values_partition, (
            kv_desc, rope_desc, k_latent, k_rope, factors, k_full, p_full, p_empty, items_ptr, num_items_ptr,
            tables_ptr, table_stride, out_ptr, partial_ptr, TILES, PAGE, gl.constexpr(0))),
        (_values_partition, (
            kv_desc, rope_desc, k_latent, k_rope, factors, k_full, p_full, p_empty, items_ptr, num_items_ptr,
            tables_ptr, table_stride, out_ptr, partial_ptr, TILES, PAGE, gl.constexpr(1))),
    ], [4, 4], [168, 168])  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "split"])
def _plan_kernel(lens_ptr, items_ptr, num_items_ptr, row_slots_ptr, num_rows, split, ROWS: tl.constexpr):
    """One program. Whole pieces come first, then the rests by size, equal ones by row; length 0 is a rest."""
    rows = tl.arange(0, ROWS)
    used = rows < num_rows
    lens = tl.load(lens_ptr + rows, mask=used, other=0).to(tl.int32)
    whole = lens // split
    rest = tl.where(used & ((lens > whole * split) | (lens == 0)), lens - whole * split, -1)
    rank = tl.zeros([ROWS], tl.int32)
    for i in range(0, num_rows):
        length = tl.load(lens_ptr + i).to(tl.int32)
        other = tl.where((length % split != 0) | (length == 0), length % split, -1)
        rank += ((other > rest) | ((other == rest) & (i < rows))).to(tl.int32)
    pieces = tl.where(used, whole + (rest >= 0).to(tl.int32), 0)
    several = pieces > 1
    slots = tl.where(several, pieces, 0)
    first_slot = tl.cumsum(slots, 0) - slots
    first_whole = tl.cumsum(whole, 0) - whole
    num_whole = tl.sum(whole, 0)
    tl.store(num_items_ptr, num_whole + tl.sum((rest >= 0).to(tl.int32), 0))
    tl.store(row_slots_ptr + rows * 2, tl.where(several, first_slot, -1), mask=used)
    tl.store(row_slots_ptr + rows * 2 + 1, pieces, mask=used)
    for c in range(0, tl.max(whole, 0)):
        entry = items_ptr + (first_whole + c) * 4
        here = c < whole
        tl.store(entry, rows, mask=here)
        tl.store(entry + 1, tl.zeros([ROWS], tl.int32) + c * split, mask=here)
        tl.store(entry + 2, tl.zeros([ROWS], tl.int32) + split, mask=here)
        tl.store(entry + 3, tl.where(several, first_slot + c, -1), mask=here)
    entry = items_ptr + (num_whole + rank) * 4
    here = rest >= 0
    tl.store(entry, rows, mask=here)
    tl.store(entry + 1, whole * split, mask=here)
    tl.store(entry + 2, rest, mask=here)
    tl.store(entry + 3, tl.where(several, first_slot + whole, -1), mask=here)


@triton.jit
def _merge_kernel(partial_ptr, lse_ptr, row_slots_ptr, out_ptr, num_groups, H: tl.constexpr, GROUP: tl.constexpr):
    """Persistent: a program takes (row, GROUP heads) after another; sums chunks in their order."""
    columns = tl.arange(0, 512)
    lanes = tl.arange(0, GROUP)
    gdc_wait()
    for work in range(tl.program_id(0), num_groups, tl.num_programs(0)):
        row = work // (H // GROUP)
        heads = (work % (H // GROUP)) * GROUP + lanes
        slot = tl.load(row_slots_ptr + row * 2).to(tl.int64)
        count = tl.load(row_slots_ptr + row * 2 + 1)
        if slot >= 0:
            m = tl.full([GROUP], float("-inf"), tl.float32)
            for c in range(count):
                m = tl.maximum(m, tl.load(lse_ptr + (slot + c) * H + heads))
            acc = tl.zeros([GROUP, 512], tl.float32)
            total = tl.zeros([GROUP], tl.float32)
            for c in range(count):
                w = tl.exp2(tl.load(lse_ptr + (slot + c) * H + heads) - m)
                x = tl.load(partial_ptr + ((slot + c) * H + heads)[:, None] * 512 + columns[None, :])
                acc += x * w[:, None]
                total += w
            tl.store(
                out_ptr + (row.to(tl.int64) * H + heads)[:, None] * 512 + columns[None, :],
                (acc / total[:, None]).to(tl.bfloat16),
            )
