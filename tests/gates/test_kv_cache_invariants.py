"""Gate: whatever arrives, is cancelled or preempted, no page is leaked, shared or freed twice, and every request ends.

Hypothesis drives scheduler and cache; the ranks are PlanCheckers, which see pages only through the plans, as a real
rank does, and assert that every position is written once, in a page that this sequence owns at that time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import pytest
from hypothesis import given, settings, strategies as st

from nmoe_backend.scheduler import Scheduler
from nmoe_backend.types import EngineLimits, RankOutput, Request, StepPlan
from tests.fakes import CollectingSink, PlanChecker, expected_tokens, hash_token, make_limits, make_request

VOCAB_SIZE = 50
EOS_ID = 7


@dataclass
class Arrival:
    step: int
    prompt_len: int
    max_tokens: int
    min_tokens: int
    priority: int
    cancel_after: int | None  # steps after its arrival
    num_prompt_logprobs: int | None
    embed: bool


arrivals = st.builds(
    Arrival,
    step=st.integers(0, 12),
    prompt_len=st.integers(1, 24),
    max_tokens=st.integers(0, 24),
    min_tokens=st.sampled_from([0, 0, 3]),
    priority=st.sampled_from([0, 0, 0, 1, 5]),
    cancel_after=st.one_of(st.none(), st.none(), st.integers(0, 20)),
    num_prompt_logprobs=st.sampled_from([None, None, 0]),
    embed=st.sampled_from([False, False, False, True]),
)

limits_strategy = st.builds(
    make_limits,
    num_ranks=st.integers(1, 3),
    num_pages=st.integers(12, 20),
    page_size=st.sampled_from([4, 5]),
    max_batch_size=st.integers(1, 6),
    max_prefill_tokens=st.sampled_from([1, 3, 16, 64]),
    max_seq_len=st.just(48),
    itl_target_ms=st.sampled_from([0.001, 5.0, 1e9]),
    eos_token_ids=st.just((EOS_ID,)),
    vocab_size=st.just(VOCAB_SIZE),
)


class Replica:
    """Scheduler and pretended ranks; `depth` steps may be under way before the oldest is committed."""

    def __init__(self, limits: EngineLimits, depth: int) -> None:
        self.limits = limits
        self.depth = depth
        self.scheduler = Scheduler(limits)
        self.ranks = [PlanChecker(limits, idx, hash_token) for idx in range(limits.num_ranks)]
        self.under_way: deque[tuple[StepPlan, list[RankOutput]]] = deque()

    def step(self) -> None:
        plan = self.scheduler.schedule()
        self.scheduler.check_invariants()
        if plan is not None:
            self.under_way.append((plan, [rank.run(plan) for rank in self.ranks]))
        if self.under_way and (plan is None or len(self.under_way) >= self.depth):
            oldest, outputs = self.under_way.popleft()
            tokens = max(len(share.token_ids) for share in oldest.ranks)
            rows = max(share.num_decode for share in oldest.ranks)
            self.scheduler.commit(oldest.step_id, outputs, elapsed_s=0.002 + 1e-5 * rows + 1e-4 * tokens)
            self.scheduler.check_invariants()


def run(replica: Replica, todo: list[Arrival]) -> list[tuple[Arrival, Request, CollectingSink]]:
    """Play the arrivals and cancellations; returns when nothing is left, which must take a bounded number of steps."""
    waiting = sorted(enumerate(todo), key=lambda item: item[1].step)
    started: list[tuple[Arrival, Request, CollectingSink]] = []
    cancels: list[tuple[int, int]] = []
    step = 0
    while waiting or replica.scheduler.num_live or replica.under_way:
        while waiting and waiting[0][1].step <= step:
            request_id, arrival = waiting.pop(0)
            prompt = [(request_id * 31 + pos) % VOCAB_SIZE for pos in range(arrival.prompt_len)]
            request = make_request(
                request_id,
                prompt,
                0 if arrival.embed else arrival.max_tokens,
                min_tokens=arrival.min_tokens,
                priority=arrival.priority,
                embed=arrival.embed,
                num_prompt_logprobs=arrival.num_prompt_logprobs,
            )
            sink = CollectingSink()
            replica.scheduler.add(request, sink)
            started.append((arrival, request, sink))
            if arrival.cancel_after is not None:
                cancels.append((step + arrival.cancel_after, request_id))
        for _, request_id in [entry for entry in cancels if entry[0] == step]:
            replica.scheduler.abort(request_id, "cancelled")
            replica.scheduler.check_invariants()
        replica.step()
        step += 1
        assert step < 20_000, "no end in sight"
    return started


def check_results(replica: Replica, started: list[tuple[Arrival, Request, CollectingSink]]) -> None:
    for arrival, request, sink in started:
        assert sink.is_done
        reference = expected_tokens(request, replica.limits)
        if sink.finish_reason == "cancelled":
            assert arrival.cancel_after is not None
            assert sink.token_ids == reference[: len(sink.token_ids)]
            continue
        if arrival.embed:
            assert sink.embedding == [float(sum(request.prompt_ids))] and sink.finish_reason == "stop"
        else:
            assert sink.token_ids == reference
            stopped = tuple(reference[-1:]) == replica.limits.eos_token_ids and len(reference) > arrival.min_tokens
            assert sink.finish_reason == ("stop" if stopped else "length")
        if arrival.num_prompt_logprobs is not None:
            assert sink.prompt_logprobs is not None
            assert [entry.token_id for entry in sink.prompt_logprobs] == list(request.prompt_ids[1:])
            assert [entry.logprob for entry in sink.prompt_logprobs] == [
                -float(i) for i in range(1, arrival.prompt_len)
            ]
    for rank in replica.scheduler.planner.ranks:
        assert rank.pool.num_free == rank.pool.num_pages
        assert len(rank.free_slots) == replica.limits.max_batch_size


@given(limits=limits_strategy, depth=st.integers(1, 3), todo=st.lists(arrivals, min_size=1, max_size=24))
@settings(max_examples=300, deadline=None)
def test_no_page_is_leaked_shared_or_freed_twice_and_every_request_ends_with_the_right_tokens(
    limits: EngineLimits, depth: int, todo: list[Arrival]
) -> None:
    replica = Replica(limits, depth)
    check_results(replica, run(replica, todo))


@pytest.mark.parametrize("depth", [1, 2])
def test_page_exhaustion_preempts_and_the_tokens_stay_the_same(depth: int) -> None:
    limits = make_limits(
        num_ranks=2,
        num_pages=12,
        page_size=4,
        max_seq_len=48,
        max_batch_size=6,
        eos_token_ids=(),
        vocab_size=VOCAB_SIZE,
    )
    replica = Replica(limits, depth)
    todo = [Arrival(i // 4, 5 + i % 7, 24, 0, i % 2, None, None, False) for i in range(24)]
    check_results(replica, run(replica, todo))
    assert replica.scheduler.planner.preemptions_total > 5


def test_plan_stays_within_the_prefill_budget_whatever_arrives() -> None:
    """PlanChecker asserts len(token_ids) <= max_prefill_tokens in every plan; here the budget is hit exactly."""
    limits = make_limits(num_ranks=1, num_pages=64, max_prefill_tokens=10, max_batch_size=8, vocab_size=VOCAB_SIZE)
    replica = Replica(limits, 2)
    for request_id in range(6):
        replica.scheduler.add(make_request(request_id, range(7), 3), CollectingSink())
    first = replica.scheduler.schedule()
    assert first is not None
    assert len(first.ranks[0].token_ids) == 10
    assert list(first.ranks[0].lengths) == [7, 3]
