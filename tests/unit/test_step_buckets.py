"""Which sizes of padded steps are prepared, and that each step within the limits finds the cheapest that holds it."""

from __future__ import annotations

import random

import pytest

from nmoe_backend.step_buckets import Bucket, choose_bucket, decode_buckets, max_keys, step_buckets
from nmoe_backend.types import EngineLimits, RankPlan, StepPlan
from tests.fakes import make_limits

PRODUCTION = {
    "max_batch_size": 256, "max_prefill_tokens": 4096, "max_seq_len": 131072, "num_pages": 8448, "page_size": 64
}  # fmt: skip
SMALL = {"max_batch_size": 8, "max_prefill_tokens": 100, "max_seq_len": 90, "num_pages": 32, "page_size": 64}


def rows_of(buckets: tuple[Bucket, ...]) -> list[int]:
    return [bucket.rows for bucket in buckets]


def test_decode_steps_are_prepared_up_to_the_limit() -> None:
    assert rows_of(decode_buckets(256)) == [1, 2, 4, 8, 16, 32, 64, 128, 192, 256]
    assert rows_of(decode_buckets(100)) == [1, 2, 4, 8, 16, 32, 64, 100]
    assert rows_of(decode_buckets(1)) == [1]


def test_the_documented_buckets() -> None:
    buckets = step_buckets(make_limits(**PRODUCTION))
    most = 8448 * 64 + 256 * 128
    assert len(buckets) == 10 + 12 + 6
    assert [b for b in buckets if b.keys > 8192] == [
        *(Bucket(512, keys, 256) for keys in (32768, 131072)),
        Bucket(2048, 32768, 256),
        *(Bucket(4096, keys, 256) for keys in (32768, 131072, most)),
    ]
    assert all(buckets[-1].holds(bucket) for bucket in buckets)


def random_plan(rng: random.Random, limits: EngineLimits) -> RankPlan:
    """Any rows within the limits: what their pages hold bounds them together."""
    pages = limits.num_pages
    plan = {"slots": [], "starts": [], "lengths": [], "num_decode": 0, "token_ids": []}
    tokens = rng.choice((0, limits.max_prefill_tokens, rng.randrange(limits.max_prefill_tokens + 1)))
    for slot in range(rng.randrange(limits.max_batch_size + 1)):
        end = rng.choice((limits.max_seq_len, 1 + rng.randrange(limits.max_seq_len)))
        decodes = slot < limits.max_batch_size // 2
        length = 1 if decodes else rng.randrange(1, tokens + 1) if tokens else 0
        pages -= -(-end // limits.page_size)
        if pages < 0 or not 0 < length <= end:
            break
        tokens -= 0 if decodes else length
        plan["slots"].append(slot)
        plan["starts"].append(end - length)
        plan["lengths"].append(length)
        plan["num_decode"] += decodes
        plan["token_ids"] += [0] * (0 if decodes else length)
    return RankPlan(**plan)


@pytest.mark.parametrize("changes", [PRODUCTION, SMALL], ids=["production", "small"])
def test_every_step_within_the_limits_finds_the_cheapest_bucket_that_holds_it(changes: dict[str, int]) -> None:
    limits = make_limits(**changes)
    buckets, rng = step_buckets(limits), random.Random(5)
    for _ in range(300):
        plans = tuple(random_plan(rng, limits) for _ in range(2))
        rows, tokens = max(plan.num_decode for plan in plans), max(len(plan.token_ids) for plan in plans)
        if not rows and not tokens:
            continue
        bucket = choose_bucket(buckets, StepPlan(step_id=1, ranks=plans))
        assert bucket.rows >= rows and bucket.tokens >= tokens and (bucket.tokens > 0) == (tokens > 0)
        keys = [
            sum(
                -(-(plan.starts[row] + plan.lengths[row]) // 128) * 128
                for row in range(plan.num_decode, len(plan.slots))
            )
            for plan in plans
        ]
        assert max(keys) <= bucket.keys or not tokens
        assert max(keys) <= max_keys(limits)
        cheaper = [b for b in buckets if b < bucket and (b.tokens > 0) == (tokens > 0)]
        assert not any(b.rows >= rows and b.tokens >= tokens and b.keys >= max(keys) for b in cheaper)


def test_a_step_without_rows_takes_the_smallest() -> None:
    assert choose_bucket(step_buckets(make_limits()), StepPlan(step_id=1, ranks=(RankPlan(), RankPlan()))).size == 1


def test_a_step_that_nothing_was_prepared_for_is_an_error() -> None:
    step = StepPlan(step_id=1, ranks=(RankPlan(slots=[0], starts=[3], lengths=[1], num_decode=1, samples=[True]),))
    with pytest.raises(AssertionError, match="a step of 1 decode rows; none"):
        choose_bucket((Bucket(128, 8192, 4),), step)
