"""RDEP transport on GPUs: one-sided stores into the peers' memory, fixed slots, flags between devices.

Every rank owns one arena of plain device memory, laid out alike (`RdepLayout`); the kernels take all arenas' addresses
as an int64 tensor and write to peers directly. slot = src * T_cap + token, as in rdep.py.

    dispatch   each of my tokens -> every rank it visits: the row, its scales, local expert ids, weights;
               to the ranks it does not visit, and for rows that are padding: ids = -1 only
    (barrier)
    give_back  each slot of mine that has an expert: sum over its choices of weight * expert row, in fp32 and in order
               of the choices -> one row to its source
    (barrier)
    combine    each of my tokens: the rows of the ranks it visited, in rank order, in fp32, + the shared expert's row

`slots[r]` is the source index that my tokens have at rank r and my results at source r: my own rank everywhere. In
loopback (one GPU stands for a rank of W) all addresses are my own and slots = 0 .. W - 1: the same bytes and rows as a
balanced rank, in memory of one's own.

The number of tokens is on the device (the grid covers the bucket), no kernel depends on the batch in its launch, and
nothing here waits for the host: all of it replays in a graph. The barrier's epoch is in the arena, so a replay knows
where it is. Flags are compared by difference, so a wrap of int32 is nothing.

A barrier's wait is bounded by `max_spins` polls. Past that it writes 1 + the rank it missed into the error word of
every rank and returns; where the error word is set, no barrier waits any more, so that a graph with many barriers ends
within one bound. The host reads the word with the step's ids; an arena with an error is never used again.

Beside another kernel: NVLink is busy for longer than it takes to send from all SMs, so dispatch and give_back may run
beside the kernel ahead in the stream, the shared expert's GEMM, whose results they do not read. That kernel leaves SMs
to them and calls `gdc_launch_dependents` behind its own wait; so whatever was launched before it has ended, which is
what they read. They do not wait for it at their start; their last program does at its end, so that whatever waits for
them finds both complete.

Rows travel as 16-byte words, whatever their dtype: row bytes are multiples of 16, sections of the arena of 256.
"""

