"""Steps from static columns, on a CPU: what is computed from them is what a table without padding is told by the host.

The reference is the eager path (runtime/eager_steps.py), which the gate tests hold against transformers.
"""

from __future__ import annotations

import random

import pytest

from nmoe_backend import warmup
from nmoe_backend.layers import context as layer_context
from nmoe_backend.models import load_spec
from nmoe_backend.step_buckets import Bucket, choose_bucket, decode_buckets, max_keys, step_buckets
from nmoe_backend.types import RankPlan, SamplingParams, SlotInit, StepPlan
from tests.gates.replica import Driver, Replica, limits_for
from tests.generation import serve_config
from tests.padded import assert_close, padded_table

PROMPTS = [list(range(40, 103)), [5, 6, 7], [9], list(range(100, 149)), list(range(7, 27))]
NUM_TOKENS = 6


def run(model, world_size: int, buckets: tuple[Bucket, ...] = (), chunk: int = 24, page_size: int = 16):
    limits = limits_for(world_size, page_size, max_prefill_tokens=160, max_batch_size=6)
    replica = Replica(model, world_size, limits=limits, buckets=buckets)
    results = Driver(replica).generate(PROMPTS, NUM_TOKENS, chunk=chunk)
    shapes = {shape for context in replica.layer_contexts for shape in getattr(context.ops, "shapes", ())}
    replica.close()
    return results, shapes


@pytest.fixture
def padded(monkeypatch):
    """Replicas made after this pad their steps."""
    monkeypatch.setattr(layer_context, "build_table", padded_table)


@pytest.fixture(scope="module")
def plain(tiny_model):
    return run(tiny_model, 1)[0]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("chunk", "page_size"), [(24, 16), (7, 64), (63, 16)])
def test_padded_steps_give_what_steps_of_any_size_give(tiny_model, plain, padded, world_size, chunk, page_size):
    """Decode, prefill and mixed steps, ranks without rows, prompts in chunks that end inside pages and blocks."""
    results, shapes = run(tiny_model, world_size, chunk=chunk, page_size=page_size)
    assert_close(results, plain)
    assert {(1, 1), (128, 0), (134, 6)} <= shapes  # decode; prefill; both


def test_one_bucket_for_every_kind_of_step(tiny_model, plain, padded):
    decode, prefill = Bucket(0, 0, 6), Bucket(160, 6 * 512, 6)
    results, shapes = run(tiny_model, 1, (decode, prefill))
    assert_close(results, plain)
    assert shapes == {(6, 6), (166, 6)}


