"""Steps from static columns, on a CPU: what is computed from them is what a table without padding is told by the host.

The reference is the eager path (runtime/eager_steps.py), which the gate tests hold against transformers.
"""

from __future__ import annotations

import pytest

from nmoe_backend import warmup
from nmoe_backend.layers import context as layer_context
from nmoe_backend.models import load_spec
from nmoe_backend.step_buckets import Bucket, step_buckets
from nmoe_backend.types import RankPlan, SamplingParams, SlotInit
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


def test_a_decode_row_that_yields_no_token_is_refused(tiny_model, padded):
    replica = Replica(tiny_model, 1)
    with pytest.raises(AssertionError, match="1 decode rows, and not each of them yields a token"):
        replica.step(RankPlan(slots=[0], starts=[3], lengths=[1], num_decode=1, samples=[False]))
    replica.close()
