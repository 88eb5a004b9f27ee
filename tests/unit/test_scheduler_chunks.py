"""How long steps get: prompts in chunks beside rows that decode, under a target of the time between tokens."""

from __future__ import annotations

import pytest

from nmoe_backend.step_buckets import choose_bucket, step_buckets
from nmoe_backend.types import StepPlan
from tests.fakes import make_limits
from tests.stepping import Steps, only


def test_a_long_prompt_is_chunked_and_the_decoding_go_on_in_every_step() -> None:
    steps = Steps(make_limits(num_ranks=1, num_pages=64, max_seq_len=200, max_prefill_tokens=48))
    runner = steps.add(1, 4, max_tokens=30)
    steps.step()
    long = steps.add(2, 150, max_tokens=2)
    shares = []
    while not long.is_done:
        shares.append(only(steps.step()))
        assert len(shares[-1].token_ids) <= 48
    chunks = [share for share in shares if share.token_ids]
    assert len(chunks) >= 4 and all(share.num_decode >= 1 for share in chunks)
    steps.run()
    assert len(runner.token_ids) == 30


def test_steps_stay_under_the_target_while_somebody_decodes() -> None:
    """Virtual time: 5 ms + 0.1 ms a prefill token. A target of 20 ms leaves room for about 150 tokens."""
    steps = Steps(
        make_limits(num_ranks=2, num_pages=2048, max_seq_len=4096, max_prefill_tokens=2048, itl_target_ms=20.0)
    )
    steps.add(1, 4, max_tokens=400)
    for _ in range(20):
        steps.step()
    before = len(steps.times_s)
    prompts = [steps.add(i, 2000, max_tokens=2) for i in (2, 3, 4)]
    chunks: list[int] = []
    while not all(sink.is_done for sink in prompts):
        plan = steps.step()
        assert plan is not None
        assert steps.scheduler.predicted_step_s <= 0.020
        if steps.scheduler.num_new:
            assert any(share.token_ids for share in plan.ranks), "a waiting prompt did not advance"
        chunks += [len(share.token_ids) for share in plan.ranks if share.token_ids]
    assert max(steps.times_s[before:]) <= 0.020 * 1.10, "while it learns, predictions are a little off"
    assert max(steps.times_s[before + 20 :]) <= 0.020 * 1.01
    assert max(chunks) >= 100, "the room is used"


class PaddedSteps(Steps):
    """A step takes what its bucket computes: 5 ms, 3 ms more with prefill, 0.02 ms a token, padding included."""

    def seconds(self, plan: StepPlan) -> float:
        bucket = choose_bucket(step_buckets(self.limits), plan)
        return 0.005 + 2e-5 * bucket.size + (0.003 if bucket.tokens else 0.0)


def test_padded_steps_stay_under_the_target_too() -> None:
    """64 decode rows beside prefill leave 45 - 8 - 1.3 ms: 1,024 tokens, and not the 2,048 that 1,785 would take."""
    limits = make_limits(
        num_ranks=2, num_pages=4096, max_seq_len=4096, max_batch_size=64, max_prefill_tokens=4096, min_chunk=128,
        pads_steps=True, itl_target_ms=45.0,
    )  # fmt: skip
    steps = PaddedSteps(limits)
    for request_id in range(1, 5):
        steps.add(request_id, 4, max_tokens=600)
    for index in range(400):
        if index % 25 == 0:
            steps.add(100 + index, (300, 4000, 1100)[index // 25 % 3], max_tokens=3)
        steps.step()
    assert max(steps.times_s[1:]) <= 0.045 * 1.001
    assert max(steps.times_s[200:]) >= 0.045 * 0.6, "the room is used"


def test_a_hopeless_target_leaves_a_prompt_what_its_bucket_computes_anyway() -> None:
    """Behind 8,192 keys the smallest bucket is 512 tokens: all are taken as soon as so many were ever measured."""
    limits = make_limits(
        num_ranks=1, num_pages=4096, max_seq_len=16384, max_batch_size=4, max_prefill_tokens=1024, min_chunk=128,
        pads_steps=True, itl_target_ms=0.001,
    )  # fmt: skip
    steps = PaddedSteps(limits)
    steps.add(1, 4, max_tokens=1000)
    for _ in range(5):
        steps.step()
    prompt = steps.add(2, 10000, max_tokens=2)
    chunks = []
    while not prompt.is_done:
        chunks += [len(share.token_ids) for share in (steps.step() or StepPlan(step_id=0, ranks=())).ranks]
    assert chunks[:64] == [128] * 64
    assert chunks[64:70] == [256, 256, 512, 512, 272, 0]


def test_an_untrained_model_grows_its_chunks_step_by_step() -> None:
    steps = Steps(
        make_limits(num_ranks=1, num_pages=2048, max_seq_len=4096, max_prefill_tokens=4096, itl_target_ms=30.0)
    )
    steps.add(1, 4, max_tokens=100)
    steps.step()
    steps.add(2, 4000, max_tokens=2)
    chunks = [len(only(steps.step()).token_ids) for _ in range(6)]
    assert chunks[0] == 32
    assert all(later <= max(32, 2 * max(chunks[:i])) for i, later in enumerate(chunks) if i)
    assert max(steps.times_s) <= 0.030


@pytest.mark.parametrize(
    ("limit", "chunks"),
    [({}, [32, 32, 32, 32, 22]), ({"min_chunk": 50}, [50, 50, 50]), ({"min_chunk": 128}, [64, 64, 22])],
)
def test_the_first_prompt_of_a_rank_advances_even_when_the_target_is_hopeless(limit, chunks) -> None:
    limits = make_limits(
        num_ranks=1, num_pages=64, max_seq_len=200, max_prefill_tokens=64, itl_target_ms=0.001, **limit
    )
    steps = Steps(limits)
    steps.add(1, 4, max_tokens=60)
    for _ in range(10):
        steps.step()
    prompt = steps.add(2, 150, max_tokens=2)
    assert [len(only(steps.step()).token_ids) for _ in chunks] == chunks
    steps.run()
    assert prompt.finish_reason == "length"


def test_nobody_decodes_so_the_whole_budget_is_used() -> None:
    steps = Steps(make_limits(num_ranks=1, num_pages=64, max_seq_len=200, max_prefill_tokens=64, itl_target_ms=0.001))
    steps.add(1, 150)
    assert len(only(steps.step()).token_ids) == 64
