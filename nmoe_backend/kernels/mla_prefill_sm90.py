"""Multi-head latent attention over many new tokens of several sequences, over paged latents, on Hopper GPUs (sm_90a).

A row is a chunk of one sequence: `length` new tokens at positions start, start + 1, ..., whose latents (the chunk's own
too) stand in the paged cache. With keys and values expanded from the latents c of the cache (mla_prefill.py says how),
    out[t, h] = sum_s softmax_s(scale * (q_nope[t, h] . k_nope[s, h] + q_rope[t, h] . k_rope[s])) * v[s, h],  s <= t.

Shapes: q [T, H, 192] bf16 (128 nope, then 64 turned), H a multiple of 4; cache [P, B, 576] bf16; block_tables [S, n]
int32; w_kv_b [H, 256, 512] bf16; out [T, H, 128] bf16; all contiguous, 16-byte aligned (TMA). Rows of the step: tokens
[cu_seqlens[s], cu_seqlens[s + 1]); tokens outside of every row are neither used nor written.

Bounded memory. The keys of all rows, prefix and chunk, each row padded with zeros to whole blocks of 128, make one
list, which is worked off in pieces of `piece_keys`: gather the piece's latents, expand them by a matrix product,
attend. How many rows, blocks and items there are is on the device: a plan of more pieces than a step needs computes
nothing more, it only launches three kernels a piece that find nothing to do.

A tile is a row's queries at positions [128 k, 128 k + 128); it needs the row's key blocks 0 ... k, the last
under the causal mask. An item is a tile in a piece where it has keys; one whose keys lie in several pieces keeps its
running maximum, sum and unnormalised output in fp32 between them. Example: 200 new tokens at start = 100 have keys in
blocks 0, 1, 2, and tiles 0 (queries 100 - 127), 1 and 2 (queries 256 - 299) of 1, 2 and 3 blocks; with piece_keys = 256
there are items of 1, 2 and 2 blocks in piece 0 and one of 1 block in piece 1.

Numerics: bf16 products, fp32 scores, softmax (base 2) and accumulators; probabilities are rounded to bf16 before the
second product. Blocks of keys and tiles of 128 queries are cut at absolute positions, and what is kept between pieces
is not rounded. The product that expands adds up 64 latents at a time in one order, whatever the key's place. So a
token's result depends neither on the other rows, nor on where chunks and pieces end.

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
from collections.abc import Iterable
from dataclasses import dataclass, replace

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
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor as PlainDescriptor

QUERY_DIM = 192
LATENT_DIM = 512
ROPE_DIM = 64
NOPE_DIM = 128
EXPANDED_DIM = 256  # of a head: 128 of the key, then 128 of the value
VALUE_DIM = 128
HEAD_GROUP = 4  # heads whose tiles run side by side and share their keys in L2
BLOCK = 128  # queries of a tile and keys of a block
DEFAULT_PIECE_KEYS = 8192

_ITEM = tl.constexpr(8)  # int32 fields of an item
_ITEM_TILE = tl.constexpr(32)  # items of a program of the plan
_GATHER_ROWS = tl.constexpr(16)
_EXPAND_K = tl.constexpr(64)  # latents of a stage of the product that expands
_EXPAND_GROUP = tl.constexpr(16)  # key blocks that take turns at a head's weights while these are in L2
_BLOCK = gl.constexpr(128)
_STAGES = gl.constexpr(2)
_HEAD_GROUP = gl.constexpr(HEAD_GROUP)
_SHARED = gl.NVMMASharedLayout(128, 16, rank=2)


@dataclass(frozen=True, kw_only=True)
class MlaPrefillPlan:
    """Static device buffers: the work lists of a step; the expanded keys and running sums of one layer at a time."""

    num_pieces: int
    piece_keys: int
    items: Tensor  # [pieces, I, 8] int32: q row, first and last query used, key row, blocks, is first, is last, -
    num_items: Tensor  # [pieces] int32
    blocks: Tensor  # [pieces * piece_keys / 128, 4] int32: row (-1: unused), first position, keys, -
    num_blocks: Tensor  # [1] int32: blocks in use, in all pieces
    keys: Tensor  # [piece_keys, 576] bf16, gathered
    expanded: Tensor  # [piece_keys, H, 256] bf16: of a head, 128 of the key, then the value
    sums: Tensor  # [T, H, 128] fp32, T = 0 for one piece
    maxima: Tensor  # [T, H, 2] fp32: running maximum of q . k, and sum
    counters: Tensor  # [pieces] int32: units handed out
    num_programs: int

    def part(self, num_pieces: int, piece_keys: int) -> MlaPrefillPlan:
        """A plan of a smaller bucket in the same buffers: for steps that don't run at the same time."""
        if not (0 < num_pieces <= self.num_pieces and 0 < piece_keys <= self.piece_keys) or piece_keys % BLOCK:
            raise ValueError(
                f"got {num_pieces} pieces of {piece_keys} keys; need at most {self.num_pieces} of {self.piece_keys}, a "
                f"multiple of {BLOCK}."
            )
        return replace(
            self,
            num_pieces=num_pieces,
            piece_keys=piece_keys,
            items=self.items[:num_pieces],
            num_items=self.num_items[:num_pieces],
            blocks=self.blocks[: num_pieces * piece_keys // BLOCK],
            keys=self.keys[:piece_keys],
            expanded=self.expanded[:piece_keys],
            counters=self.counters[:num_pieces],
        )


def num_key_rows(rows: Iterable[tuple[int, int]]) -> int:
    """Keys that rows of (start, length) take in the pieces: a row's own are padded to whole blocks."""
    return sum(-(-(start + length) // BLOCK) * BLOCK for start, length in rows if length)


def make_mla_prefill_plan(
    max_rows: int, max_tokens: int, num_pieces: int, num_heads: int, device: torch.device,
    piece_keys: int = DEFAULT_PIECE_KEYS,
) -> MlaPrefillPlan:  # fmt: skip
    """Buffers for steps of at most `max_rows` rows, `max_tokens` tokens (of other kinds too) and num_pieces pieces.

    At 128 heads `expanded` takes 64 KB a key, and the sums of more than one piece 65 KB a token. Raises ValueError.
    """
    if piece_keys <= 0 or piece_keys % BLOCK or num_heads % HEAD_GROUP or max_rows <= 0 or num_pieces <= 0:
        raise ValueError(
            f"got piece_keys={piece_keys}, num_heads={num_heads}, max_rows={max_rows}, num_pieces={num_pieces}; need a "
            f"positive multiple of {BLOCK}, a multiple of {HEAD_GROUP}, at least one row and one piece."
        )
    bf16, fp32, int32 = torch.bfloat16, torch.float32, torch.int32
    # A row's tokens touch at most two tiles that they don't fill.
    num_tiles = max_tokens // BLOCK + 2 * max_rows
    num_items = -(-num_tiles // _ITEM_TILE.value) * _ITEM_TILE.value
    carried = max_tokens if num_pieces > 1 else 0

    def buffer(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return MlaPrefillPlan(
        num_pieces=num_pieces,
        piece_keys=piece_keys,
        items=buffer(num_pieces, num_items, _ITEM.value, dtype=int32),
        num_items=buffer(num_pieces, dtype=int32),
        blocks=buffer(num_pieces * piece_keys // BLOCK, 4, dtype=int32),
        num_blocks=buffer(1, dtype=int32),
        keys=buffer(piece_keys, LATENT_DIM + ROPE_DIM, dtype=bf16),
        expanded=buffer(piece_keys, num_heads, EXPANDED_DIM, dtype=bf16),
        sums=buffer(carried, num_heads, VALUE_DIM, dtype=fp32),
        maxima=buffer(carried, num_heads, 2, dtype=fp32),
        counters=buffer(num_pieces, dtype=int32),
        num_programs=torch.cuda.get_device_properties(device).multi_processor_count,
    )


def plan_mla_prefill(plan: MlaPrefillPlan, cu_seqlens: Tensor, starts: Tensor, num_rows: Tensor) -> None:
    """Fills the plan from cu_seqlens [S + 1] and starts [S] int32, on the device; once a step, before the first layer.

    Row s < num_rows [1] int32 is the tokens [cu_seqlens[s], cu_seqlens[s + 1]) of the step, at positions starts[s],
    starts[s] + 1, ... A row of no tokens takes no part, and those from num_rows on are not looked at. The caller knows
    that `num_key_rows` of the rows fits (num_pieces * piece_keys).
    """
    num_items, num_blocks = plan.items.shape[1], plan.blocks.shape[0]
    _plan_items_kernel[(plan.num_pieces, num_items // _ITEM_TILE.value)](
        cu_seqlens, starts, plan.items, plan.num_items, num_rows, num_items, plan.piece_keys // BLOCK,
        WIDTH=triton.next_power_of_2(num_items), num_warps=8,
    )  # fmt: skip
    _plan_blocks_kernel[(triton.cdiv(num_blocks, 128),)](
        cu_seqlens, starts, plan.blocks, plan.num_blocks, num_rows, num_blocks, num_warps=4
    )


def mla_prefill(
    q: Tensor, cache: Tensor, block_tables: Tensor, w_kv_b: Tensor, plan: MlaPrefillPlan, out: Tensor, scale: float
) -> None:
    """Writes out [T, H, 128] at the rows' tokens; the plan is that of this step (`plan_mla_prefill`).

    Under a graph: 3 launches a piece, no allocation, work for the keys that there are. Table entries beyond a row's own
    pages are not read; keys of the cache beyond a row's end are not used, NaN included.
    """
    _check(q, cache, block_tables, w_kv_b, plan, out)
    for piece in range(plan.num_pieces):
        _gather_keys(plan, cache, block_tables, piece)
        _expand_keys(plan, w_kv_b, piece)
        _attend(q, plan, piece, out, scale)


def _gather_keys(plan: MlaPrefillPlan, cache: Tensor, block_tables: Tensor, piece: int) -> None:
    """The piece's latents and rope keys into plan.keys."""
    _gather_keys_kernel[(plan.piece_keys // _GATHER_ROWS.value,)](
        cache, block_tables, block_tables.stride(0), plan.blocks, plan.keys, plan.counters[piece:],
        piece * (plan.piece_keys // BLOCK), PAGE=cache.shape[1], num_warps=4,
    )  # fmt: skip


def _expand_keys(plan: MlaPrefillPlan, w_kv_b: Tensor, piece: int) -> None:
    """The piece's keys and values of every head, from the latents in plan.keys, into plan.expanded."""
    weight, expanded = w_kv_b.flatten(0, 1), plan.expanded.flatten(1)
    piece_blocks = plan.piece_keys // BLOCK
    _expand_keys_kernel[(plan.num_programs,)](
        PlainDescriptor.from_tensor(plan.keys, [BLOCK, _EXPAND_K.value]),
        PlainDescriptor.from_tensor(weight, [EXPANDED_DIM, _EXPAND_K.value]),
        PlainDescriptor.from_tensor(expanded, [BLOCK, EXPANDED_DIM]),
        plan.num_blocks, piece * piece_blocks, piece_blocks, weight.shape[0] // EXPANDED_DIM, num_warps=8,
        num_stages=3,
    )  # fmt: skip


def _attend(q: Tensor, plan: MlaPrefillPlan, piece: int, out: Tensor, scale: float) -> None:
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
        scale * math.log2(math.e),
        H=q.shape[1],
        num_warps=4,
    )


def _check(
    q: Tensor, cache: Tensor, block_tables: Tensor, w_kv_b: Tensor, plan: MlaPrefillPlan, out: Tensor
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
    tensors = (q, cache, w_kv_b, out)
    if any(t.dtype != torch.bfloat16 for t in tensors) or block_tables.dtype != torch.int32:
        raise ValueError(f"got {[t.dtype for t in tensors]}, {block_tables.dtype}; need bfloat16, tables of int32.")
    if not all(t.is_contiguous() for t in tensors) or block_tables.stride(1) != 1:
        raise ValueError("got a strided q, cache, w_kv_b, out or block table; need contiguous ones.")


@triton.jit
def _row(cu_ptr, starts_ptr, s):
    """First token, first position and end of row s; no positions if it has no tokens."""
    first = tl.load(cu_ptr + s)
    length = tl.load(cu_ptr + s + 1) - first
    start = tl.load(starts_ptr + s)
    end = tl.where(length > 0, start + length, 0)
    start = tl.where(length > 0, start, 0)
    return first, start, end


@triton.jit
def _find(i, cu_ptr, starts_ptr, num_rows):
    """Of the i-th tiles: tile of the row's positions (-1: there is none), first token, start, end, first key block."""
    tile = tl.zeros_like(i) - 1
    token = tl.zeros_like(i)
    begin = tl.zeros_like(i)
    stop = tl.zeros_like(i)
    base = tl.zeros_like(i)
    tiles = 0
    blocks = 0
    for s in range(num_rows):
        first, start, end = _row(cu_ptr, starts_ptr, s)
        low = start // 128
        high = (end + 127) // 128
        here = (i >= tiles) & (i < tiles + high - low)
        tile = tl.where(here, i - tiles + low, tile)
        token = tl.where(here, first, token)
        begin = tl.where(here, start, begin)
        stop = tl.where(here, end, stop)
        base = tl.where(here, blocks, base)
        tiles += high - low
        blocks += high
    return tile, token, begin, stop, base


@triton.jit
def _piece(tile, base, first_block, piece_blocks):
    """Key blocks of the tile in the piece: first and number."""
    low = tl.maximum(base, first_block)
    high = tl.minimum(base + tile + 1, first_block + piece_blocks)
    return low, tl.where(tile >= 0, tl.maximum(high - low, 0), 0)


@triton.jit(do_not_specialize=["num_items", "piece_blocks"])
def _plan_items_kernel(
    cu_ptr, starts_ptr, items_ptr, num_items_ptr, num_rows_ptr, num_items, piece_blocks, WIDTH: tl.constexpr
):  # fmt: skip
    """A program ranks 32 tiles of one piece by their number of blocks, then by their order."""
    piece = tl.program_id(0)
    num_rows = tl.load(num_rows_ptr)
    first_block = piece * piece_blocks
    every = tl.arange(0, WIDTH)
    tile, token, begin, stop, base = _find(every, cu_ptr, starts_ptr, num_rows)
    _, cost = _piece(tile, base, first_block, piece_blocks)
    mine = tl.program_id(1) * _ITEM_TILE + tl.arange(0, _ITEM_TILE)
    tile, token, begin, stop, base = _find(mine, cu_ptr, starts_ptr, num_rows)
    low, count = _piece(tile, base, first_block, piece_blocks)
    before = (cost[None, :] > count[:, None]) | ((cost[None, :] == count[:, None]) & (every[None, :] < mine[:, None]))
    rank = tl.sum(before.to(tl.int32), 1)
    here = count > 0
    entry = items_ptr + (piece * num_items + rank) * _ITEM
    tl.store(entry, token + tile * 128 - begin, mask=here)
    tl.store(entry + 1, tl.maximum(begin - tile * 128, 0), mask=here)
    tl.store(entry + 2, tl.minimum(stop - tile * 128, 128), mask=here)
    tl.store(entry + 3, (low - first_block) * 128, mask=here)
    tl.store(entry + 4, count, mask=here)
    tl.store(entry + 5, (low == base).to(tl.int32), mask=here)
    tl.store(entry + 6, (low + count == base + tile + 1).to(tl.int32), mask=here)
    if tl.program_id(1) == 0:
        tl.store(num_items_ptr + piece, tl.sum((cost > 0).to(tl.int32), 0))


@triton.jit(do_not_specialize=["num_blocks"])
def _plan_blocks_kernel(cu_ptr, starts_ptr, blocks_ptr, num_used_ptr, num_rows_ptr, num_blocks):
    """Of each key block: whose, from which position on, how many keys; and how many blocks there are."""
    i = tl.program_id(0) * 128 + tl.arange(0, 128)
    row = tl.zeros_like(i) - 1
    position = tl.zeros_like(i)
    count = tl.zeros_like(i)
    blocks = 0
    for s in range(tl.load(num_rows_ptr)):
        _, _, end = _row(cu_ptr, starts_ptr, s)
        high = (end + 127) // 128
        here = (i >= blocks) & (i < blocks + high)
        row = tl.where(here, s, row)
        position = tl.where(here, (i - blocks) * 128, position)
        count = tl.where(here, tl.minimum(end - (i - blocks) * 128, 128), count)
        blocks += high
    used = i < num_blocks
    tl.store(blocks_ptr + i * 4, row, mask=used)
    tl.store(blocks_ptr + i * 4 + 1, position, mask=used)
    tl.store(blocks_ptr + i * 4 + 2, count, mask=used)
    if tl.program_id(0) == 0:
        tl.store(num_used_ptr, blocks)


@triton.jit(do_not_specialize=["first_block", "table_stride"], do_not_specialize_on_alignment=["counter_ptr"])
def _gather_keys_kernel(
    cache_ptr, tables_ptr, table_stride, blocks_ptr, keys_ptr, counter_ptr, first_block, PAGE: tl.constexpr
):  # fmt: skip
    """16 rows of latents and rope keys; what a block has beyond its keys is zero, so that 0 * value is 0."""
    PARTS: tl.constexpr = 128 // _GATHER_ROWS
    if tl.program_id(0) == 0:
        tl.store(counter_ptr, 0)  # of the attention that follows
    block = tl.program_id(0) // PARTS
    entry = blocks_ptr + (first_block + block) * 4
    row = tl.load(entry)
    if row >= 0:
        offset = (tl.program_id(0) % PARTS) * _GATHER_ROWS + tl.arange(0, _GATHER_ROWS)
        used = offset < tl.load(entry + 2)
        position = tl.load(entry + 1) + offset
        page = tl.load(tables_ptr + row.to(tl.int64) * table_stride + position // PAGE, mask=used, other=0)
        source = cache_ptr + (page.to(tl.int64) * PAGE + position % PAGE)[:, None] * 576
        target = keys_ptr + (block * 128 + offset)[:, None] * 576
        latent = tl.arange(0, 512)[None, :]
        tl.store(target + latent, tl.load(source + latent, mask=used[:, None], other=0.0))
        rope = 512 + tl.arange(0, 64)[None, :]
        tl.store(target + rope, tl.load(source + rope, mask=used[:, None], other=0.0))


@triton.jit(do_not_specialize=["first_block", "piece_blocks", "num_heads"])
def _expand_keys_kernel(keys_desc, weight_desc, out_desc, num_blocks_ptr, first_block, piece_blocks, num_heads):
    """Persistent over tiles of 128 keys of one head: [128, 512] @ [512, 256], fp32 sums. Keys of the blocks in use."""
    num_blocks = tl.minimum(tl.maximum(tl.load(num_blocks_ptr) - first_block, 0), piece_blocks)
    for tile in tl.range(tl.program_id(0), num_blocks * num_heads, tl.num_programs(0), flatten=True):
        group = tile // (_EXPAND_GROUP * num_heads) * _EXPAND_GROUP
        size = tl.minimum(num_blocks - group, _EXPAND_GROUP)
        inside = tile - group * num_heads
        row = (group + inside % size) * 128
        column = inside // size * 256
        total = tl.zeros((128, 256), tl.float32)
        for k in range(0, 512, _EXPAND_K):
            weight = weight_desc.load([column, k])
            total = tl.dot(keys_desc.load([row, k]), weight.T, total)
        out_desc.store([row, column], total.to(tl.bfloat16))


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
def _store_out(out_ptr, acc, row, low, high, head, first_row, H: gl.constexpr):
    # 8 values a thread, so that a warp writes 64 bytes of each of 8 rows: the accumulator's layout has 2 values.
    wide: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 128],
    )
    rows = gl.arange(0, 64, gl.SliceLayout(1, wide)) + first_row
    columns = gl.arange(0, 128, gl.SliceLayout(0, wide))
    target = out_ptr + ((row + rows).to(gl.int64) * H + head)[:, None] * 128 + columns[None, :]
    used = (rows >= low) & (rows < high)
    gl.store(target, gl.convert_layout(acc.to(gl.bfloat16), wide), mask=used[:, None])


@gluon.jit
def _attend_partition(
    q_nope, q_rope, k_nope, k_rope, v, units, q_full, q_empty, k_full, k_empty, v_full, v_empty, unit_full, unit_empty,
    items_ptr, num_items_ptr, sums_ptr, maxima_ptr, out_ptr, scale_log2, H: gl.constexpr, SIDE: gl.constexpr
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
            _store_out(out_ptr, acc * (1.0 / total)[:, None], row, low, high, head, FIRST, H)
        else:
            gl.store(maxima_ptr + token * 2, m, mask=used)
            gl.store(maxima_ptr + token * 2 + 1, total, mask=used)
            gl.store(sums_ptr + token[:, None] * 128 + columns[None, :], acc, mask=used[:, None])


@gluon.jit(do_not_specialize_on_alignment=["num_items_ptr", "counter_ptr"])
def _attend_kernel(
    q_desc, q_rope_desc, kv_desc, rope_desc, items_ptr, num_items_ptr, counter_ptr, sums_ptr, maxima_ptr, out_ptr,
    scale_log2, H: gl.constexpr
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
            v_empty, unit_full, unit_empty, items_ptr, num_items_ptr, sums_ptr, maxima_ptr, out_ptr, scale_log2, H,
            gl.constexpr(0))),
        (_attend_partition, (
            q_nope.index(1), q_rope.index(1), k_nope, k_rope, v, units, q_full, q_empty, k_full, k_empty, v_full,
            v_empty, unit_full, unit_empty, items_ptr, num_items_ptr, sums_ptr, maxima_ptr, out_ptr, scale_log2, H,
            gl.constexpr(1))),
        (_load_partition, (
            q_desc, q_rope_desc, kv_desc, rope_desc, q_nope, q_rope, k_nope, k_rope, v, units, q_full, q_empty, k_full,
            k_empty, v_full, v_empty, unit_full, unit_empty, items_ptr, num_items_ptr, counter_ptr, H)),
    ], [4, 1], [232, 40])  # fmt: skip
