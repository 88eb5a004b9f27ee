"""The tokens of rows with top_k, top_p or min_p, without a sort. Grid: (N,), a program a row.

Everything below a bound that certainly is not kept is left out; the rest, in order of ids, goes into the workspace,
where a bisection over the bits of the logits finds the exact threshold of top_k and that of top_p, with the number of
equals that stay.

Bounds. top_k: the k-th largest of the maxima of neighbours (k elements are at least that large). top_p: tokens of
weight < (1 - p) * total / V together weigh less than (1 - p) * total, so none of them is needed. min_p: the threshold
itself. Where no bound cuts (a large k, a flat distribution) the bisection runs over the row in memory: slower, equal.
"""

# A jit function has no types that mypy knows; launchers are typed.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe_backend.kernels.sampling_gpu.stats import NEIGHBOURS, RowStats
from nmoe_backend.kernels.sampling_gpu.table import (
    KIND,
    MIN_P,
    SEED,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    TRUNCATED,
    StepRows,
    check_logits,
    real,
    whole,
)
from nmoe_backend.kernels.sampling_gpu.weights import (
    LARGEST,
    NOWHERE,
    block_maxima,
    block_sums,
    log2_scale,
    mass,
    order,
    uniform,
)

_CHUNK = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """Scratch of truncated rows."""

    groups: Tensor  # [N, V / 128] int32: those of the neighbours that hold a candidate
    logits: Tensor  # [N, V] fp32, weights in the end
    ids: Tensor  # [N, V] int32

    @classmethod
    def create(cls, num_rows: int, stats: RowStats, vocab_size: int) -> Candidates:
        """8 bytes a logit, nearly all of it."""
        device = stats.block_max.device
        return cls(
            groups=torch.empty(num_rows, stats.num_groups, dtype=torch.int32, device=device),
            logits=torch.empty(num_rows, vocab_size, dtype=torch.float32, device=device),
            ids=torch.empty(num_rows, vocab_size, dtype=torch.int32, device=device),
        )


