"""Log-probabilities of the raw logits: of each row's token, and of the best n, found one by one among the maxima of 128
neighbours. float64 but for the weights in a block's sum. Grid: (N,)."""

# A jit function has no types that mypy knows; launchers are typed.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe_backend.kernels.sampling_gpu.stats import NEIGHBOURS, RowStats
from nmoe_backend.kernels.sampling_gpu.table import NUM_TOP, check_logits, whole
from nmoe_backend.kernels.sampling_gpu.weights import LARGEST, LOG2_E, block_maxima, block_sums


@dataclass(frozen=True, kw_only=True, slots=True)
class LogprobRows:
    """logprobs [N] float64; top_ids [N, n] int32 and top_logprobs [N, n] float64, best first, equal ones by id."""

    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    @classmethod
    def create(cls, num_rows: int, num_top: int, device: torch.device | str) -> LogprobRows:
        return cls(
            logprobs=torch.empty(num_rows, dtype=torch.float64, device=device),
            top_ids=torch.empty(num_rows, num_top, dtype=torch.int32, device=device),
            top_logprobs=torch.empty(num_rows, num_top, dtype=torch.float64, device=device),
        )


@triton.jit
def _logprobs_kernel(  # noqa: PLR0913
    logits_ptr,
    token_ids_ptr,
    slots_ptr,  # None: all rows are wanted, with `width` alternatives
    rows_ptr,
    max_ptr,
    sum_ptr,
    neighbours_ptr,
    logprob_ptr,
    top_ids_ptr,
    top_logprobs_ptr,
    row_stride,
    V,
    width,
    BLOCKS: tl.constexpr,
    BLOCKS_POW2: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_POW2: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    num_top = width
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + row)
        num_top = tl.where(slot >= 0, whole(rows_ptr, slot, NUM_TOP), -1)
    if num_top >= 0:
        logits_row = logits_ptr + row * row_stride
        top, base = block_maxima(max_ptr, row, BLOCKS, BLOCKS_POW2)
        total = tl.sum(block_sums(sum_ptr, row, top, base, LOG2_E, BLOCKS, BLOCKS_POW2), axis=0)
        norm = base.to(tl.float64) + tl.log(total)
        chosen = tl.load(logits_row + tl.load(token_ids_ptr + row))
        tl.store(logprob_ptr + row, chosen.to(tl.float64) - norm)
        group, lane = tl.arange(0, GROUPS_POW2), tl.arange(0, NEIGHBOURS)
        left = tl.load(neighbours_ptr + row * GROUPS + group, mask=group < GROUPS, other=float("-inf"))
        last_value, last_token = LARGEST, -1
        for n in range(0, num_top):
            value = tl.max(left, axis=0)
            place = tl.min(tl.where((left == value) & (group < GROUPS), group, GROUPS - 1), axis=0)
            token = place * NEIGHBOURS + lane
            x = tl.load(logits_row + token, mask=token < V, other=float("-inf"))
            x = tl.minimum(x, LARGEST)
            # What came before in the order (value, then id) is taken: equal values of this group up to the last token.
            previous = tl.where(last_value == value, last_token, -1)
            first = tl.min(tl.where((x == value) & (token > previous), token, V - 1), axis=0)
            tl.store(top_ids_ptr + row * width + n, first)
            tl.store(top_logprobs_ptr + row * width + n, value.to(tl.float64) - norm)
            rest = (x < value) | ((x == value) & (token > first))
            left = tl.where(group == place, tl.max(tl.where(rest, x, float("-inf")), axis=0), left)
            last_value, last_token = value, first


def logprobs(
    logits: Tensor,
    token_ids: Tensor,
    stats: RowStats,
    out: LogprobRows,
    slots: Tensor | None = None,
    rows: Tensor | None = None,
) -> None:
    """Raw logits [N, V] and token_ids [N] int64 -> `out`, of rows whose slots ask; without slots of all, each with all
    alternatives that `out` has room for. `stats`: raw_stats of the same rows."""
    num_rows = token_ids.shape[0]
    vocab_size = check_logits(logits, num_rows)
    blocks, groups = stats.num_blocks, stats.num_groups
    _logprobs_kernel[(num_rows,)](
        logits, token_ids, slots, rows, stats.block_max, stats.block_sum, stats.neighbours, out.logprobs, out.top_ids,
        out.top_logprobs, logits.stride(0), vocab_size, out.top_ids.shape[1], blocks, triton.next_power_of_2(blocks),
        groups, triton.next_power_of_2(groups), NEIGHBOURS, num_warps=4,
    )  # fmt: skip
