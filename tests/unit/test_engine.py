"""The engine with its threads, over FakeRanks: overlap, failure, drain, deadlines, overload. Waits on events only."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from nmoe_backend.engine import Engine
from nmoe_backend.types import EngineLimits, ErrorKind, RankError, RankOutput, RequestError
from tests.fakes import CollectingSink, FakeRank, VirtualClock, expected_tokens, make_limits, make_request


@contextmanager
def running(
    limits: EngineLimits, ranks: list[FakeRank] | None = None, clock: Callable[[], float] | None = None
) -> Iterator[tuple[Engine, list[FakeRank]]]:
    ranks = ranks or [FakeRank(limits, idx) for idx in range(limits.num_ranks)]
    engine = Engine(ranks, limits) if clock is None else Engine(ranks, limits, clock=clock)
    engine.start()
    try:
        yield engine, ranks
    finally:
        for rank in ranks:
            rank.gate.set()
        engine.close()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("nmoe-")], "a thread hangs"


def submit(
    engine: Engine, request_id: int, prompt_len: int = 5, max_tokens: int | None = 6, **changes: object
) -> CollectingSink:
    sink = CollectingSink()
    engine.submit(
        make_request(request_id, [(request_id * 7 + i) % 100 for i in range(prompt_len)], max_tokens, **changes), sink
    )
    return sink


def expected(limits: EngineLimits, request_id: int, prompt_len: int = 5, max_tokens: int | None = 6) -> list[int]:
    prompt = [(request_id * 7 + i) % 100 for i in range(prompt_len)]
    return expected_tokens(make_request(request_id, prompt, max_tokens), limits)


def test_requests_from_several_threads_get_exactly_their_tokens_in_spite_of_preemptions() -> None:
    limits = make_limits(num_ranks=2, num_pages=16, max_batch_size=6, max_seq_len=48, page_size=4)
    sinks: dict[int, CollectingSink] = {}
    with running(limits) as (engine, ranks):

        def send(first: int) -> None:
            for i in range(first, first + 12):
                sinks[i] = submit(engine, i, prompt_len=3 + i % 9, max_tokens=20)

        threads = [threading.Thread(target=send, args=(first,)) for first in (0, 12, 24, 36)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i, sink in sinks.items():
            assert sink.wait() == "length"
            assert sink.token_ids == expected(limits, i, 3 + i % 9, 20)
        assert engine.drain(10.0)
        stats = engine.stats()
        assert stats.preemptions_total > 0
        assert (stats.num_running, stats.num_waiting, stats.pages_used) == (0, 0, 0)
        assert stats.generation_tokens_total == 48 * 20
        assert stats.requests_finished_total == {"stop": 0, "length": 48, "cancelled": 0, "error": 0}
        assert all(len(rank.thread_ids) == 1 for rank in ranks), "execute was called from more than one thread"
        assert ranks[0].thread_ids != ranks[1].thread_ids
    assert [rank.num_closed for rank in ranks] == [1, 1]


def test_next_step_is_launched_while_one_runs() -> None:
    limits = make_limits(num_ranks=1)
    rank = FakeRank(limits)
    second_launched = threading.Event()
    execute = rank.execute

    def spy(plan):  # type: ignore[no-untyped-def]
        pending = execute(plan)
        if plan.step_id == 2:
            second_launched.set()
        return pending

    rank.execute = spy  # type: ignore[method-assign]
    rank.gate.clear()  # no step completes
    with running(limits, [rank]) as (engine, _):
        sink = submit(engine, 1)
        assert second_launched.wait(10.0), "step 2 waited for step 1"
        assert sink.token_ids == []
        rank.gate.set()
        assert sink.wait() == "length"


def test_cancel_frees_the_pages_and_finish_ends_as_stop() -> None:
    limits = make_limits(num_ranks=1, max_seq_len=60, num_pages=32)
    with running(limits, [FakeRank(limits, step_s=lambda _: 0.001)]) as (engine, _):
        first, second = submit(engine, 1, max_tokens=55), submit(engine, 2, max_tokens=55)
        first.wait_for_tokens(3)
        engine.cancel(1)
        engine.finish(2)
        engine.cancel(77)
        assert first.wait() == "cancelled" and second.wait() == "stop"
        assert first.error is None and first.token_ids == expected(limits, 1, 5, 55)[: len(first.token_ids)]
        assert engine.drain(10.0) and engine.stats().pages_used == 0


def test_cancel_by_client_id_ends_all_of_that_client_only() -> None:
    limits = make_limits(num_ranks=1, max_seq_len=60, num_pages=64)
    with running(limits, [FakeRank(limits, step_s=lambda _: 0.001)]) as (engine, _):
        sinks = [submit(engine, i, max_tokens=50, client_id=name) for i, name in enumerate(["a", "b", "a"])]
        engine.cancel_by_client_id("a")
        assert [sink.wait() for sink in sinks] == ["cancelled", "length", "cancelled"]
        with pytest.raises(RequestError, match="client id is empty"):
            engine.cancel_by_client_id("")


def test_a_rank_that_raises_fails_every_live_request_once(caplog: pytest.LogCaptureFixture) -> None:
    limits = make_limits(num_ranks=2, max_batch_size=2)
    ranks = [FakeRank(limits, 0), FakeRank(limits, 1, fail_at=4)]
    with caplog.at_level(logging.CRITICAL), running(limits, ranks) as (engine, _):
        sinks = [submit(engine, i, max_tokens=20) for i in range(8)]  # running and waiting ones
        for i, sink in enumerate(sinks):
            assert sink.wait() == "error"
            assert sink.error is not None and sink.error.kind is ErrorKind.ENGINE
            assert "rank 1" in str(sink.error) and "as it was told to" in str(sink.error)
            assert sink.token_ids == expected(limits, i, 5, 20)[: len(sink.token_ids)]
        assert all(rank.aborted.is_set() for rank in ranks), "peers in a barrier would spin on"
        assert not engine.is_alive()
        with pytest.raises(RequestError, match="it failed.*restart") as refusal:
            submit(engine, 99)
        assert refusal.value.kind is ErrorKind.UNAVAILABLE
        assert not engine.drain(1.0)
        assert engine.stats().errors_total["engine"] == 8
    assert len(caplog.records) == 1 and caplog.records[0].exc_info
    assert [rank.num_closed for rank in ranks] == [1, 1]


def test_a_stalled_rank_trips_the_timeout() -> None:
    limits = make_limits(num_ranks=2, rank_timeout_s=0.2)
    ranks = [FakeRank(limits, 0, stall_at=3), FakeRank(limits, 1)]
    with running(limits, ranks) as (engine, _):
        sink = submit(engine, 1, max_tokens=20)
        assert sink.wait() == "error"
        assert sink.error is not None and "did not answer within" in str(sink.error)
        assert len(sink.token_ids) == 2 and not engine.is_alive()


def test_a_rank_that_hangs_in_execute_is_named() -> None:
    limits = make_limits(num_ranks=2, rank_timeout_s=0.2)
    ranks = [FakeRank(limits, 0), FakeRank(limits, 1)]

    def hang(plan: object) -> None:
        ranks[1].aborted.wait(30.0)
        raise RuntimeError("given up")

    ranks[1].execute = hang  # type: ignore[method-assign, assignment]
    with running(limits, ranks) as (engine, _):
        sink = submit(engine, 1)
        assert sink.wait() == "error"
        assert "ranks [1] did not launch step 1 in 0.2 s" in str(sink.error)


def test_a_rank_that_missed_its_peer_is_heard_though_its_wait_was_as_long_as_the_engines() -> None:
    limits = make_limits(num_ranks=2, rank_timeout_s=0.2)
    ranks = [FakeRank(limits, 0), FakeRank(limits, 1)]

    def hang(plan: object) -> None:
        ranks[1].aborted.wait(30.0)
        raise RuntimeError("given up")

    def miss(plan: object) -> None:
        ranks[0].aborted.wait(0.3)
        raise RankError("rank 0 waited: ranks [1] did not come")

    ranks[0].execute, ranks[1].execute = miss, hang  # type: ignore[method-assign, assignment]
    with running(limits, ranks) as (engine, _):
        sink = submit(engine, 1)
        assert sink.wait() == "error"
        assert "rank 0, step 1: RankError: rank 0 waited: ranks [1] did not come" in str(sink.error)


def test_requests_that_nobody_has_looked_at_yet_end_with_the_engine_too() -> None:
    limits = make_limits(num_ranks=1)
    is_waited_for, may_fail = threading.Event(), threading.Event()

    class Doomed:
        def wait(self, timeout_s: float) -> RankOutput:
            is_waited_for.set()
            may_fail.wait(timeout_s)
            raise RankError("lost")

    rank = FakeRank(limits)
    rank.execute = lambda plan: Doomed()  # type: ignore[method-assign, assignment, return-value]
    with running(limits, [rank]) as (engine, _):
        first = submit(engine, 1)
        assert is_waited_for.wait(10.0)
        second = submit(engine, 2)  # the engine's thread is busy
        may_fail.set()
        assert [first.wait(), second.wait()] == ["error", "error"]
        assert second.error is not None and second.error.kind is ErrorKind.ENGINE


def test_no_token_of_a_step_with_an_error_word_reaches_a_client() -> None:
    limits = make_limits(num_ranks=2)
    ranks = [FakeRank(limits, 0), FakeRank(limits, 1, error_words={3: 0x51})]
    with running(limits, ranks) as (engine, _):
        sinks = [submit(engine, 1, max_tokens=20), submit(engine, 2, max_tokens=20)]
        assert [sink.wait() for sink in sinks] == ["error", "error"]
        assert all(len(sink.token_ids) <= 2 and "error word 0x51 in step 3" in str(sink.error) for sink in sinks)


def test_a_sink_that_raises_does_not_keep_the_others_from_their_end() -> None:
    class Broken(CollectingSink):
        def put(self, *args: object, **kwargs: object) -> None:  # type: ignore[override]
            raise ValueError("broken sink")

    limits = make_limits(num_ranks=1)
    with running(limits) as (engine, _):
        others = [submit(engine, i, max_tokens=50) for i in range(3)]
        engine.submit(make_request(9, [1, 2]), Broken())
        assert [sink.wait() for sink in others] == ["error"] * 3
        assert not engine.is_alive()


def test_drain_lets_the_live_ones_finish_and_refuses_new_ones() -> None:
    limits = make_limits(num_ranks=1)
    with running(limits) as (engine, _):
        sinks = [submit(engine, i) for i in range(10)]
        assert engine.drain(30.0)
        assert [sink.finish_reason for sink in sinks] == ["length"] * 10
        with pytest.raises(RequestError, match="draining") as refusal:
            submit(engine, 99)
        assert refusal.value.kind is ErrorKind.UNAVAILABLE and engine.is_alive()


def test_drain_gives_up_in_time_and_close_ends_what_is_left() -> None:
    limits = make_limits(num_ranks=1)
    rank = FakeRank(limits)
    rank.gate.clear()
    with running(limits, [rank]) as (engine, _):
        sinks = [submit(engine, i, max_tokens=20) for i in range(6)]
        assert not engine.drain(0.05)
        closer = threading.Thread(target=engine.close)
        closer.start()
        rank.gate.set()
        closer.join(30.0)
        assert [sink.wait() for sink in sinks] == ["error"] * 6
        assert all(sink.error is not None and sink.error.kind is ErrorKind.UNAVAILABLE for sink in sinks)
        engine.close()  # once more: nothing happens
    assert rank.num_closed == 1


def test_an_engine_that_was_never_started_refuses_and_closes() -> None:
    limits = make_limits(num_ranks=1)
    rank = FakeRank(limits)
    engine = Engine([rank], limits)
    assert not engine.is_alive()
    with pytest.raises(RequestError, match="not been started"):
        submit(engine, 1)
    engine.close()
    assert rank.num_closed == 1


def test_deadline_passes_on_the_virtual_clock() -> None:
    limits = make_limits(num_ranks=1, max_batch_size=1)
    clock = VirtualClock()
    rank = FakeRank(limits, step_s=lambda plan: 0.1 if plan.slots else 0.0, clock=clock)
    with running(limits, [rank], clock) as (engine, _):
        late = submit(engine, 1, max_tokens=40, deadline_s=0.95)
        assert late.wait() == "error"
        assert late.error is not None and late.error.kind is ErrorKind.DEADLINE
        assert len(late.token_ids) == 10, "ends with the first look at the clock after 0.95 s, steps take 0.1 s"
        assert engine.drain(10.0) and engine.stats().pages_used == 0


def test_measured_step_times_teach_the_model() -> None:
    limits = make_limits(num_ranks=1, max_batch_size=1, max_seq_len=60)
    clock = VirtualClock()
    with running(limits, [FakeRank(limits, step_s=lambda _: 0.1, clock=clock)], clock) as (engine, _):
        assert submit(engine, 1, max_tokens=50).wait() == "length"
        assert engine.drain(10.0)
        assert engine.stats().predicted_step_s == pytest.approx(0.1, rel=0.02)
        assert engine.stats().last_step_s == pytest.approx(0.1)


def test_a_full_queue_refuses_with_a_clear_error() -> None:
    limits = make_limits(num_ranks=1, max_batch_size=1, max_queue_size=3)
    rank = FakeRank(limits)
    rank.gate.clear()
    with running(limits, [rank]) as (engine, _):
        accepted: list[CollectingSink] = []
        with pytest.raises(RequestError, match="max_queue_size=3: try again later") as refusal:
            for i in range(10):
                accepted.append(submit(engine, i))
        assert refusal.value.kind is ErrorKind.OVERLOADED
        assert 3 <= len(accepted) <= 4, "one may run already"
        assert engine.stats().errors_total["overloaded"] == 1
        rank.gate.set()
        assert [sink.wait() for sink in accepted] == ["length"] * len(accepted)


def test_higher_priority_is_served_first() -> None:
    limits = make_limits(num_ranks=1, max_batch_size=1)
    rank = FakeRank(limits)
    rank.gate.clear()
    order: list[int] = []

    class Noting(CollectingSink):
        def __init__(self, request_id: int) -> None:
            super().__init__()
            self.request_id = request_id

        def put(self, token_id, logprobs=None, finish_reason=None) -> None:  # type: ignore[no-untyped-def]
            if finish_reason is not None:
                order.append(self.request_id)
            super().put(token_id, logprobs, finish_reason)

    with running(limits, [rank]) as (engine, _):
        sinks = [Noting(i) for i in range(4)]
        for i, priority in enumerate([0, 0, 1, 2]):
            engine.submit(make_request(i, [1, 2, 3], 3, priority=priority), sinks[i])
        rank.gate.set()
        for sink in sinks:
            sink.wait()
    assert order in ([0, 3, 2, 1], [3, 2, 0, 1]), "the first may have started before the others came"


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "changes", "text", "kind"),
    [
        ([], 4, {}, "prompt is empty", ErrorKind.INVALID),
        ([1, 1000], 4, {}, r"prompt holds token id 1000, but ids are in \[0, 1000\)", ErrorKind.INVALID),
        ([-1], 4, {}, "token id -1", ErrorKind.INVALID),
        ([1], 4, {"stop_token_ids": (5000,)}, "stop_token_ids holds token id 5000", ErrorKind.INVALID),
        ([1], 4, {"logit_bias": {2000: 1.0}}, "logit_bias holds token id 2000", ErrorKind.INVALID),
        ([1], 4, {"bad_words_ids": ((1, 1001),)}, "bad_words holds token id 1001", ErrorKind.INVALID),
        ([1] * 60, 5, {}, "60 tokens [+] max_tokens=5 is 65, but max_seq_len=64", ErrorKind.INVALID),
        ([1] * 64, None, {}, "64 tokens [+] max_tokens=1 is 65", ErrorKind.INVALID),
        ([1] * 65, 0, {"embed": True}, "65 tokens [+] max_tokens=0", ErrorKind.INVALID),
        ([1], 4, {"adapter": "nice"}, "adapter 'nice' does not exist", ErrorKind.NOT_FOUND),
    ],
)
def test_bad_requests_are_refused_in_the_callers_thread(
    prompt: list[int], max_tokens: int | None, changes: dict[str, object], text: str, kind: ErrorKind
) -> None:
    with running(make_limits(num_ranks=1)) as (engine, _):
        with pytest.raises(RequestError, match=text) as refusal:
            engine.submit(make_request(1, prompt, max_tokens, **changes), CollectingSink())
        assert refusal.value.kind is kind
        assert engine.stats().errors_total[kind.value] == 1
        assert submit(engine, 2).wait() == "length", "the next good one works"


def test_max_tokens_defaults_to_what_remains_and_a_seed_is_drawn() -> None:
    limits = make_limits(num_ranks=1)
    with running(limits) as (engine, ranks):
        sink = submit(engine, 1, prompt_len=50, max_tokens=None, seed=None)
        assert sink.wait() == "length" and len(sink.token_ids) == 14
        full = submit(engine, 2, prompt_len=64, max_tokens=0)
        assert full.wait() == "length" and full.token_ids == []
        seeds = [init.sampling.seed for plan in ranks[0].plans for init in plan.admitted]
        assert seeds[0] is not None and 0 <= seeds[0] < 2**64 and seeds[1] == 0


def test_an_id_that_is_in_use_hurts_only_the_newcomer() -> None:
    limits = make_limits(num_ranks=1)
    rank = FakeRank(limits)
    rank.gate.clear()
    with running(limits, [rank]) as (engine, _):
        first, second = submit(engine, 1), submit(engine, 1)
        rank.gate.set()
        assert second.wait() == "error" and "in use" in str(second.error)
        assert first.wait() == "length"


def test_an_idle_engine_keeps_its_heartbeat_and_stays_asleep() -> None:
    limits = make_limits(num_ranks=1, rank_timeout_s=1.0)
    beats = threading.Semaphore(0)
    clock = VirtualClock()

    def counting() -> float:
        if threading.current_thread().name == "nmoe-engine":
            beats.release()
        return clock()

    with running(limits, None, counting) as (engine, _):
        clock.advance(100.0)
        for _ in range(6):  # a round of the idle loop reads the clock a few times
            assert beats.acquire(timeout=10.0), "no heartbeat"
        assert engine.is_alive()
        assert engine.stats().steps_total == 0


def test_wrong_number_of_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="got 1 ranks for limits with num_ranks=2"):
        Engine([FakeRank(make_limits())], make_limits())
