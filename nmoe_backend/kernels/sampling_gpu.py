"""Choosing tokens from logits [N, V] on a GPU without sorting them: statistics of blocks, then a look at one block.

What is computed is that of sampling.py and types.SamplingParams; weights are fp32 here, sums float64, so that a draw
differs from the float64 one only where u falls within about 1e-6 of a boundary between two tokens. Every result depends
on its own row only, and every sum has a fixed order.

    sample         one pass over the logits: maximum, its id and the sum of weights of each block of 8,192, and the
                   maxima of 128 neighbours. Greedy rows are done. A plain draw finds its block from the sums and reads
                   that one again: 1 1/16 passes in all.
                   Truncated rows: everything below a bound that certainly is not kept is left out (below); the
                   rest, in order of ids, goes into the workspace, where a bisection over the bits of the logits finds
                   the exact threshold of top_k and that of top_p, with the number of equals that stay.
    logprobs       of the raw logits, before they are edited: log-sum-exp from the same statistics, and the best n
                   found one by one among the maxima of 128 neighbours

Bounds. top_k: the k-th largest of the maxima of neighbours (k elements are at least that large). top_p: tokens of
weight < (1 - p) * total / V together weigh less than (1 - p) * total, so none of them is needed. min_p: the threshold
itself. Where no bound cuts (a large k, a flat distribution) the bisection runs over the row in memory: slower, equal.

Layouts: logits fp32 with contiguous rows; all per-row values contiguous [N]. Nothing is allocated but the results.
"""

# A jit function has no types that mypy knows; launchers are typed.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 8192
_NEIGHBOURS = 128
_CHUNK = 4096

