"""From received choices to rows sorted by expert: which row goes where, the tiles of the expert GEMMs, and the copy.

    expert_row_index     ids [W, T_cap, K] of the received slots -> row_idx [W, T_cap, K], window_slots, tiles
    gather_expert_rows   payload and scales of the slots -> x [R, D] and x_scales [D / 128, R] in that order

Rows are sorted by expert and, within one, by slot and choice: the order is that of the ids, not of timing. An expert's
rows begin at a multiple of 16 (the GEMMs' TMA loads of scales); the rows between are never written nor read for a
result. Slots of a source from step_tokens on are not looked at, an id of -1 is no choice.

Windows bound the memory, for buffers for all choices that could arrive are many times those that do. The slots are cut
into V windows of at most `window_rows` choices and one chunk more, by the counts on the device; each window is one pass
of gather, GEMMs and give_back over the same buffers. A slot's choices are all in one window, whose slots are neighbours
(in the order source, token): from window_slots[v, 0] to before window_slots[v, 1]. A window without rows costs its
launches, which find nothing to do. V * window_rows >= W * step_tokens * K always.

Worked example, 2 experts, K = 2, tile 128:  ids [[[0, 1], [1, -1], [-1, -1]]]
    row_idx [[[0, 16], [17, -1], [-1, -1]]]   tiles [[[0, 0, 0, 1], [1, 1, 16, 18]]]   num_tiles [2]

A tile is (expert, the expert's first tile, its first row, the row past its last): 128 rows each. int32 throughout, row
offsets int64. Grids: one program a chunk of slots, then one a chunk and a window; gather: one a slot, up to 4,096. All
of it replays in a graph; step_tokens is the bucket, as in rdep_gpu.py.
"""

# A jit function has no types that mypy knows; launchers are typed.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

TILE_ROWS = 128
ROW_ALIGN = 16
_BLOCK = 128  # choices that are placed at a time: by comparing each with each, for a scan is slower
_CHUNKS = 512  # wanted for many choices: every program reads the counts of all
_MAX_CHUNK = 2048  # choices, padded ones included, that one program counts and places, at most
_MAX_CHUNKS = 512
_GATHER_PROGRAMS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertRows:
    """Where each choice's row is; one for all layers in turn, used by one stream."""

    window_rows: int
    counts: Tensor  # [chunks, E] int32
    row_idx: Tensor  # [W, T_cap, K] int32, -1: no row
    window_slots: Tensor  # [V, 2] int32: first slot, and the one behind the last, of the W * step_tokens of a step
    tiles: Tensor  # [V, tiles, 4] int32
    num_tiles: Tensor  # [V] int32
    totals: Tensor  # [E] int64: rows of each expert since the buffers were made, for the metrics

    @property
    def num_windows(self) -> int:
        return self.tiles.shape[0]

    def slots_of(self, window: int) -> Tensor | None:
        """[2] int32; None: all of them."""
        return self.window_slots[window] if self.num_windows > 1 else None

    def part(self, num_windows: int) -> ExpertRows:
        """For steps that need fewer windows."""
        return replace(
            self,
            window_slots=self.window_slots[:num_windows],
            tiles=self.tiles[:num_windows],
            num_tiles=self.num_tiles[:num_windows],
        )


