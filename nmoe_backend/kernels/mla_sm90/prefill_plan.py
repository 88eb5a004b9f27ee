"""Which tiles of new tokens meet which blocks of keys, in which piece: made on the device once a step, for all layers.

What tiles, blocks, pieces and items are is said in prefill.py. Example: 200 new tokens at start = 100 have keys in
blocks 0, 1, 2, and tiles 0 (queries 100 - 127), 1 and 2 (queries 256 - 299) of 1, 2 and 3 blocks; with piece_keys = 256
there are items of 1, 2 and 2 blocks in piece 0 and one of 1 block in piece 1.
"""

# A jit function has no types that mypy knows; launchers are typed.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

LATENT_DIM = 512
ROPE_DIM = 64
EXPANDED_DIM = 256  # of a head: 128 of the key, then 128 of the value
VALUE_DIM = 128
HEAD_GROUP = 4  # heads whose tiles run side by side and share their keys in L2
BLOCK = 128  # queries of a tile and keys of a block
DEFAULT_PIECE_KEYS = 8192

_ITEM = tl.constexpr(8)  # int32 fields of an item
_ITEM_TILE = tl.constexpr(32)  # items of a program of the plan


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