_LARGEST = tl.constexpr(3.4028234663852886e38)
_LOG2_E = tl.constexpr(1.4426950408889634)
_NOWHERE = tl.constexpr(2**31 - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRows:
    """How each row is sampled; all [N]."""

    temperature: Tensor  # float64, 0 = greedy
    top_k: Tensor  # int32, 0 = off
    top_p: Tensor  # float64
    min_p: Tensor  # float64
    seeds: Tensor  # int64
    positions: Tensor  # int64: where the new token will stand


@dataclass(frozen=True, kw_only=True, slots=True)
class Workspace:
    """Scratch of the sampler. block_* [N, V / 8192], neighbours [N, V / 128] maxima, candidates [N, V]."""

    block_max: Tensor
    block_argmax: Tensor
    block_sum: Tensor
    neighbours: Tensor
    groups: Tensor  # [N, V / 128] of neighbours that hold a candidate
    candidate_logits: Tensor
    candidate_ids: Tensor

    @classmethod
    def create(cls, num_rows: int, vocab_size: int, device: torch.device | str) -> Workspace:
        """8 bytes a logit, nearly all of it for the candidates."""
        blocks = triton.cdiv(vocab_size, _BLOCK)

        def buffer(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(num_rows, width, dtype=dtype, device=device)

        return cls(
            block_max=buffer(blocks),
            block_argmax=buffer(blocks, torch.int32),
            block_sum=buffer(blocks),
            neighbours=buffer(blocks * (_BLOCK // _NEIGHBOURS)),
            groups=buffer(blocks * (_BLOCK // _NEIGHBOURS), torch.int32),
            candidate_logits=buffer(vocab_size),
            candidate_ids=buffer(vocab_size, torch.int32),
        )


@triton.jit
def _log2_scale(temperature):
    """Weights are 2 ** ((logit - max) * this). Kept finite and not 0, so that 0 * -inf cannot come up."""
    safe = tl.where(temperature > 0, temperature, 1.0)
    return tl.minimum(tl.maximum(_LOG2_E / safe, 1e-37), _LARGEST).to(tl.float32)


@triton.jit
def _order(x):
    """int32 of the same order as the fp32 values; -0.0 counts as 0.0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _finite(top):
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _stats_kernel(  # noqa: PLR0913
    logits_ptr,
    temperature_ptr,  # None: 1
    wanted_ptr,  # None: all rows
    max_ptr,
    argmax_ptr,
    sum_ptr,
    neighbours_ptr,
    row_stride,
    V,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    is_wanted = True
    if wanted_ptr is not None:
        is_wanted = tl.load(wanted_ptr + row) >= 0
    if is_wanted:
        group = tl.arange(0, BLOCK // NEIGHBOURS)
        token = block * BLOCK + group[:, None] * NEIGHBOURS + tl.arange(0, NEIGHBOURS)[None, :]
        x = tl.load(logits_ptr + row * row_stride + token, mask=token < V, other=float("-inf"))
        x = tl.minimum(x, _LARGEST)
        maxima = tl.max(x, axis=1)
        top = tl.max(maxima, axis=0)
        first = tl.min(tl.min(tl.where(x == top, token, V - 1), axis=1), axis=0)
        temperature = 1.0
        if temperature_ptr is not None:
            temperature = tl.load(temperature_ptr + row)
        weights = tl.exp2((x - _finite(top)) * _log2_scale(temperature))
        out = row * BLOCKS + block
        tl.store(max_ptr + out, top)
        tl.store(argmax_ptr + out, first)
        tl.store(sum_ptr + out, tl.sum(tl.sum(weights, axis=1), axis=0))
        tl.store(neighbours_ptr + out * (BLOCK // NEIGHBOURS) + group, maxima)


@triton.jit
def _uniform(seed, position):
    """counter_uniform of sampling.py: float64 in [0, 1)"""
    golden = 0x9E3779B97F4A7C15
    start = _mix(seed.to(tl.uint64, bitcast=True) + golden)
    bits = _mix(start + (position + 1).to(tl.uint64, bitcast=True) * golden)
    return (bits >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _mix(bits):
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)


@triton.jit
def _is_truncated(top_k, top_p, min_p, V):
    return ((top_k > 0) & (top_k < V)) | (top_p < 1) | (min_p > 0)


@triton.jit
def _draw_kernel(  # noqa: PLR0913
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    positions_ptr,
    max_ptr,
    argmax_ptr,
    sum_ptr,
    out_ptr,
    row_stride,
    V,
    BLOCKS: tl.constexpr,
    BLOCKS_POW2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Greedy and plain rows."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS_POW2)
    top = tl.load(max_ptr + row * BLOCKS + block, mask=block < BLOCKS, other=float("-inf"))
    best = tl.max(top, axis=0)
    temperature = tl.load(temperature_ptr + row)
    truncated = _is_truncated(tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row), V)
    if temperature == 0:
        first = tl.min(tl.where(top == best, block, BLOCKS - 1), axis=0)
        tl.store(out_ptr + row, tl.load(argmax_ptr + row * BLOCKS + first).to(tl.int64))
    elif not truncated:
        scale = _log2_scale(temperature)
        sums = tl.load(sum_ptr + row * BLOCKS + block, mask=block < BLOCKS, other=0.0)
        sums = sums.to(tl.float64) * tl.exp2((top - _finite(best)) * scale).to(tl.float64)
        ends = tl.cumsum(sums, axis=0)
        target = _uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row)) * tl.max(ends, axis=0)
        last = tl.max(tl.where(sums > 0, block, 0), axis=0)
        chosen = tl.minimum(tl.min(tl.where((ends > target) & (sums > 0), block, BLOCKS_POW2), axis=0), last)
        before = tl.sum(tl.where(block < chosen, sums, 0.0), axis=0)
        token = chosen * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + row * row_stride + token, mask=token < V, other=float("-inf"))
        weights = tl.exp2((tl.minimum(x, _LARGEST) - _finite(best)) * scale)
        inside = before + tl.cumsum(weights.to(tl.float64), axis=0)
        hit = tl.min(tl.where((inside > target) & (weights > 0), token, _NOWHERE), axis=0)
        last_token = tl.max(tl.where(weights > 0, token, 0), axis=0)
        tl.store(out_ptr + row, tl.minimum(hit, last_token).to(tl.int64))


@triton.jit
def _truncated_kernel(  # noqa: PLR0913
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    positions_ptr,
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
    temperature = tl.load(temperature_ptr + row)
    top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    if (temperature > 0) & _is_truncated(top_k, top_p, min_p, V):
        scale = _log2_scale(temperature)
        block = tl.arange(0, BLOCKS_POW2)
        top = tl.load(max_ptr + row * BLOCKS + block, mask=block < BLOCKS, other=float("-inf"))
        base = _finite(tl.max(top, axis=0))
        sums = tl.load(sum_ptr + row * BLOCKS + block, mask=block < BLOCKS, other=0.0)
        total = tl.sum(sums.to(tl.float64) * tl.exp2((top - base) * scale).to(tl.float64), axis=0)
        has_k, has_p = (top_k > 0) & (top_k < V), top_p < 1
        # A bound below which nothing is kept; the margin covers the rounding of weights.
        cut = float("-inf")
        group = tl.arange(0, GROUPS_POW2)
        maxima = tl.load(neighbours_ptr + row * GROUPS + group, mask=group < GROUPS, other=float("-inf"))
        if has_k & (top_k <= GROUPS // 2):
            cut = _kth_largest(maxima, top_k, base)
        share = min_p
        if has_k & has_p:
            share = min_p * 0  # what min_p drops still counts in the total of top_p
        elif has_p:
            share = tl.maximum(min_p, (1 - top_p) * total / V)
        if share > 0:
            margin = 1e-3 / scale + tl.abs(base) * 1e-6
            cut = tl.maximum(cut, base + tl.log2(share.to(tl.float32)) / scale - margin)

        logits_row = logits_ptr + row * row_stride
        kept_row, ids_row = candidates_ptr + row * V, candidate_ids_ptr + row * V
        has_any = (maxima >= cut) & (maxima > float("-inf"))
        place_of_group = tl.cumsum(has_any.to(tl.int32), axis=0) - 1
        tl.store(groups_ptr + row * GROUPS + place_of_group, group, mask=has_any)
        num_groups = tl.sum(has_any.to(tl.int32), axis=0)
        tl.debug_barrier()
        lane, neighbour = tl.arange(0, CHUNK), tl.arange(0, NEIGHBOURS)[None, :]
        num = 0
        for begin in range(0, num_groups, CHUNK // NEIGHBOURS):
            listed = begin + tl.arange(0, CHUNK // NEIGHBOURS)
            first = tl.load(groups_ptr + row * GROUPS + listed, mask=listed < num_groups, other=GROUPS) * NEIGHBOURS
            token = tl.reshape(first[:, None] + neighbour, (CHUNK,))  # ascending
            x = tl.minimum(tl.load(logits_row + token, mask=token < V, other=float("-inf")), _LARGEST)
            kept = (x >= cut) & (x > float("-inf"))
            place = num + tl.cumsum(kept.to(tl.int32), axis=0) - 1
            tl.store(kept_row + place, x, mask=kept)
            tl.store(ids_row + place, token, mask=kept)
            num += tl.sum(kept.to(tl.int32), axis=0)
        tl.debug_barrier()

        high = _order(base).to(tl.int64)
        floor = _order(cut + 0.0 * base).to(tl.int64)  # of top_k: what is not below it stays
        if has_k & (top_k < num):
            last = high
            while floor < last:
                middle = floor + ((last - floor + 1) >> 1)
                count = 0
                for begin in range(0, num, CHUNK):
                    x = tl.load(kept_row + begin + lane, mask=begin + lane < num, other=float("-inf"))
                    count += tl.sum((_order(x) >= middle).to(tl.int32), axis=0)
                floor = tl.where(count >= top_k, middle, floor)
                last = tl.where(count >= top_k, last, middle - 1)
        threshold, num_equal = floor, _NOWHERE  # of top_p, and how many that equal it stay
        if has_p:
            if has_k:
                total = total * 0
                for begin in range(0, num, CHUNK):
                    x = tl.load(kept_row + begin + lane, mask=begin + lane < num, other=float("-inf"))
                    total += _mass(x, _order(x) >= floor, base, scale)
            wanted = top_p * total
            last = high
            while threshold < last:
                middle = threshold + ((last - threshold) >> 1)
                above = total * 0
                for begin in range(0, num, CHUNK):
                    x = tl.load(kept_row + begin + lane, mask=begin + lane < num, other=float("-inf"))
                    above += _mass(x, _order(x) > middle, base, scale)
                threshold = tl.where(above < wanted, threshold, middle + 1)
                last = tl.where(above < wanted, middle, last)
            above, equal, equal_count = total * 0, total * 0, 0
            for begin in range(0, num, CHUNK):
                x = tl.load(kept_row + begin + lane, mask=begin + lane < num, other=float("-inf"))
                above += _mass(x, _order(x) > threshold, base, scale)
                is_equal = (_order(x) == threshold) & (begin + lane < num)
                equal += _mass(x, is_equal, base, scale)
                equal_count += tl.sum(is_equal.to(tl.int32), axis=0)
            if equal > 0:
                needed = tl.math.ceil((wanted - above) * equal_count / equal)
                num_equal = tl.maximum(tl.minimum(needed, equal_count * 1.0), 1.0).to(tl.int32)

        sum_kept, seen_equal = total * 0, 0
        for begin in range(0, num, CHUNK):
            x = tl.load(kept_row + begin + lane, mask=begin + lane < num, other=float("-inf"))
            order = _order(x)
            is_equal = (order == threshold) & (begin + lane < num)
            place = seen_equal + tl.cumsum(is_equal.to(tl.int32), axis=0)
            weights = tl.exp2((x - base) * scale)
            stays = ((order > threshold) | (is_equal & (place <= num_equal))) & (weights >= min_p)
            weights = tl.where(stays, weights, 0.0)
            tl.store(kept_row + begin + lane, weights, mask=begin + lane < num)
            sum_kept += tl.sum(weights.to(tl.float64), axis=0)
            seen_equal += tl.sum(is_equal.to(tl.int32), axis=0)
        tl.debug_barrier()

        target = _uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row)) * sum_kept
        before, hit, last_kept, begin = total * 0, _NOWHERE, 0, 0
        while (begin < num) & (hit == _NOWHERE):
            weights = tl.load(kept_row + begin + lane, mask=begin + lane < num, other=0.0)
            inside = before + tl.cumsum(weights.to(tl.float64), axis=0)
            hit = tl.min(tl.where((inside > target) & (weights > 0), begin + lane, _NOWHERE), axis=0)
            last_kept = tl.maximum(last_kept, tl.max(tl.where(weights > 0, begin + lane, 0), axis=0))
            before += tl.sum(weights.to(tl.float64), axis=0)
            begin += CHUNK
        token = tl.load(ids_row + tl.minimum(hit, last_kept), mask=num > 0, other=0)
        tl.store(out_ptr + row, token.to(tl.int64))


@triton.jit
def _mass(x, mask, base, scale):
    """float64 sum of the weights under the mask"""
    return tl.sum(tl.where(mask, tl.exp2((x - base) * scale), 0.0).to(tl.float64), axis=0)


@triton.jit
def _kth_largest(values, k, top):
    """The k-th largest of a vector whose largest is `top`, by bisection over its bits."""
    order = _order(values)
    floor, last = tl.min(order, axis=0).to(tl.int64), _order(top).to(tl.int64)
    while floor < last:
        middle = floor + ((last - floor + 1) >> 1)
        enough = tl.sum((order >= middle).to(tl.int32), axis=0) >= k
        floor = tl.where(enough, middle, floor)
        last = tl.where(enough, last, middle - 1)
    bits = floor.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _logprobs_kernel(  # noqa: PLR0913
    logits_ptr,
    token_ids_ptr,
    num_top_ptr,
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
    num_top = tl.load(num_top_ptr + row)
    if num_top >= 0:
        logits_row = logits_ptr + row * row_stride
        block = tl.arange(0, BLOCKS_POW2)
        top = tl.load(max_ptr + row * BLOCKS + block, mask=block < BLOCKS, other=float("-inf"))
        best = tl.max(top, axis=0)
        sums = tl.load(sum_ptr + row * BLOCKS + block, mask=block < BLOCKS, other=0.0)
        total = tl.sum(sums.to(tl.float64) * tl.exp2((top - _finite(best)) * _LOG2_E).to(tl.float64), axis=0)
        norm = _finite(best).to(tl.float64) + tl.log(total)
        chosen = tl.load(logits_row + tl.load(token_ids_ptr + row))
        tl.store(logprob_ptr + row, chosen.to(tl.float64) - norm)
        group, lane = tl.arange(0, GROUPS_POW2), tl.arange(0, NEIGHBOURS)
        left = tl.load(neighbours_ptr + row * GROUPS + group, mask=group < GROUPS, other=float("-inf"))
        for n in range(0, num_top):
            value = tl.max(left, axis=0)
            place = tl.min(tl.where((left == value) & (group < GROUPS), group, GROUPS - 1), axis=0)
            token = place * NEIGHBOURS + lane
            x = tl.load(logits_row + token, mask=token < V, other=float("-inf"))
            x = tl.minimum(x, _LARGEST)
            # What came before in the order (value, then id) is taken: equal values of this group up to `previous`.
            previous = -1
            if n > 0:
                last_value = tl.load(top_logprobs_ptr + row * width + n - 1)
                previous = tl.load(top_ids_ptr + row * width + n - 1)
                previous = tl.where(last_value == value.to(tl.float64), previous, -1)
            first = tl.min(tl.where((x == value) & (token > previous), token, V - 1), axis=0)
            tl.debug_barrier()
            tl.store(top_ids_ptr + row * width + n, first)
            tl.store(top_logprobs_ptr + row * width + n, value.to(tl.float64))
            tl.debug_barrier()
            rest = (x < value) | ((x == value) & (token > first))
            left = tl.where(group == place, tl.max(tl.where(rest, x, float("-inf")), axis=0), left)
        for n in range(0, num_top):
            value = tl.load(top_logprobs_ptr + row * width + n)
            tl.debug_barrier()
            tl.store(top_logprobs_ptr + row * width + n, value - norm)


def sample(logits: Tensor, rows: SampleRows, workspace: Workspace, out: Tensor) -> None:
    """logits [N, V] fp32 as edited -> out [N] int64. Rows without any weight give id 0."""
    num_rows, vocab_size = _check_logits(logits)
    w, stride = workspace, logits.stride(0)
    blocks = w.block_max.shape[1]
    if blocks != triton.cdiv(vocab_size, _BLOCK) or w.block_max.shape[0] < num_rows or out.dtype != torch.int64:
        raise ValueError(
            f"got logits {tuple(logits.shape)}, out {out.dtype}, workspace of {tuple(w.candidate_ids.shape)}; "
            "need its size and int64."
        )
    blocks_pow2, groups = triton.next_power_of_2(blocks), w.neighbours.shape[1]
    how = (rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.seeds, rows.positions)
    _stats(logits, rows.temperature, None, w)
    _draw_kernel[(num_rows,)](
        logits, *how, w.block_max, w.block_argmax, w.block_sum, out, stride, vocab_size, blocks, blocks_pow2, _BLOCK,
        num_warps=8,
    )  # fmt: skip
    _truncated_kernel[(num_rows,)](
        logits, *how, w.block_max, w.block_sum, w.neighbours, w.groups, w.candidate_logits, w.candidate_ids, out,
        stride, vocab_size, blocks, blocks_pow2, groups, triton.next_power_of_2(groups), _NEIGHBOURS, _CHUNK,
        num_warps=8,
    )  # fmt: skip


def logprobs(
    logits: Tensor, token_ids: Tensor, num_top: Tensor, workspace: Workspace, top: tuple[Tensor, Tensor]
) -> Tensor:
    """Raw logits [N, V] fp32, token_ids [N] int64, num_top [N] int32 (-1 = none) -> [N] float64 logprobs of token_ids.

    The best num_top of each row go into `top` = (ids [N, n] int32, logprobs [N, n] float64), equal ones by id.
    """
    num_rows, vocab_size = _check_logits(logits)
    w = workspace
    blocks, groups = w.block_max.shape[1], w.neighbours.shape[1]
    result = torch.empty(num_rows, dtype=torch.float64, device=logits.device)
    _stats(logits, None, num_top, w)
    _logprobs_kernel[(num_rows,)](
        logits, token_ids, num_top, w.block_max, w.block_sum, w.neighbours, result, *top, logits.stride(0), vocab_size,
        top[0].shape[1], blocks, triton.next_power_of_2(blocks), groups, triton.next_power_of_2(groups), _NEIGHBOURS,
        num_warps=4,
    )  # fmt: skip
    return result


def _stats(logits: Tensor, temperature: Tensor | None, wanted: Tensor | None, w: Workspace) -> None:
    blocks = w.block_max.shape[1]
    _stats_kernel[(logits.shape[0], blocks)](
        logits, temperature, wanted, w.block_max, w.block_argmax, w.block_sum, w.neighbours, logits.stride(0),
        logits.shape[1], blocks, _BLOCK, _NEIGHBOURS, num_warps=8,
    )  # fmt: skip


def _check_logits(logits: Tensor) -> tuple[int, int]:
    if logits.dim() != 2 or logits.dtype != torch.float32 or logits.stride(1) != 1 or logits.shape[0] == 0:
        raise ValueError(f"got logits {tuple(logits.shape)} {logits.dtype}; need [N >= 1, V] fp32, contiguous rows.")
    return logits.shape[0], logits.shape[1]