def test_embeddings_and_prompt_logprobs_come_from_the_padded_hidden_states(tiny_model, padded, monkeypatch):
    prompt = tuple(range(40, 75))
    init = SlotInit(slot=1, sampling=SamplingParams(num_prompt_logprobs=0), prompt_ids=prompt, embed=True)
    outputs = []
    for is_padded in (True, False):
        if not is_padded:
            monkeypatch.undo()
        replica = Replica(tiny_model, 1)
        for start, stop in ((0, 20), (20, 35)):
            pages = [(1, index, 3 + index) for index in range(-(-stop // 16)) if start <= index * 16]
            plan = RankPlan(
                slots=[1], starts=[start], lengths=[stop - start], token_ids=prompt[start:stop], samples=[False],
                new_pages=pages, admitted=[] if start else [init],
            )  # fmt: skip
            outputs += replica.step(plan)
        replica.close()
    first, last, plain_first, plain_last = outputs
    assert first.embeddings == plain_first.embeddings == {}
    assert last.embeddings[0] == pytest.approx(plain_last.embeddings[0], abs=1e-5)
    for ours, theirs in ((first, plain_first), (last, plain_last)):
        found = [entry.logprob for entry in ours.prompt_logprobs[0]]
        assert found == pytest.approx([entry.logprob for entry in theirs.prompt_logprobs[0]], abs=1e-4)


def test_more_pages_than_a_step_can_enter_are_refused(tiny_model, padded):
    replica = Replica(tiny_model, 1, limits=limits_for(1, 16, max_batch_size=2, max_prefill_tokens=16))
    init = SlotInit(slot=1, sampling=SamplingParams(), prompt_ids=(1, 2))
    plan = RankPlan(
        slots=[1], starts=[0], lengths=[2], token_ids=[1, 2], samples=[True], admitted=[init],
        new_pages=[(1, index, index) for index in range(4)],
    )  # fmt: skip
    with pytest.raises(AssertionError, match="announces 4 pages; the tokens of a step enter at most 3"):
        replica.step(plan)
    replica.close()


@pytest.mark.parametrize(("pads", "min_chunk"), [(True, 128), (False, 32)])
def test_a_waiting_prompt_advances_by_what_the_smallest_step_computes(
    tiny_checkpoint, tmp_path, monkeypatch, pads, min_chunk
):
    if pads:
        monkeypatch.setattr(layer_context, "build_table", padded_table)
    config = serve_config(tmp_path, tiny_checkpoint, num_ranks=1, max_batch_size=2)
    decode, prefill = Bucket(0, 0, 2), Bucket(256, 1024, 2)
    workers, limits = warmup.build_workers(
        config, config.replicas[0], load_spec(tiny_checkpoint), lambda line: None, (decode, prefill)
    )
    workers[0].close()
    assert limits.min_chunk == min_chunk
    assert not pads or min(bucket.tokens for bucket in step_buckets(limits) if bucket.tokens) == min_chunk


def rows_of(buckets: tuple[Bucket, ...]) -> list[int]:
    return [bucket.rows for bucket in buckets]


def test_decode_steps_are_prepared_up_to_the_limit():
    assert rows_of(decode_buckets(256)) == [1, 2, 4, 8, 16, 32, 64, 128, 192, 256]
    assert rows_of(decode_buckets(100)) == [1, 2, 4, 8, 16, 32, 64, 100]
    assert rows_of(decode_buckets(1)) == [1]


PRODUCTION = {"max_batch_size": 256, "max_prefill_tokens": 4096, "max_seq_len": 131072, "num_pages": 8448}


def test_the_documented_buckets():
    buckets = step_buckets(limits_for(8, 64, **PRODUCTION))
    most = 8448 * 64 + 256 * 128
    assert len(buckets) == 10 + 12 + 6
    assert [b for b in buckets if b.keys > 8192] == [
        *(Bucket(512, keys, 256) for keys in (32768, 131072)),
        Bucket(2048, 32768, 256),
        *(Bucket(4096, keys, 256) for keys in (32768, 131072, most)),
    ]
    assert all(buckets[-1].holds(bucket) for bucket in buckets)


def random_plan(rng: random.Random, limits) -> RankPlan:
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


@pytest.mark.parametrize("overrides", [PRODUCTION, {"max_prefill_tokens": 100, "max_seq_len": 90}], ids=str)
def test_every_step_within_the_limits_finds_the_cheapest_bucket_that_holds_it(overrides):
    limits = limits_for(2, 64, **overrides)
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


def test_a_step_without_rows_takes_the_smallest():
    assert choose_bucket(step_buckets(limits_for(2, 64)), StepPlan(step_id=1, ranks=(RankPlan(), RankPlan()))).size == 1


def test_a_decode_row_that_yields_no_token_is_refused(tiny_model, padded):
    replica = Replica(tiny_model, 1)
    with pytest.raises(AssertionError, match="1 decode rows, and not each of them yields a token"):
        replica.step(RankPlan(slots=[0], starts=[3], lengths=[1], num_decode=1, samples=[False]))
    replica.close()


def test_a_step_that_nothing_was_prepared_for_is_an_error():
    step = StepPlan(step_id=1, ranks=(RankPlan(slots=[0], starts=[3], lengths=[1], num_decode=1, samples=[True]),))
    with pytest.raises(AssertionError, match="a step of 1 decode rows; none"):
        choose_bucket((Bucket(128, 8192, 4),), step)
