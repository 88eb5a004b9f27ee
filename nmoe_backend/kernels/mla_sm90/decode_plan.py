"""Which program of decode attention takes which keys: made on the device once a step, for all layers.

The programs form groups, one program a tile of 64 heads, which work through the same items side by side and so share
their keys in L2. An item is a piece of a row's context; a group's items stand next to each other. Contexts are cut in
one of two ways, a constant of the plan:

    at multiples of `split` keys    A row's bits depend on nothing but its own length. Items go to the groups longest
                                    first, there and back (0 ... G - 1, G - 1 ... 0, ...), so that long ones meet
                                    short ones.
    evenly (`split` None)           All contexts make one line of blocks of 64 keys, each group takes an equal part of
                                    it: no group waits for another, whatever the lengths. At most one cut a group, so
                                    partial results are few; but where the cuts fall depends on the whole batch.

Pieces of one row are joined in ascending order (decode_merge.py).
"""

# A jit function has no types that mypy knows; launchers are typed.
# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: PLR0913
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LATENT_DIM = 512
HEAD_TILE = 64
_BLOCK = tl.constexpr(64)  # keys
_MIN_BLOCKS = tl.constexpr(2)  # of an even part: a shorter one costs more to join than it wins


@dataclass(frozen=True, kw_only=True)
class MlaDecodePlan:
    """Static device buffers: the work list of a step and the partial results of rows in several pieces."""

    split: int | None
    num_groups: int
    items: Tensor  # [I, 4] int32: row, first key, keys, partial slot (-1: writes `out` itself)
    group_items: Tensor  # [G + 1] int32: where a group's items begin
    merges: Tensor  # [S, 3] int32: row, first partial slot, pieces; of the rows in several pieces
    num_merges: Tensor  # [1] int32
    partial: Tensor  # [slots, H, 512] fp32
    lse: Tensor  # [slots, H] fp32, base 2


