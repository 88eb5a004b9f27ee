"""Multi-head latent attention for one absorbed query a sequence, over paged latents, on Hopper GPUs (sm_90a), in Gluon.

With the query already taken into the latent space (mla_decode.py says how), for each row s and head h:
    out[s, h] = sum_t softmax_t(scale * q[s, h] . cache[t]) * cache[t, :512],   t over the row's context.

Shapes: q [S, H, 576] bf16, H a multiple of 64; cache [P, B, 576] bf16, B 16, 32 or 64; block_tables [S, n] int32;
context_lens [S] integer (0 gives zeros); out [S, H, 512] bf16. All contiguous, 16-byte aligned (TMA). P * B < 2**31.

Contexts are cut into pieces, which one program each works off: how, decode_plan.py says. Pieces of one row are joined
by a second kernel (decode_merge.py) in ascending order.

Numerics: bf16 products, fp32 scores, softmax (base 2) and accumulators; probabilities are rounded to bf16 before the
second product. What lies beyond a row's length is never used, NaN included.

Grid: one program an SM, whatever the batch: a group of neighbours, one a tile of 64 heads, takes the same items side by
side and shares their keys through L2. Three warpgroups: "scores" computes q . k and the softmax, two "values" ones hold
64 x 256 accumulators each; the first of them also feeds the TMA queue. A thread has 168 registers; shared memory is
nearly full: queries 72 KB, two stages of 64 keys 144 KB. Probabilities overwrite their stage's rope keys, which are
dead by then.
"""

# A jit function has no types that mypy knows; launchers are typed.
# mypy: allow-untyped-defs, allow-incomplete-defs
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
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_wait

from nmoe_backend.kernels.mla_sm90.decode_merge import merge_pieces
from nmoe_backend.kernels.mla_sm90.decode_plan import HEAD_TILE, LATENT_DIM, MlaDecodePlan

ROPE_DIM = 64

_TILE = gl.constexpr(HEAD_TILE)  # heads of a program
_BLOCK = gl.constexpr(64)  # keys of a stage
_STAGES = gl.constexpr(2)
_SHARED = gl.NVMMASharedLayout(128, 16, rank=2)


def mla_decode(q: Tensor, cache: Tensor, block_tables: Tensor, plan: MlaDecodePlan, out: Tensor, scale: float) -> None:
    """Writes out [S, H, 512]; the plan is that of this step's context_lens. Table entries beyond a row's own pages are
    not read."""
    _check_shapes(q, cache, block_tables, out)
    _, num_heads, dim = q.shape
    page_size = cache.shape[1]
    flat_q, flat_cache = q.view(-1, dim), cache.view(-1, dim)
    num_tiles = num_heads // HEAD_TILE
    _mla_decode_kernel[(plan.num_groups * num_tiles,)](
        TensorDescriptor.from_tensor(flat_q, [HEAD_TILE, LATENT_DIM], _SHARED),
        TensorDescriptor.from_tensor(flat_q, [HEAD_TILE, ROPE_DIM], _SHARED),
        TensorDescriptor.from_tensor(flat_cache, [page_size, LATENT_DIM], _SHARED),
        TensorDescriptor.from_tensor(flat_cache, [page_size, ROPE_DIM], _SHARED),
        block_tables,
        block_tables.stride(0),
        plan.items,
        plan.group_items,
        out,
        plan.partial,
        plan.lse,
        scale * math.log2(math.e),
        TILES=num_tiles,
        PAGE=page_size,
        num_warps=4,
        launch_pdl=True,
    )
    if plan.partial.shape[0]:
        merge_pieces(plan, out)


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
def _share(group_items_ptr, TILES: gl.constexpr):
    """This program's tile of heads, and its group's items: from the first one to behind the last one."""
    group = group_items_ptr + gl.program_id(0) // TILES
    return gl.program_id(0) % TILES, gl.load(group), gl.load(group + 1)