@triton.jit
def _truncated_kernel(  # noqa: PLR0913
    logits_ptr,
    sources_ptr,  # None: row n lies at n
    slots_ptr,
    positions_ptr,
    rows_ptr,
    max_ptr,
    sum_ptr,
    neighbours_ptr,
    groups_ptr,
    candidates_ptr,
    candidate_ids_ptr,
    out_ptr,
    row_stride,
    V,
    BLOCKS: tl.constexpr,
    BLOCKS_POW2: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_POW2: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    if whole(rows_ptr, slot, KIND) == TRUNCATED:
        top_k = whole(rows_ptr, slot, TOP_K)
        top_p, min_p = real(rows_ptr, slot, TOP_P), real(rows_ptr, slot, MIN_P)
        scale = log2_scale(real(rows_ptr, slot, TEMPERATURE))
        top, base = block_maxima(max_ptr, row, BLOCKS, BLOCKS_POW2)
        total = tl.sum(block_sums(sum_ptr, row, top, base, scale, BLOCKS, BLOCKS_POW2), axis=0)
        group = tl.arange(0, GROUPS_POW2)
        maxima = tl.load(neighbours_ptr + row * GROUPS + group, mask=group < GROUPS, other=float("-inf"))
        cut = _bound(maxima, top_k, top_p, min_p, total, base, scale, V, GROUPS)

        source = row
        if sources_ptr is not None:
            source = tl.load(sources_ptr + row)
        kept_row, ids_row = candidates_ptr + row * V, candidate_ids_ptr + row * V
        groups_row = groups_ptr + row * GROUPS
        num = _collect(
            logits_ptr + source * row_stride, groups_row, kept_row, ids_row, maxima, cut, V,
            GROUPS, GROUPS_POW2, NEIGHBOURS, CHUNK,
        )  # fmt: skip

        high = order(base).to(tl.int64)
        floor = order(cut + 0.0 * base).to(tl.int64)  # of top_k: what is not below it stays
        if (top_k > 0) & (top_k < num):
            floor = _top_k_floor(kept_row, num, floor, high, top_k, CHUNK)
        threshold, num_equal = floor, NOWHERE  # of top_p, and how many that equal it stay
        if top_p < 1:
            if top_k > 0:
                total = _mass_above(kept_row, num, floor - 1, base, scale, CHUNK)
            threshold = _top_p_threshold(kept_row, num, floor, high, top_p * total, base, scale, CHUNK)
            num_equal = _equals_that_stay(kept_row, num, threshold, top_p * total, base, scale, CHUNK)
        sum_kept = _weigh(kept_row, num, threshold, num_equal, min_p, base, scale, CHUNK)
        target = uniform(whole(rows_ptr, slot, SEED), tl.load(positions_ptr + row)) * sum_kept
        token = tl.load(ids_row + _pick(kept_row, num, target, CHUNK), mask=num > 0, other=0)
        tl.store(out_ptr + row, token.to(tl.int64))


@triton.jit
def _bound(maxima, top_k, top_p, min_p, total, base, scale, V, GROUPS: tl.constexpr):  # noqa: PLR0913
    """A logit below which nothing is kept; the margin covers the rounding of weights."""
    cut = float("-inf")
    if (top_k > 0) & (top_k <= GROUPS // 2):
        cut = _kth_largest(maxima, top_k, base)
    share = min_p
    if (top_k > 0) & (top_p < 1):
        share = min_p * 0  # what min_p drops still counts in the total of top_p
    elif top_p < 1:
        share = tl.maximum(min_p, (1 - top_p) * total / V)
    if share > 0:
        margin = 1e-3 / scale + tl.abs(base) * 1e-6
        cut = tl.maximum(cut, base + tl.log2(share.to(tl.float32)) / scale - margin)
    return cut


@triton.jit
def _kth_largest(values, k, top):
    """The k-th largest of a vector whose largest is `top`, by bisection over its bits."""
    ranks = order(values)
    floor, last = tl.min(ranks, axis=0).to(tl.int64), order(top).to(tl.int64)
    while floor < last:
        middle = floor + ((last - floor + 1) >> 1)
        enough = tl.sum((ranks >= middle).to(tl.int32), axis=0) >= k
        floor = tl.where(enough, middle, floor)
        last = tl.where(enough, last, middle - 1)
    bits = floor.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _collect(  # noqa: PLR0913
    logits_row,
    groups_row,
    kept_row,
    ids_row,
    maxima,
    cut,
    V,
    GROUPS: tl.constexpr,
    GROUPS_POW2: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Logits from `cut` on and their ids, ascending, into the workspace; -> their number"""
    has_any = (maxima >= cut) & (maxima > float("-inf"))
    place_of_group = tl.cumsum(has_any.to(tl.int32), axis=0) - 1
    tl.store(groups_row + place_of_group, tl.arange(0, GROUPS_POW2), mask=has_any)
    num_groups = tl.sum(has_any.to(tl.int32), axis=0)
    tl.debug_barrier()
    num = 0
    for begin in range(0, num_groups, CHUNK // NEIGHBOURS):
        listed = begin + tl.arange(0, CHUNK // NEIGHBOURS)
        first = tl.load(groups_row + listed, mask=listed < num_groups, other=GROUPS) * NEIGHBOURS
        token = tl.reshape(first[:, None] + tl.arange(0, NEIGHBOURS)[None, :], (CHUNK,))
        x = tl.minimum(tl.load(logits_row + token, mask=token < V, other=float("-inf")), LARGEST)
        kept = (x >= cut) & (x > float("-inf"))
        place = num + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.store(kept_row + place, x, mask=kept)
        tl.store(ids_row + place, token, mask=kept)
        num += tl.sum(kept.to(tl.int32), axis=0)
    tl.debug_barrier()
    return num


@triton.jit
def _chunk(kept_row, begin, num, CHUNK: tl.constexpr):
    """Candidates [begin, begin + CHUNK), -inf behind the last"""
    place = begin + tl.arange(0, CHUNK)
    return tl.load(kept_row + place, mask=place < num, other=float("-inf"))


@triton.jit
def _top_k_floor(kept_row, num, floor, high, top_k, CHUNK: tl.constexpr):
    """Order of the k-th largest candidate"""
    while floor < high:
        middle = floor + ((high - floor + 1) >> 1)
        count = 0
        for begin in range(0, num, CHUNK):
            count += tl.sum((order(_chunk(kept_row, begin, num, CHUNK)) >= middle).to(tl.int32), axis=0)
        floor = tl.where(count >= top_k, middle, floor)
        high = tl.where(count >= top_k, high, middle - 1)
    return floor


@triton.jit
def _mass_above(kept_row, num, threshold, base, scale, CHUNK: tl.constexpr):
    """float64 sum of the weights of candidates above an order"""
    above = tl.zeros((), dtype=tl.float64)
    for begin in range(0, num, CHUNK):
        x = _chunk(kept_row, begin, num, CHUNK)
        above += mass(x, order(x) > threshold, base, scale)
    return above


@triton.jit
def _top_p_threshold(kept_row, num, threshold, high, wanted, base, scale, CHUNK: tl.constexpr):
    """The lowest order, of those from `threshold` on, above which candidates weigh less than `wanted`"""
    while threshold < high:
        middle = threshold + ((high - threshold) >> 1)
        is_less = _mass_above(kept_row, num, middle, base, scale, CHUNK) < wanted
        threshold = tl.where(is_less, threshold, middle + 1)
        high = tl.where(is_less, middle, high)
    return threshold


@triton.jit
def _equals_that_stay(kept_row, num, threshold, wanted, base, scale, CHUNK: tl.constexpr):
    """Of the candidates of order `threshold`, as many as it takes to weigh `wanted` with those above; at least one"""
    above = _mass_above(kept_row, num, threshold, base, scale, CHUNK)
    equal, count = tl.zeros((), dtype=tl.float64), 0
    for begin in range(0, num, CHUNK):
        x = _chunk(kept_row, begin, num, CHUNK)
        is_equal = (order(x) == threshold) & (x > float("-inf"))
        equal += mass(x, is_equal, base, scale)
        count += tl.sum(is_equal.to(tl.int32), axis=0)
    stay = NOWHERE
    if equal > 0:
        needed = tl.math.ceil((wanted - above) * count / equal)
        stay = tl.maximum(tl.minimum(needed, count * 1.0), 1.0).to(tl.int32)
    return stay


@triton.jit
def _weigh(kept_row, num, threshold, num_equal, min_p, base, scale, CHUNK: tl.constexpr):
    """Candidates become weights, 0 for those that do not stay; -> float64 sum"""
    sum_kept, seen_equal = tl.zeros((), dtype=tl.float64), 0
    for begin in range(0, num, CHUNK):
        x = _chunk(kept_row, begin, num, CHUNK)
        rank = order(x)
        is_equal = (rank == threshold) & (x > float("-inf"))
        place = seen_equal + tl.cumsum(is_equal.to(tl.int32), axis=0)
        weights = tl.exp2((x - base) * scale)
        stays = ((rank > threshold) | (is_equal & (place <= num_equal))) & (weights >= min_p)
        weights = tl.where(stays, weights, 0.0)
        lane = begin + tl.arange(0, CHUNK)
        tl.store(kept_row + lane, weights, mask=lane < num)
        sum_kept += tl.sum(weights.to(tl.float64), axis=0)
        seen_equal += tl.sum(is_equal.to(tl.int32), axis=0)
    tl.debug_barrier()
    return sum_kept


@triton.jit
def _pick(weights_row, num, target, CHUNK: tl.constexpr):
    """The first place whose cumulative weight exceeds `target`; the last one with a weight where rounding lets none"""
    before, hit, last_kept, begin = tl.zeros((), dtype=tl.float64), NOWHERE, 0, 0
    while (begin < num) & (hit == NOWHERE):
        place = begin + tl.arange(0, CHUNK)
        weights = tl.load(weights_row + place, mask=place < num, other=0.0)
        inside = before + tl.cumsum(weights.to(tl.float64), axis=0)
        hit = tl.min(tl.where((inside > target) & (weights > 0), place, NOWHERE), axis=0)
        last_kept = tl.maximum(last_kept, tl.max(tl.where(weights > 0, place, 0), axis=0))
        before += tl.sum(weights.to(tl.float64), axis=0)
        begin += CHUNK
    return tl.minimum(hit, last_kept)


def draw_truncated(
    logits: Tensor,
    step: StepRows,
    rows: Tensor,
    stats: RowStats,
    candidates: Candidates,
    out: Tensor,
    sources: Tensor | None = None,
) -> None:
    """-> out [N] int64, of truncated rows. `stats`: row_stats of the same rows. Rows without any weight give 0."""
    num_rows = step.slots.shape[0]
    vocab_size = check_logits(logits, num_rows)
    blocks, groups = stats.num_blocks, stats.num_groups
    _truncated_kernel[(num_rows,)](
        logits, sources, step.slots, step.positions, rows, stats.block_max, stats.block_sum, stats.neighbours,
        candidates.groups, candidates.logits, candidates.ids, out, logits.stride(0), vocab_size, blocks,
        triton.next_power_of_2(blocks), groups, triton.next_power_of_2(groups), NEIGHBOURS, _CHUNK, num_warps=8,
    )  # fmt: skip
