"""The tokens of greedy rows and of draws from the whole vocabulary, from the statistics of their blocks. Grid: (N,)."""

# A jit function has no types that mypy knows; launchers are typed.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nmoe_backend.kernels.sampling_gpu.stats import BLOCK, RowStats
from nmoe_backend.kernels.sampling_gpu.table import (
    GREEDY,
    KIND,
    PLAIN,
    SEED,
    TEMPERATURE,
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
    uniform,
)


@triton.jit
def _draw_kernel(  # noqa: PLR0913
    logits_ptr,
    sources_ptr,  # None: row n lies at n
    slots_ptr,
    positions_ptr,
    rows_ptr,
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
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    kind = whole(rows_ptr, slot, KIND)
    block = tl.arange(0, BLOCKS_POW2)
    top, base = block_maxima(max_ptr, row, BLOCKS, BLOCKS_POW2)
    if (slot >= 0) & (kind == GREEDY):
        first = tl.min(tl.where(top == tl.max(top, axis=0), block, BLOCKS - 1), axis=0)
        tl.store(out_ptr + row, tl.load(argmax_ptr + row * BLOCKS + first).to(tl.int64))
    elif kind == PLAIN:
        scale = log2_scale(real(rows_ptr, slot, TEMPERATURE))
        sums = block_sums(sum_ptr, row, top, base, scale, BLOCKS, BLOCKS_POW2)
        ends = tl.cumsum(sums, axis=0)
        target = uniform(whole(rows_ptr, slot, SEED), tl.load(positions_ptr + row)) * tl.max(ends, axis=0)
        last = tl.max(tl.where(sums > 0, block, 0), axis=0)
        chosen = tl.minimum(tl.min(tl.where((ends > target) & (sums > 0), block, BLOCKS_POW2), axis=0), last)
        before = tl.sum(tl.where(block < chosen, sums, 0.0), axis=0)
        source = row
        if sources_ptr is not None:
            source = tl.load(sources_ptr + row)
        token = chosen * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + source * row_stride + token, mask=token < V, other=float("-inf"))
        weights = tl.exp2((tl.minimum(x, LARGEST) - base) * scale)
        inside = before + tl.cumsum(weights.to(tl.float64), axis=0)
        hit = tl.min(tl.where((inside > target) & (weights > 0), token, NOWHERE), axis=0)
        last_token = tl.max(tl.where(weights > 0, token, 0), axis=0)
        tl.store(out_ptr + row, tl.minimum(hit, last_token).to(tl.int64))


def draw(
    logits: Tensor, step: StepRows, rows: Tensor, stats: RowStats, out: Tensor, sources: Tensor | None = None
) -> None:
    """-> out [N] int64, of greedy and plain rows. `stats`: row_stats of the same rows. Without any weight: 0."""
    num_rows = step.slots.shape[0]
    vocab_size = check_logits(logits, num_rows)
    _draw_kernel[(num_rows,)](
        logits, sources, step.slots, step.positions, rows, stats.block_max, stats.block_argmax, stats.block_sum, out,
        logits.stride(0), vocab_size, stats.num_blocks, triton.next_power_of_2(stats.num_blocks), BLOCK, num_warps=8,
    )  # fmt: skip