def make_mla_decode_plan(
    max_rows: int, max_len: int, max_tokens: int, num_heads: int, device: torch.device, split: int | None
) -> MlaDecodePlan:
    """Buffers for steps of at most `max_rows` rows of at most `max_len` keys, `max_tokens` keys in all.

    Rows that share pages count them each. Raises ValueError for a shape that the kernel does not have.
    """
    if (split is not None and (split % 64 or split <= 0)) or num_heads % HEAD_TILE or max_rows <= 0:
        raise ValueError(
            f"got split={split}, num_heads={num_heads}, max_rows={max_rows}; need None or a positive multiple of 64, a "
            f"multiple of {HEAD_TILE}, and at least one row."
        )
    num_groups = torch.cuda.get_device_properties(device).multi_processor_count // (num_heads // HEAD_TILE)
    if split is None:
        num_items, num_slots = max_rows + num_groups, 2 * num_groups  # a cut makes at most two pieces of cut rows
    else:
        num_items = min(max_rows * math.ceil(max_len / split), max_rows + max_tokens // split)
        # A row in n > 1 pieces holds more than (n - 1) * split >= n * split / 2 keys.
        num_slots = min(num_items, 2 * max_tokens // split) if max_len > split else 0

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return MlaDecodePlan(
        split=split,
        num_groups=num_groups,
        items=zeros(num_items, 4),
        group_items=zeros(num_groups + 1),
        merges=zeros(max_rows, 3),
        num_merges=zeros(1),
        partial=zeros(num_slots, num_heads, LATENT_DIM, dtype=torch.float32),
        lse=zeros(num_slots, num_heads, dtype=torch.float32),
    )


def plan_mla_decode(plan: MlaDecodePlan, context_lens: Tensor) -> None:
    """Fills the plan from context_lens [S] on the device; once a step, before the first layer."""
    num_rows = context_lens.shape[0]
    if num_rows > plan.merges.shape[0]:
        raise ValueError(f"got {num_rows} rows; this plan holds {plan.merges.shape[0]}. Make it larger.")
    args = context_lens, plan.items, plan.group_items, plan.merges, plan.num_merges, num_rows, plan.num_groups
    rows, groups = triton.next_power_of_2(max(num_rows, 32)), triton.next_power_of_2(plan.num_groups + 1)
    if plan.split is None:
        _plan_evenly_kernel[(1,)](*args, ROWS=rows, GROUPS=groups, num_warps=8)
    else:
        _plan_splits_kernel[(1,)](*args, plan.split, ROWS=rows, GROUPS=groups, num_warps=8)


@triton.jit
def _store_item(items_ptr, item, row, first, keys, slot, mask):
    entry = items_ptr + item * 4
    tl.store(entry, row, mask=mask)
    tl.store(entry + 1, first, mask=mask)
    tl.store(entry + 2, keys, mask=mask)
    tl.store(entry + 3, slot, mask=mask)


@triton.jit
def _store_merges(merges_ptr, num_merges_ptr, rows, pieces):
    """Lists the rows in several pieces; of each row the first partial slot, -1 for one in one piece."""
    several = pieces > 1
    slots = tl.where(several, pieces, 0)
    first_slot = tl.where(several, tl.cumsum(slots, 0) - slots, -1)
    entry = merges_ptr + (tl.cumsum(several.to(tl.int32), 0) - 1) * 3
    tl.store(entry, rows, mask=several)
    tl.store(entry + 1, first_slot, mask=several)
    tl.store(entry + 2, pieces, mask=several)
    tl.store(num_merges_ptr, tl.sum(several.to(tl.int32), 0))
    return first_slot


@triton.jit(do_not_specialize=["num_rows", "num_groups"])
def _plan_evenly_kernel(
    lens_ptr, items_ptr, group_items_ptr, merges_ptr, num_merges_ptr, num_rows, num_groups, ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """One program. Part g of the line is its blocks [g * share, (g + 1) * share); a length of 0 counts as a block."""
    rows = tl.arange(0, ROWS)
    used = rows < num_rows
    lens = tl.load(lens_ptr + rows, mask=used, other=0).to(tl.int32)
    blocks = tl.where(used, tl.maximum((lens + _BLOCK - 1) // _BLOCK, 1), 0)
    end = tl.cumsum(blocks, 0)
    start = end - blocks
    share = tl.maximum((tl.sum(blocks, 0) + num_groups - 1) // num_groups, _MIN_BLOCKS)
    first_part = start // share
    pieces = tl.where(used, (end - 1) // share - first_part + 1, 0)
    first_slot = _store_merges(merges_ptr, num_merges_ptr, rows, pieces)
    first_item = tl.cumsum(pieces, 0) - pieces
    groups = tl.arange(0, GROUPS)
    idle = (groups * share >= tl.sum(blocks, 0)) & (groups <= num_groups)  # these begin where the items end
    tl.store(group_items_ptr + groups, tl.zeros([GROUPS], tl.int32) + tl.sum(pieces, 0), mask=idle)
    for c in range(0, tl.max(pieces, 0)):
        here = c < pieces
        border = (first_part + c) * share
        low = tl.maximum(border, start)
        high = tl.minimum(border + share, end)
        first = (low - start) * _BLOCK
        keys = tl.minimum((high - start) * _BLOCK, lens) - first
        _store_item(items_ptr, first_item + c, rows, first, keys, tl.where(first_slot < 0, -1, first_slot + c), here)
        tl.store(group_items_ptr + first_part + c, first_item + c, mask=here & (low == border))


@triton.jit
def _group_begin(group, num_items, num_groups):
    """First item of a group, if rounds of `num_groups` items go there and back, the last one being incomplete."""
    rounds = num_items // num_groups
    rest = num_items % num_groups
    more = tl.where(rounds % 2 == 0, tl.minimum(group, rest), tl.maximum(group - (num_groups - rest), 0))
    return group * rounds + more


@triton.jit
def _place(rank, num_items, num_groups):
    """Where the rank-th item stands."""
    rounds = rank // num_groups
    group = rank % num_groups
    group = tl.where(rounds % 2 == 0, group, num_groups - 1 - group)
    return _group_begin(group, num_items, num_groups) + rounds


@triton.jit(do_not_specialize=["num_rows", "num_groups", "split"])
def _plan_splits_kernel(
    lens_ptr, items_ptr, group_items_ptr, merges_ptr, num_merges_ptr, num_rows, num_groups, split, ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """One program. Whole pieces rank first, then the rests by size, equal ones by row; length 0 is a rest."""
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
    first_slot = _store_merges(merges_ptr, num_merges_ptr, rows, pieces)
    first_whole = tl.cumsum(whole, 0) - whole
    num_items = tl.sum(pieces, 0)
    groups = tl.arange(0, GROUPS)
    tl.store(group_items_ptr + groups, _group_begin(groups, num_items, num_groups), mask=groups <= num_groups)
    for c in range(0, tl.max(whole, 0)):
        item = _place(first_whole + c, num_items, num_groups)
        slot = tl.where(first_slot < 0, -1, first_slot + c)
        _store_item(items_ptr, item, rows, c * split, split, slot, c < whole)
    item = _place(tl.sum(whole, 0) + rank, num_items, num_groups)
    slot = tl.where(first_slot < 0, -1, first_slot + whole)
    _store_item(items_ptr, item, rows, whole * split, rest, slot, rest >= 0)