@gluon.jit
def _item(items_ptr, item):
    """Row, first key, keys and partial slot."""
    entry = items_ptr + item * 4
    return gl.load(entry), gl.load(entry + 1), gl.load(entry + 2), gl.load(entry + 3)


@gluon.jit
def _page_row(table, key, last_key, PAGE: gl.constexpr):
    """Row of the flat cache where the page of `key` starts; a key past the item's end gives its last page."""
    return gl.load(table + gl.minimum(key, last_key) // PAGE) * PAGE


@gluon.jit
def _page_rows(tables_ptr, table_stride, row, first, num_keys, j, PAGE: gl.constexpr):
    """Of each page of the item's j-th block of keys."""
    table = tables_ptr + row.to(gl.int64) * table_stride
    key = first + j * _BLOCK
    last_key = first + gl.maximum(num_keys - 1, 0)
    pages: gl.tuple = ()
    for page in gl.static_range(_BLOCK // PAGE):
        pages += (_page_row(table, key + page * PAGE, last_key, PAGE),)
    return pages


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
def _fetch_keys(kv_desc, rope_desc, k_latent, k_rope, bar, pages, pred, PAGE: gl.constexpr):
    """A stage, from the rows where its pages start."""
    mbarrier.expect(bar, 64 * 576 * 2, pred=pred)
    if PAGE == _BLOCK:
        tma.async_copy_global_to_shared(kv_desc, [pages[0], 0], bar, k_latent, pred=pred)
        tma.async_copy_global_to_shared(rope_desc, [pages[0], 512], bar, k_rope, pred=pred)
    else:
        for page in gl.static_range(_BLOCK // PAGE):
            _fetch_page(rope_desc, k_latent, k_rope, bar, pages[page], page, pred, PAGE)


@gluon.jit
def _fetch_queries(q_desc, q_rope_desc, q_latent, q_rope, bar, head):
    mbarrier.expect(bar, 64 * 576 * 2)
    tma.async_copy_global_to_shared(q_desc, [head, 0], bar, q_latent)
    tma.async_copy_global_to_shared(q_rope_desc, [head, 512], bar, q_rope)


@gluon.jit
def _advance(items_ptr, end, item, j, row, first, num_keys):
    """The load cursor's next block, across items."""
    j += 1
    if j * _BLOCK >= num_keys:
        j = 0
        item += 1
        if item < end:
            row, first, num_keys, _ = _item(items_ptr, item)
    return item, j, row, first, num_keys


@gluon.jit
def _scores_partition(  # noqa: PLR0913
    q_desc, q_rope_desc, q_latent, q_rope, k_latent, k_rope, factors, q_full, k_full, p_full, p_empty, items_ptr,
    group_items_ptr, lse_ptr, scale_log2, TILES: gl.constexpr
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    rows_layout: gl.constexpr = gl.SliceLayout(1, layout)
    gdc_wait()
    tile, begin, end = _share(group_items_ptr, TILES)
    columns = gl.arange(0, _BLOCK, layout=gl.SliceLayout(0, layout))
    heads = gl.arange(0, _TILE, layout=rows_layout)
    row, _, num_keys, slot = _item(items_ptr, gl.where(begin < end, begin, 0))
    if begin < end:
        _fetch_queries(q_desc, q_rope_desc, q_latent, q_rope, q_full, (row * TILES + tile) * _TILE)
    step = 0  # blocks so far
    sent = 0  # messages to the values partitions so far: blocks and item ends
    turn = 0  # items so far
    for item in range(begin, end):
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
            gl.store(lse_ptr + (slot.to(gl.int64) * TILES + tile) * _TILE + heads, lse)
        turn += 1  # noqa: SIM113
        if item + 1 < end:
            row, _, num_keys, slot = _item(items_ptr, item + 1)
            gl.thread_barrier()
            _fetch_queries(q_desc, q_rope_desc, q_latent, q_rope, q_full, (row * TILES + tile) * _TILE)
        buffer = sent % 2
        mbarrier.wait(p_empty.index(buffer), ((sent // 2) & 1) ^ 1)
        factors.index(buffer).store(gl.where(total > 0, 1.0 / total, 0.0))
        gl.thread_barrier()
        mbarrier.arrive(p_full.index(buffer), count=1)
        sent += 1


@gluon.jit
def _values_partition(  # noqa: PLR0913
    kv_desc, rope_desc, k_latent, k_rope, factors, k_full, p_full, p_empty, items_ptr, group_items_ptr,
    tables_ptr, table_stride, out_ptr, partial_ptr, TILES: gl.constexpr, PAGE: gl.constexpr, SIDE: gl.constexpr
):  # fmt: skip
    HALF: gl.constexpr = 256
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    rows_layout: gl.constexpr = gl.SliceLayout(1, layout)
    tail_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    gdc_wait()
    tile, begin, end = _share(group_items_ptr, TILES)
    heads = gl.arange(0, _TILE, layout=rows_layout)
    columns = gl.arange(0, HALF, layout=gl.SliceLayout(0, layout)) + SIDE * HALF
    offsets = heads[:, None] * 512 + columns[None, :]
    tail_rows = gl.arange(0, _BLOCK, layout=gl.SliceLayout(1, tail_layout))
    l_item = begin
    l_j = 0
    if SIDE == 0:  # this side loads: first a block for each stage, then block j + 2 once block j is used up
        l_row, l_first, l_keys, _ = _item(items_ptr, gl.where(begin < end, begin, 0))
        for i in gl.static_range(_STAGES):
            if i > 0:
                l_item, l_j, l_row, l_first, l_keys = _advance(items_ptr, end, l_item, l_j, l_row, l_first, l_keys)
            pages = _page_rows(tables_ptr, table_stride, l_row, l_first, l_keys, l_j, PAGE)
            _fetch_keys(
                kv_desc, rope_desc, k_latent.index(i), k_rope.index(i), k_full.index(i), pages, l_item < end, PAGE
            )  # fmt: skip
    step = 0
    sent = 0
    for item in range(begin, end):
        row, _, num_keys, slot = _item(items_ptr, item)
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
                l_item, l_j, l_row, l_first, l_keys = _advance(items_ptr, end, l_item, l_j, l_row, l_first, l_keys)
                pages = _page_rows(tables_ptr, table_stride, l_row, l_first, l_keys, l_j, PAGE)
            acc = warpgroup_mma_wait(0, deps=[token])
            gl.thread_barrier()
            mbarrier.arrive(p_empty.index(buffer), count=1)
            if SIDE == 0:
                mbarrier.wait(p_empty.index(buffer), (sent // 2) & 1)
                _fetch_keys(
                    kv_desc, rope_desc, k_latent.index(stage), k_rope.index(stage), k_full.index(stage), pages,
                    l_item < end, PAGE
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
            gl.store(partial_ptr + (slot.to(gl.int64) * TILES + tile) * (_TILE * 512) + offsets, acc)
        else:
            gl.store(out_ptr + (row.to(gl.int64) * TILES + tile) * (_TILE * 512) + offsets, acc.to(gl.bfloat16))


@gluon.jit(do_not_specialize=["table_stride"])
def _mla_decode_kernel(  # noqa: PLR0913
    q_desc, q_rope_desc, kv_desc, rope_desc, tables_ptr, table_stride, items_ptr, group_items_ptr, out_ptr, partial_ptr,
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
            items_ptr, group_items_ptr, lse_ptr, scale_log2, TILES)),
        (_values_partition, (
            kv_desc, rope_desc, k_latent, k_rope, factors, k_full, p_full, p_empty, items_ptr,
            group_items_ptr, tables_ptr, table_stride, out_ptr, partial_ptr, TILES, PAGE, gl.constexpr(0))),
        (_values_partition, (
            kv_desc, rope_desc, k_latent, k_rope, factors, k_full, p_full, p_empty, items_ptr,
            group_items_ptr, tables_ptr, table_stride, out_ptr, partial_ptr, TILES, PAGE, gl.constexpr(1))),
    ], [4, 4], [168, 168])  # fmt: skip
