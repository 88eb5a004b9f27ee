"""Which sizes of a padded step are prepared, and which one a step takes. Arithmetic, no tensor.

A bucket bounds three sizes of a step, each that of the rank that has most: decode rows, prefill tokens, and the keys
that its prefill attends to. Tokens are computed, padding included; rows and keys that are not there cost launches only.
So tokens come in powers of two, while decode rows beside prefill are none or the most, and keys go up in fours:
    decode        1, 2, 4, ... 64, then multiples of 64 rows, no prefill
    prefill       128, 256, 512, ... tokens, with and without decode rows, over prefixes of the usual lengths
    long prefill  few sizes, with decode rows, over the keys that prefill has not; the more keys, the fewer sizes, for
                  every 8,192 keys are three more launches a layer to capture
Example: 256 sequences of up to 131,072 tokens, 8,448 pages of 64, steps of 4,096 prefill tokens: 10 + 12 + 6 buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nmoe_backend.types import KEY_BLOCK, EngineLimits, RankPlan, StepPlan

FEWEST_TOKENS = 128  # of a prefill step, computed whether they are there or not
_USUAL_KEYS = 8192  # or twice the tokens, where that is more
_LONG_TOKENS = ((512, 2048), (512,))  # beside the most tokens: for the first size of long keys; for the second


@dataclass(frozen=True, order=True, slots=True)
class Bucket:
    """What a prepared step holds, in the order in which sizes cost."""

    tokens: int  # prefill tokens; 0: a decode step
    keys: int  # of prefill, each row's in whole blocks of KEY_BLOCK
    rows: int  # decode rows

    @property
    def size(self) -> int:
        """Tokens that are computed."""
        return self.rows + self.tokens

    def holds(self, other: Bucket) -> bool:
        return self.tokens >= other.tokens and self.keys >= other.keys and self.rows >= other.rows

    def __str__(self) -> str:
        if not self.tokens:
            return f"{self.rows} decode rows"
        return f"{self.tokens} prefill tokens over {self.keys} keys, {self.rows} decode rows"


def decode_buckets(max_batch_size: int) -> tuple[Bucket, ...]:
    """Powers of two up to 64 rows, then multiples of 64, and the limit itself."""
    sizes = [1, 2, 4, 8, 16, 32, *range(64, max_batch_size, 64)]
    return tuple(Bucket(0, 0, rows) for rows in (*(size for size in sizes if size < max_batch_size), max_batch_size))


def step_buckets(limits: EngineLimits) -> tuple[Bucket, ...]:
    """All that an engine needs, in ascending order: the last one holds every step."""
    most_rows, most_tokens, most_keys = limits.max_batch_size, limits.max_prefill_tokens, max_keys(limits)
    sizes = [*_powers(FEWEST_TOKENS, most_tokens, 2), most_tokens]
    usual = {tokens: min(most_keys, max(_USUAL_KEYS, 2 * tokens)) for tokens in sizes}
    prefill = [Bucket(tokens, keys, rows) for tokens, keys in usual.items() for rows in (0, most_rows)]
    long = []
    for index, keys in enumerate((*_powers(4 * _USUAL_KEYS, most_keys // 2, 4), most_keys)):
        few = _LONG_TOKENS[index] if index < len(_LONG_TOKENS) else ()
        wanted = [tokens for tokens in sizes if tokens in (*few, most_tokens) and keys > usual[tokens]]
        long += [Bucket(tokens, keys, most_rows) for tokens in wanted]
    return (*decode_buckets(most_rows), *sorted(prefill + long))


def max_keys(limits: EngineLimits) -> int:
    """Keys of all sequences of a rank together, each one's in whole blocks: its pages hold no more tokens."""
    longest = -(-limits.max_seq_len // KEY_BLOCK) * KEY_BLOCK
    in_pages = limits.num_pages * limits.page_size + limits.max_batch_size * KEY_BLOCK
    return min(limits.max_batch_size * longest, -(-in_pages // KEY_BLOCK) * KEY_BLOCK)


def cheapest(buckets: Sequence[Bucket], needed: Bucket) -> Bucket:
    """The first of `buckets`, in ascending order, that holds so much. Where nobody prefills, one without prefill."""
    for bucket in buckets:
        if bucket.holds(needed) and bool(bucket.tokens) == bool(needed.tokens):
            return bucket
    raise AssertionError(f"a step of {needed}; none of those prepared holds it: {[str(b) for b in buckets]}")


def choose_bucket(buckets: Sequence[Bucket], step: StepPlan) -> Bucket:
    """The cheapest one that holds every rank's share: the same on all ranks."""
    sizes = [_size_of(plan) for plan in step.ranks]
    return cheapest(buckets, Bucket(*(max(size[column] for size in sizes) for column in range(3))))


def keys_of(start: int, length: int) -> int:
    """What a chunk that begins at position `start` attends to, as it counts for a bucket."""
    return -(-(start + length) // KEY_BLOCK) * KEY_BLOCK


def _size_of(plan: RankPlan) -> tuple[int, int, int]:
    """Prefill tokens, keys, decode rows."""
    keys = sum(keys_of(plan.starts[row], plan.lengths[row]) for row in range(plan.num_decode, len(plan.slots)))
    return len(plan.token_ids), keys, plan.num_decode


def _powers(first: int, end: int, factor: int) -> list[int]:
    """first, first * factor, ... below end"""
    found = []
    while first < end:
        found.append(first)
        first *= factor
    return found
