"""Weights of tokens relative to the best one's, orders of fp32 values, and the random number of a draw."""

# A jit function has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(3.4028234663852886e38)  # +inf counts as this: an infinite weight would put a draw past the end
LOG2_E = tl.constexpr(1.4426950408889634)
NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def log2_scale(temperature):
    """Weights are 2 ** ((logit - max) * this). Kept finite and not 0, so that 0 * -inf cannot come up."""
    safe = tl.where(temperature > 0, temperature, 1.0)
    return tl.minimum(tl.maximum(LOG2_E / safe, 1e-37), LARGEST).to(tl.float32)


@triton.jit
def finite(top):
    """A maximum to subtract: 0 where everything is -inf."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def order(x):
    """int32 of the same order as the fp32 values; -0.0 counts as 0.0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def mass(x, mask, base, scale):
    """float64 sum of the weights under the mask"""
    return tl.sum(tl.where(mask, tl.exp2((x - base) * scale), 0.0).to(tl.float64), axis=0)


@triton.jit
def block_maxima(max_ptr, row, BLOCKS: tl.constexpr, BLOCKS_POW2: tl.constexpr):
    """[BLOCKS_POW2] maxima of a row's blocks, -inf behind the last; and the row's, to subtract"""
    block = tl.arange(0, BLOCKS_POW2)
    top = tl.load(max_ptr + row * BLOCKS + block, mask=block < BLOCKS, other=float("-inf"))
    return top, finite(tl.max(top, axis=0))


@triton.jit
def block_sums(sum_ptr, row, top, base, scale, BLOCKS: tl.constexpr, BLOCKS_POW2: tl.constexpr):
    """[BLOCKS_POW2] float64 sums of weights, relative to the row's maximum"""
    block = tl.arange(0, BLOCKS_POW2)
    sums = tl.load(sum_ptr + row * BLOCKS + block, mask=block < BLOCKS, other=0.0)
    return sums.to(tl.float64) * tl.exp2((top - base) * scale).to(tl.float64)


@triton.jit
def uniform(seed, position):
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
