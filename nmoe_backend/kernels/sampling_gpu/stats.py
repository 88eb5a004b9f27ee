"""One pass over logits [N, V]: what draw, truncation and logprobs start from.

Of each block of 8,192: its maximum, the lowest id that has it, and the fp32 sum of weights relative to it. Of each 128
neighbours: their maximum. Grid: (N, V / 8,192).
"""

# A jit function has no types that mypy knows; launchers are typed.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe_backend.kernels.sampling_gpu.table import GREEDY, KIND, NUM_TOP, TEMPERATURE, check_logits, real, whole
from nmoe_backend.kernels.sampling_gpu.weights import LARGEST, finite, log2_scale

BLOCK = 8192
NEIGHBOURS = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class RowStats:
    """block_* [N, ceil(V / 8,192)]; neighbours [N, blocks * 64]."""

    block_max: Tensor
    block_argmax: Tensor  # int32
    block_sum: Tensor
    neighbours: Tensor

    @classmethod
    def create(cls, num_rows: int, vocab_size: int, device: torch.device | str) -> RowStats:
        """4 kB a row at a vocabulary of 129,280."""
        blocks = triton.cdiv(vocab_size, BLOCK)

        def buffer(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(num_rows, width, dtype=dtype, device=device)

        return cls(
            block_max=buffer(blocks),
            block_argmax=buffer(blocks, torch.int32),
            block_sum=buffer(blocks),
            neighbours=buffer(blocks * (BLOCK // NEIGHBOURS)),
        )

    @property
    def num_blocks(self) -> int:
        """Blocks of a row."""
        return self.block_max.shape[1]

    @property
    def num_groups(self) -> int:
        """Groups of neighbours of a row."""
        return self.neighbours.shape[1]


@triton.jit
def _stats_kernel(  # noqa: PLR0913
    logits_ptr,
    sources_ptr,  # None: row n lies at n
    slots_ptr,  # None: every row is wanted, at temperature 1
    rows_ptr,
    max_ptr,
    argmax_ptr,
    sum_ptr,
    neighbours_ptr,
    row_stride,
    V,
    FOR_LOGPROBS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    is_wanted, is_greedy, temperature = True, False, 1.0
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + row)
        is_wanted = slot >= 0
        if FOR_LOGPROBS:
            is_wanted = is_wanted & (whole(rows_ptr, slot, NUM_TOP) >= 0)
        else:
            is_greedy = whole(rows_ptr, slot, KIND) == GREEDY
            temperature = real(rows_ptr, slot, TEMPERATURE)
    if is_wanted:
        source = row
        if sources_ptr is not None:
            source = tl.load(sources_ptr + row)
        group = tl.arange(0, BLOCK // NEIGHBOURS)
        token = block * BLOCK + group[:, None] * NEIGHBOURS + tl.arange(0, NEIGHBOURS)[None, :]
        x = tl.load(logits_ptr + source * row_stride + token, mask=token < V, other=float("-inf"))
        x = tl.minimum(x, LARGEST)
        maxima = tl.max(x, axis=1)
        top = tl.max(maxima, axis=0)
        first = tl.min(tl.min(tl.where(x == top, token, V - 1), axis=1), axis=0)
        out = row * BLOCKS + block
        tl.store(max_ptr + out, top)
        tl.store(argmax_ptr + out, first)
        tl.store(neighbours_ptr + out * (BLOCK // NEIGHBOURS) + group, maxima)
        if not is_greedy:
            weights = tl.exp2((x - finite(top)) * log2_scale(temperature))
            tl.store(sum_ptr + out, tl.sum(tl.sum(weights, axis=1), axis=0))


def row_stats(
    logits: Tensor, stats: RowStats, slots: Tensor | None, rows: Tensor | None, sources: Tensor | None = None
) -> None:
    """Of the rows as they are sampled from: row n of `slots[n]` lies at `sources[n]` of the logits (None: at n).

    Greedy rows get no sums.
    """
    _launch(logits, stats, slots, rows, sources, for_logprobs=False)


def raw_stats(logits: Tensor, stats: RowStats, slots: Tensor | None, rows: Tensor | None) -> None:
    """At temperature 1, of rows whose slots want logprobs; without `slots` of all rows."""
    _launch(logits, stats, slots, rows, None, for_logprobs=True)


def _launch(
    logits: Tensor,
    stats: RowStats,
    slots: Tensor | None,
    rows: Tensor | None,
    sources: Tensor | None,
    *,
    for_logprobs: bool,
) -> None:
    num_rows = logits.shape[0] if slots is None else slots.shape[0]
    vocab_size = check_logits(logits, num_rows)
    if stats.num_blocks != triton.cdiv(vocab_size, BLOCK) or stats.block_max.shape[0] < num_rows:
        raise ValueError(
            f"got statistics of {tuple(stats.block_max.shape)} blocks for {num_rows} rows of {vocab_size} logits; "
            "create them for that size."
        )
    _stats_kernel[(num_rows, stats.num_blocks)](
        logits, sources, slots, rows, stats.block_max, stats.block_argmax, stats.block_sum, stats.neighbours,
        logits.stride(0), vocab_size, for_logprobs, stats.num_blocks, BLOCK, NEIGHBOURS, num_warps=8,
    )  # fmt: skip