def num_expert_rows(window_rows: int, num_experts: int) -> int:
    """Rows R that buffers of one window must hold."""
    return -(-(window_rows + _MAX_CHUNK + num_experts * ROW_ALIGN) // TILE_ROWS) * TILE_ROWS


def expert_rows(ids: Tensor, num_experts: int, window_rows: int) -> ExpertRows:
    """Buffers for received ids [W, T_cap, K]; window_rows: choices a window holds at most, 0 for all in one."""
    world_size, max_tokens, top_k = ids.shape
    most = world_size * max_tokens * top_k
    window_rows = window_rows or most
    num_windows = -(-most // window_rows)
    chunk, num_chunks = _chunks(world_size * max_tokens, top_k)
    if num_chunks > _MAX_CHUNKS:
        raise ValueError(
            f"got {world_size} x {max_tokens} slots of {top_k} choices, {num_chunks} chunks of {chunk}; at most "
            f"{_MAX_CHUNKS}. Lower the tokens of a step."
        )
    num_tiles = num_expert_rows(window_rows, num_experts) // TILE_ROWS + num_experts

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=ids.device)

    return ExpertRows(
        window_rows=window_rows, counts=empty(_MAX_CHUNKS, num_experts), row_idx=empty(*ids.shape),
        window_slots=empty(num_windows, 2), tiles=empty(num_windows, num_tiles, 4), num_tiles=empty(num_windows),
        totals=torch.zeros(num_experts, dtype=torch.int64, device=ids.device),
    )  # fmt: skip


@triton.jit
def _block_ids(
    ids_ptr, block, num_slots, step_tokens, T_CAP: tl.constexpr, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The ids of a block of slots, -1 where there is none, with their places in [W, T_cap, K]."""
    choice = block * BLOCK + tl.arange(0, BLOCK)
    slot = choice // BLOCK_K
    k = choice % BLOCK_K
    at = (slot // step_tokens * T_CAP + slot % step_tokens) * TOP_K + k
    exists = (slot < num_slots) & (k < TOP_K)
    return tl.load(ids_ptr + at, mask=exists, other=-1), at, exists


@triton.jit(do_not_specialize=["num_slots", "step_tokens"])
def _count_kernel(  # noqa: PLR0913
    ids_ptr, counts_ptr, num_slots, step_tokens, T_CAP: tl.constexpr, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    counts = tl.zeros((BLOCK_E,), dtype=tl.int32)
    gdc_wait()
    gdc_launch_dependents()
    for block in range(chunk * (CHUNK // BLOCK), (chunk + 1) * (CHUNK // BLOCK)):
        ids, _at, _exists = _block_ids(ids_ptr, block, num_slots, step_tokens, T_CAP, TOP_K, BLOCK_K, BLOCK)
        counts += tl.sum((ids[:, None] == expert[None, :]).to(tl.int32), axis=0)
    tl.store(counts_ptr + chunk * NUM_EXPERTS + expert, counts, mask=expert < NUM_EXPERTS)


@triton.jit(do_not_specialize=["num_slots", "step_tokens", "num_chunks", "window_rows", "max_tiles"])
def _place_kernel(  # noqa: PLR0913
    ids_ptr, counts_ptr, row_idx_ptr, window_slots_ptr, tiles_ptr, num_tiles_ptr, totals_ptr, num_slots, step_tokens,
    num_chunks, window_rows, max_tiles, ONE_WINDOW: tl.constexpr, T_CAP: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr, TILE_ROWS: tl.constexpr, ROW_ALIGN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    chunk = tl.arange(0, BLOCK_C)
    exists = (chunk < num_chunks)[:, None] & (expert < NUM_EXPERTS)[None, :]
    gdc_wait()
    gdc_launch_dependents()
    counts = tl.load(counts_ptr + chunk[:, None] * NUM_EXPERTS + expert[None, :], mask=exists, other=0)
    mine = program - num_chunks  # the window
    if not ONE_WINDOW:
        in_chunk = tl.sum(counts, axis=1)
        window = (tl.cumsum(in_chunk, axis=0) - in_chunk) // window_rows
        if program < num_chunks:
            mine = tl.sum(tl.where(chunk == program, window, 0), axis=0)
        else:
            inside = (window == mine) & (in_chunk > 0)
            end = tl.max(tl.where(inside, chunk + 1, 0), axis=0)
            first_chunk = tl.min(tl.where(inside, chunk, end), axis=0)
            tl.store(window_slots_ptr + mine * 2, first_chunk * (CHUNK // BLOCK_K))
            tl.store(window_slots_ptr + mine * 2 + 1, tl.minimum(end * (CHUNK // BLOCK_K), num_slots))
        counts = tl.where((window == mine)[:, None], counts, 0)
    total = tl.sum(counts, axis=0)
    padded = (total + ROW_ALIGN - 1) // ROW_ALIGN * ROW_ALIGN
    begin = tl.cumsum(padded, axis=0) - padded
    if program < num_chunks:
        first = begin + tl.sum(tl.where((chunk < program)[:, None], counts, 0), axis=0)
        i = tl.arange(0, BLOCK)
        earlier = i[None, :] < i[:, None]
        for block in range(program * (CHUNK // BLOCK), (program + 1) * (CHUNK // BLOCK)):
            ids, at, is_choice = _block_ids(ids_ptr, block, num_slots, step_tokens, T_CAP, TOP_K, BLOCK_K, BLOCK)
            rank = tl.sum((earlier & (ids[None, :] == ids[:, None])).to(tl.int32), axis=1)
            chosen = ids[:, None] == expert[None, :]
            row = rank + tl.sum(tl.where(chosen, first[None, :], 0), axis=1)
            row = tl.where((ids >= 0) & (ids < NUM_EXPERTS), row, -1)
            tl.store(row_idx_ptr + at, row, mask=is_choice)
            if CHUNK > BLOCK:
                first += tl.sum(chosen.to(tl.int32), axis=0)
    else:
        tiles = (total + TILE_ROWS - 1) // TILE_ROWS
        past = tl.cumsum(tiles, axis=0)
        num_tiles = tl.sum(tiles, axis=0)
        tl.store(num_tiles_ptr + mine, num_tiles)
        tl.atomic_add(totals_ptr + expert, total.to(tl.int64), mask=total > 0, sem="relaxed")
        for start in range(0, num_tiles, 64):
            tile = start + tl.arange(0, 64)
            owner = tl.sum((past[None, :] <= tile[:, None]).to(tl.int32), axis=1)
            is_owner = owner[:, None] == expert[None, :]
            to = tiles_ptr + (mine * max_tiles + tile) * 4
            is_tile = tile < num_tiles
            tl.store(to, owner, mask=is_tile)
            tl.store(to + 1, tl.sum(tl.where(is_owner, (past - tiles)[None, :], 0), axis=1), mask=is_tile)
            tl.store(to + 2, tl.sum(tl.where(is_owner, begin[None, :], 0), axis=1), mask=is_tile)
            tl.store(to + 3, tl.sum(tl.where(is_owner, (begin + total)[None, :], 0), axis=1), mask=is_tile)


@triton.jit(do_not_specialize=["num_slots", "step_tokens", "to_scales_stride"])
def _gather_kernel(  # noqa: PLR0913
    row_idx_ptr, window_slots_ptr, x_ptr, scales_ptr, to_x_ptr, to_scales_ptr, num_slots, step_tokens, to_scales_stride,
    T_CAP: tl.constexpr, TOP_K: tl.constexpr, WORDS: tl.constexpr, SCALES: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    gdc_wait()
    gdc_launch_dependents()
    first, end = 0, num_slots
    if window_slots_ptr is not None:
        first, end = tl.load(window_slots_ptr), tl.load(window_slots_ptr + 1)
    k = tl.arange(0, BLOCK_K)
    word = tl.arange(0, BLOCK_W)
    group = tl.arange(0, BLOCK_S)
    for index in range(first + tl.program_id(0), end, tl.num_programs(0)):
        slot = (index // step_tokens * T_CAP + index % step_tokens).to(tl.int64)
        rows = tl.load(row_idx_ptr + slot * TOP_K + k, mask=k < TOP_K, other=-1)
        place = tl.cumsum((rows >= 0).to(tl.int32), axis=0)  # of a choice with a row among those: 1, 2, ...
        count = tl.max(place, axis=0)
        if count > 0:
            x = tl.load(x_ptr + slot * WORDS + word, mask=word < WORDS)
            scales = tl.load(scales_ptr + slot * SCALES + group, mask=group < SCALES)
            for choice in range(1, count + 1):
                row = tl.sum(tl.where((rows >= 0) & (place == choice), rows, 0), axis=0).to(tl.int64)
                tl.store(to_x_ptr + row * WORDS + word, x, mask=word < WORDS)
                to_scales = to_scales_ptr + group * to_scales_stride.to(tl.int64) + row
                tl.store(to_scales, scales, mask=group < SCALES)


def expert_row_index(rows: ExpertRows, ids: Tensor, num_experts: int, step_tokens: int) -> None:
    """ids [W, T_cap, K] int32 local to this rank -> all of `rows`; step_tokens >= 1, the bucket."""
    world_size, max_tokens, top_k = ids.shape
    if rows.row_idx.shape != ids.shape or rows.counts.shape[1] != num_experts or not ids.is_contiguous():
        raise ValueError(
            f"got ids {tuple(ids.shape)} of {num_experts} experts; these rows are for contiguous "
            f"{tuple(rows.row_idx.shape)} of {rows.counts.shape[1]}."
        )
    if rows.num_windows * rows.window_rows < world_size * step_tokens * top_k:
        raise ValueError(
            f"got {rows.num_windows} windows of {rows.window_rows} rows for {world_size * step_tokens} slots of "
            f"{top_k} choices; all of them must fit."
        )
    if ids.dtype != torch.int32 or not 1 <= step_tokens <= max_tokens:
        raise ValueError(f"got {ids.dtype} ids, a step of {step_tokens}; need int32 and 1 to {max_tokens}.")
    num_slots = world_size * step_tokens
    chunk, num_chunks = _chunks(num_slots, top_k)
    block_k, block_e = triton.next_power_of_2(top_k), max(16, triton.next_power_of_2(num_experts))
    _count_kernel[(num_chunks,)](
        ids, rows.counts, num_slots, step_tokens, max_tokens, top_k, block_k, chunk, _BLOCK, num_experts, block_e,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip
    _place_kernel[(num_chunks + rows.num_windows,)](
        ids, rows.counts, rows.row_idx, rows.window_slots, rows.tiles, rows.num_tiles, rows.totals, num_slots,
        step_tokens, num_chunks, rows.window_rows, rows.tiles.shape[1], rows.num_windows == 1, max_tokens, top_k,
        block_k, chunk, _BLOCK, num_experts, block_e, max(16, triton.next_power_of_2(num_chunks)), TILE_ROWS, ROW_ALIGN,
        num_warps=8, launch_pdl=True,
    )  # fmt: skip


def _chunks(num_slots: int, top_k: int) -> tuple[int, int]:
    """Choices of a chunk, and how many chunks there are."""
    choices = num_slots * triton.next_power_of_2(top_k)
    chunk = min(max(triton.next_power_of_2(-(-choices // _CHUNKS)), _BLOCK), _MAX_CHUNK)
    return chunk, -(-choices // chunk)


def gather_expert_rows(
    rows: ExpertRows, window: int, payload: Tensor, scales: Tensor, x: Tensor, x_scales: Tensor, step_tokens: int
) -> None:
    """payload [W, T_cap, D] e4m3, scales [W, T_cap, D / 128] fp32 -> x [R, D], x_scales [D / 128, R] of one window."""
    world_size, max_tokens, top_k = rows.row_idx.shape
    slots, d = (world_size, max_tokens), payload.shape[-1]
    most = num_expert_rows(rows.window_rows, rows.counts.shape[1])
    if payload.shape[:2] != slots or scales.shape != (*slots, d // 128) or d % 128:
        raise ValueError(
            f"got payload {tuple(payload.shape)}, scales {tuple(scales.shape)}; need {(*slots, 'D')} and D / 128 "
            "scales a row."
        )
    if x.shape[0] < most or x.shape[1] != d or x_scales.shape[0] != d // 128 or x_scales.shape[1] < most:
        raise ValueError(f"got x {tuple(x.shape)}, x_scales {tuple(x_scales.shape)}; need at least {most} rows.")
    if not (payload.is_contiguous() and scales.is_contiguous() and x.is_contiguous() and x_scales.stride(1) == 1):
        raise ValueError("need contiguous payload, scales, x and contiguous rows of x_scales.")
    words, num_slots = d // 4, world_size * step_tokens
    _gather_kernel[(min(num_slots, _GATHER_PROGRAMS),)](
        rows.row_idx, rows.slots_of(window), payload.view(torch.int32), scales, x.view(torch.int32), x_scales,
        num_slots, step_tokens, x_scales.stride(0), max_tokens, top_k, words, d // 128, triton.next_power_of_2(words),
        triton.next_power_of_2(d // 128), triton.next_power_of_2(top_k), num_warps=4, launch_pdl=True,
    )  # fmt: skip


def expert_row_index_reference(ids: Tensor, num_experts: int, step_tokens: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """All choices in one window: row_idx [W, T_cap, K] (-1 from step_tokens on) and each expert's rows [begin, end)."""
    row_idx = torch.full_like(ids, -1)
    spans = []
    begin = 0
    for expert in range(num_experts):
        chosen = (ids[:, :step_tokens] == expert).nonzero(as_tuple=True)
        count = chosen[0].shape[0]
        row_idx[chosen] = torch.arange(begin, begin + count, dtype=ids.dtype, device=ids.device)
        spans.append((begin, begin + count))
        begin += -(-count // ROW_ALIGN) * ROW_ALIGN
    return row_idx, spans