# A jit function has no types that mypy knows; launchers are typed.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_ALIGN = 256
_COLUMNS = 2048  # of a row, that one program of give_back and combine adds up
_GIVE_BACK_PROGRAMS = 4096  # times the parts of a row
_WORDS = 1024  # int32 words of a row that one program of dispatch copies at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class RdepLayout:
    """What an arena holds, equal on every rank; offsets in bytes."""

    world_size: int
    max_tokens: int  # T_cap
    hidden_size: int
    top_k: int
    num_local: int
    row_dtype: torch.dtype  # of a sent row
    scales_per_row: int  # fp32 scales that go with a row; 0: none
    return_dtype: torch.dtype

    def sections(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        slots = (self.world_size, self.max_tokens)
        return {
            "payload": (self.row_dtype, (*slots, self.hidden_size)),
            "scales": (torch.float32, (*slots, self.scales_per_row)),
            "ids": (torch.int32, (*slots, self.top_k)),
            "weights": (torch.float32, (*slots, self.top_k)),
            "returned": (self.return_dtype, (*slots, self.hidden_size)),
            "flags": (torch.int32, (self.world_size,)),
            "epoch": (torch.int32, (1,)),
            "error": (torch.int32, (1,)),
        }

    def offsets(self) -> dict[str, int]:
        """First byte of each section; `end`: the size of an arena."""
        result, end = {}, 0
        for name, (dtype, shape) in self.sections().items():
            result[name] = end
            end += -(-torch.Size(shape).numel() * dtype.itemsize // _ALIGN) * _ALIGN
        result["end"] = end
        return result

    def views(self, arena: Tensor) -> dict[str, Tensor]:
        """The sections of an arena [offsets()["end"]] uint8 as tensors. A new arena is zeroed, its ids set to -1."""
        offsets = self.offsets()
        result = {}
        for name, (dtype, shape) in self.sections().items():
            num_bytes = torch.Size(shape).numel() * dtype.itemsize
            result[name] = arena[offsets[name] : offsets[name] + num_bytes].view(dtype).view(shape)
        return result


@dataclass(frozen=True, kw_only=True, slots=True)
class RdepPeers:
    """Where everybody's arena is, as one rank sees it."""

    layout: RdepLayout
    arenas: Tensor  # [W] int64 addresses, by rank, my own included; each a multiple of 256
    slots: Tensor  # [W] int32
    own: Tensor  # my arena, uint8


@triton.jit
def _at(base, offset, dtype: tl.constexpr):
    """A typed pointer to a section of an arena; sections are aligned, which the compiler cannot see."""
    return tl.multiple_of((base + offset).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _load(pointer, mask, other):
    """From L2: a kernel that runs beside the one ahead may find older values in an SM's L1."""
    return tl.load(pointer, mask=mask, other=other, cache_modifier=".cg")


@triton.jit
def _last_program_waits():
    """For the kernel ahead, that the end of this one means the end of both."""
    if (tl.program_id(0) == tl.num_programs(0) - 1) & (tl.program_id(1) == tl.num_programs(1) - 1):
        gdc_wait()


@triton.jit
def _dispatch_kernel(  # noqa: PLR0913
    x_ptr,
    scales_ptr,
    topk_ids_ptr,
    topk_weights_ptr,
    num_tokens_ptr,
    arenas_ptr,
    slots_ptr,
    x_stride,
    scales_stride,
    scales_group_stride,
    scales_at,
    ids_at,
    weights_at,
    T_CAP: tl.constexpr,
    WORLD: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    TOP_K: tl.constexpr,
    WORDS: tl.constexpr,  # int32 words of a row
    SCALES: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BESIDE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    word = part * BLOCK_W + tl.arange(0, BLOCK_W)
    k = tl.arange(0, BLOCK_K)
    if not BESIDE:
        gdc_wait()
    gdc_launch_dependents()
    exists = token < _load(num_tokens_ptr, True, 0)
    ids = _load(topk_ids_ptr + token * TOP_K + k, exists & (k < TOP_K), -1)
    row = _load(x_ptr + token * x_stride + word, exists & (word < WORDS), 0)
    is_first = part == 0  # it also sends what goes with the row
    group = tl.arange(0, BLOCK_S)
    weights = _load(topk_weights_ptr + token * TOP_K + k, exists & is_first & (k < TOP_K), 0.0)
    if SCALES > 0:
        in_row = exists & is_first & (group < SCALES)
        scales = _load(scales_ptr + token * scales_stride + group * scales_group_stride, in_row, 0.0)
    for rank in tl.static_range(WORLD):
        local = ids - rank * NUM_LOCAL
        local = tl.where((ids >= 0) & (local >= 0) & (local < NUM_LOCAL), local, -1)
        visits = tl.max(local, axis=0) >= 0
        base = tl.load(arenas_ptr + rank)
        slot = tl.load(slots_ptr + rank).to(tl.int64) * T_CAP + token
        tl.store(_at(base, 0, tl.int32) + slot * WORDS + word, row, mask=visits & (word < WORDS))
        if is_first:
            tl.store(_at(base, ids_at, tl.int32) + slot * TOP_K + k, local, mask=k < TOP_K)
            tl.store(_at(base, weights_at, tl.float32) + slot * TOP_K + k, weights, mask=visits & (k < TOP_K))
            if SCALES > 0:
                to_scales = _at(base, scales_at, tl.float32) + slot * SCALES + group
                tl.store(to_scales, scales, mask=visits & (group < SCALES))
    if BESIDE:
        _last_program_waits()


@triton.jit(do_not_specialize=["num_slots", "step_tokens"])
def _give_back_kernel(  # noqa: PLR0913
    rows_ptr,
    row_idx_ptr,
    window_slots_ptr,
    weights_ptr,
    arenas_ptr,
    slots_ptr,
    returned_at,
    num_slots,
    step_tokens,
    WORLD: tl.constexpr,
    T_CAP: tl.constexpr,
    TOP_K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RETURN: tl.constexpr,
    BESIDE: tl.constexpr,
):
    if not BESIDE:
        gdc_wait()
    gdc_launch_dependents()
    first, end = 0, num_slots
    if window_slots_ptr is not None:
        first, end = _load(window_slots_ptr, True, 0), _load(window_slots_ptr + 1, True, 0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    # In WORLD pieces side by side: slot by slot, all ranks would send to the same source at a time.
    piece = tl.cdiv(end - first, WORLD)
    for nth in range(tl.program_id(0), piece * WORLD, tl.num_programs(0)):
        index = first + nth % WORLD * piece + nth // WORLD
        src = index // step_tokens
        token = index % step_tokens
        choices = (src * T_CAP + token).to(tl.int64) * TOP_K + k
        rows = _load(row_idx_ptr + choices, (k < TOP_K) & (index < end), -1)
        place = tl.cumsum((rows >= 0).to(tl.int32), axis=0)  # of a choice with a row among those: 1, 2, ...
        count = tl.max(place, axis=0)
        if count > 0:
            weights = _load(weights_ptr + choices, rows >= 0, 0.0)
            total = tl.zeros((BLOCK_D,), dtype=tl.float32)
            for first_place in range(1, count + 1, 2):  # two rows on their way at a time, added in the choices' order
                is_one = (rows >= 0) & (place == first_place)
                is_other = (rows >= 0) & (place == first_place + 1)
                one = rows_ptr + tl.sum(tl.where(is_one, rows, 0), axis=0).to(tl.int64) * D + column
                other = rows_ptr + tl.sum(tl.where(is_other, rows, 0), axis=0).to(tl.int64) * D + column
                x = _load(one, column < D, 0.0)
                y = _load(other, (column < D) & (first_place < count), 0.0)
                total += tl.sum(tl.where(is_one, weights, 0.0), axis=0) * x.to(tl.float32)
                total += tl.sum(tl.where(is_other, weights, 0.0), axis=0) * y.to(tl.float32)
            base = tl.load(arenas_ptr + src)
            out = (tl.load(slots_ptr + src).to(tl.int64) * T_CAP + token) * D + column
            tl.store(_at(base, returned_at, RETURN) + out, total.to(RETURN), mask=column < D)
    if BESIDE:
        _last_program_waits()


@triton.jit
def _combine_kernel(  # noqa: PLR0913
    returned_ptr,
    topk_ids_ptr,
    shared_ptr,
    out_ptr,
    num_tokens_ptr,
    T_CAP: tl.constexpr,
    WORLD: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    TOP_K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    gdc_wait()
    gdc_launch_dependents()
    if token < tl.load(num_tokens_ptr):
        ids = tl.load(topk_ids_ptr + token * TOP_K + k, mask=k < TOP_K, other=-1)
        total = tl.zeros((BLOCK_D,), dtype=tl.float32)
        for rank in tl.static_range(WORLD):
            here = (ids >= rank * NUM_LOCAL) & (ids < (rank + 1) * NUM_LOCAL)
            visited = tl.max(here.to(tl.int32), axis=0) > 0
            row = returned_ptr + (rank * T_CAP + token) * D + column
            total += tl.load(row, mask=visited & (column < D), other=0.0).to(tl.float32)
        if shared_ptr is not None:
            total += tl.load(shared_ptr + token * D + column, mask=column < D, other=0.0).to(tl.float32)
        tl.store(out_ptr + token * D + column, total.to(out_ptr.dtype.element_ty), mask=column < D)


@triton.jit
def _flags(pointers):
    """An atomic addition of 0 reads the same and takes 0.1 us longer."""
    return tl.inline_asm_elementwise(
        "ld.acquire.sys.global.b32 $0, [$1];", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _barrier_kernel(  # noqa: PLR0913
    arenas_ptr, slots_ptr, own_ptr, flags_at, epoch_at, error_at, max_spins, WORLD: tl.constexpr, BLOCK_R: tl.constexpr
):
    gdc_wait()
    gdc_launch_dependents()
    rank = tl.arange(0, BLOCK_R)
    is_rank = rank < WORLD
    own = own_ptr.to(tl.int64)
    error = _at(own, error_at, tl.int32)
    epoch_ptr = _at(own, epoch_at, tl.int32)
    epoch = tl.load(epoch_ptr) + 1
    tl.store(epoch_ptr, epoch)
    base = tl.load(arenas_ptr + rank, mask=is_rank, other=0)
    slot = tl.load(slots_ptr + rank, mask=is_rank, other=0)
    theirs = (base + flags_at).to(tl.pointer_type(tl.int32)) + slot
    tl.atomic_xchg(theirs, epoch, mask=is_rank, sem="release", scope="sys")
    mine = (own + flags_at).to(tl.pointer_type(tl.int32)) + tl.minimum(rank, WORLD - 1)
    num_spins = tl.where(tl.load(error) != 0, max_spins, 0)
    num_missing = 1
    while (num_missing > 0) & (num_spins < max_spins):
        seen = _flags(mine)
        late = is_rank & (seen - epoch < 0)
        num_missing = tl.sum(late.to(tl.int32), axis=0)
        num_spins += 1
    if num_missing > 0:
        seen = _flags(mine)
        late = is_rank & (seen - epoch < 0)
        first = tl.min(tl.where(late, rank, WORLD - 1), axis=0)
        words = (base + error_at).to(tl.pointer_type(tl.int32))
        tl.atomic_max(words, tl.zeros_like(rank) + 1 + first, mask=is_rank, sem="relaxed", scope="sys")


def rdep_dispatch(
    peers: RdepPeers, x: Tensor, scales: Tensor | None, topk_ids: Tensor, topk_weights: Tensor, num_tokens: Tensor,
    *, beside: bool = False,
) -> None:  # fmt: skip
    """x [T, D] in the row dtype, scales [T, D / 128] fp32, topk_ids [T, K] int32 global, topk_weights [T, K] fp32.

    T is the step's bucket, the same on every rank; num_tokens [1] int32 on the device: rows from there on are padding.
    beside: the kernel ahead in the stream lets this one start; see the module.
    """
    layout, offsets = peers.layout, peers.layout.offsets()
    num_rows = x.shape[0]
    _check_step(layout, x, topk_ids, topk_weights)
    if x.dtype != layout.row_dtype or (scales is not None) != (layout.scales_per_row > 0):
        raise ValueError(
            f"got rows {x.dtype}, scales {'given' if scales is not None else 'none'}; the arena holds "
            f"{layout.row_dtype} with {layout.scales_per_row} scales a row."
        )
    words = x.view(torch.int32)
    if num_rows == 0:
        return
    _dispatch_kernel[(num_rows, triton.cdiv(words.shape[1], _WORDS))](
        words, scales, topk_ids, topk_weights, num_tokens, peers.arenas, peers.slots, words.stride(0),
        *((0, 0) if scales is None else scales.stride()), offsets["scales"], offsets["ids"], offsets["weights"],
        layout.max_tokens, layout.world_size, layout.num_local, layout.top_k, words.shape[1], layout.scales_per_row,
        _WORDS, triton.next_power_of_2(max(1, layout.scales_per_row)), triton.next_power_of_2(layout.top_k), beside,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip


def rdep_give_back(
    peers: RdepPeers, rows: Tensor, row_idx: Tensor, step_tokens: int, window_slots: Tensor | None = None,
    *, beside: bool = False,
) -> None:  # fmt: skip
    """rows [X, D], row_idx [W, T_cap, K] int32: the row of each choice of each slot, -1 = not one of mine.

    Slots from step_tokens on are not looked at. window_slots [2] int32 on the device: only slots [first, end) of the
    W * step_tokens, in the order (source, token). Weights are those that were dispatched to this rank. beside: as in
    dispatch.
    """
    layout, offsets = peers.layout, peers.layout.offsets()
    if rows.shape[1:] != (layout.hidden_size,) or not rows.is_contiguous() or not step_tokens <= layout.max_tokens:
        raise ValueError(f"got rows {tuple(rows.shape)}, a step of {step_tokens}; need [X, {layout.hidden_size}] "
                         f"contiguous and at most {layout.max_tokens}.")  # fmt: skip
    if row_idx.shape != (layout.world_size, layout.max_tokens, layout.top_k) or row_idx.dtype != torch.int32:
        raise ValueError(f"got row_idx {tuple(row_idx.shape)} {row_idx.dtype}; need [W, T_cap, K] int32.")
    if step_tokens == 0:
        return
    num_slots = layout.world_size * step_tokens
    grid = (min(num_slots, _GIVE_BACK_PROGRAMS), triton.cdiv(layout.hidden_size, _COLUMNS))
    _give_back_kernel[grid](
        rows, row_idx, window_slots, layout.views(peers.own)["weights"], peers.arenas, peers.slots,
        offsets["returned"], num_slots, step_tokens, layout.world_size, layout.max_tokens, layout.top_k,
        layout.hidden_size, _COLUMNS, triton.next_power_of_2(layout.top_k), _TRITON_DTYPES[layout.return_dtype], beside,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip


def rdep_combine(peers: RdepPeers, topk_ids: Tensor, num_tokens: Tensor, shared: Tensor | None, out: Tensor) -> None:
    """topk_ids [T, K] int32 as dispatched, shared [T, D] or None -> out [T, D]; rows of padding are left alone."""
    layout = peers.layout
    _check_step(layout, out, topk_ids, topk_ids)
    if not out.is_contiguous() or (shared is not None and (shared.shape != out.shape or not shared.is_contiguous())):
        raise ValueError("need contiguous [T, D] of out and shared.")
    if out.shape[0] == 0:
        return
    _combine_kernel[(out.shape[0], triton.cdiv(layout.hidden_size, _COLUMNS))](
        layout.views(peers.own)["returned"], topk_ids, shared, out, num_tokens, layout.max_tokens, layout.world_size,
        layout.num_local, layout.top_k, layout.hidden_size, _COLUMNS, triton.next_power_of_2(layout.top_k),
        num_warps=4 if out.shape[0] >= 128 else 8, launch_pdl=True,
    )  # fmt: skip


def rdep_barrier(peers: RdepPeers, max_spins: int) -> None:
    """Every store of every rank before its barrier is visible to every rank after it. See the module for the bound."""
    layout, offsets = peers.layout, peers.layout.offsets()
    _barrier_kernel[(1,)](
        peers.arenas, peers.slots, peers.own, offsets["flags"], offsets["epoch"], offsets["error"], max_spins,
        layout.world_size, triton.next_power_of_2(layout.world_size), num_warps=1, launch_pdl=True,
    )  # fmt: skip


_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _check_step(layout: RdepLayout, rows: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> None:
    num_tokens = rows.shape[0]
    choices = (num_tokens, layout.top_k)
    if rows.shape[1] != layout.hidden_size or num_tokens > layout.max_tokens or rows.stride(1) != 1:
        raise ValueError(
            f"got rows {tuple(rows.shape)}; the arena takes at most {layout.max_tokens} contiguous rows of "
            f"{layout.hidden_size}."
        )
    if topk_ids.shape != choices or topk_weights.shape != choices or topk_ids.dtype != torch.int32:
        raise ValueError(
            f"got ids {tuple(topk_ids.shape)} {topk_ids.dtype}, weights {tuple(topk_weights.shape)}; "
            f"need {choices}, int32 ids."
        )
    if not (topk_ids.is_contiguous() and topk_weights.is_contiguous()):
        raise ValueError("need contiguous ids and weights.")
