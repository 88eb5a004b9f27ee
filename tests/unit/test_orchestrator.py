"""Several replicas behind one face."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nmoe_backend.engine import Engine
from nmoe_backend.orchestrator import Orchestrator
from nmoe_backend.types import ErrorKind, RequestError
from tests.fakes import CollectingSink, FakeRank, make_limits, make_request

LIMITS = make_limits(num_ranks=1, max_batch_size=2, max_queue_size=2, num_pages=64)


class Pair:
    """Two replicas of one rank; steps wait until `go`."""

    def __init__(self) -> None:
        self.ranks = [FakeRank(LIMITS), FakeRank(LIMITS)]
        self.engines = [Engine([rank], LIMITS) for rank in self.ranks]
        for rank, engine in zip(self.ranks, self.engines, strict=True):
            rank.gate.clear()
            engine.start()
        self.orchestrator = Orchestrator(self.engines)

    def go(self) -> None:
        for rank in self.ranks:
            rank.gate.set()

    def submit(self, request_id: int, **changes: object) -> CollectingSink:
        sink = CollectingSink()
        self.orchestrator.submit(make_request(request_id, [1, 2, 3], **changes), sink)  # type: ignore[arg-type]
        return sink


@pytest.fixture
def pair() -> Iterator[Pair]:
    two = Pair()
    yield two
    two.go()
    two.orchestrator.close()


def test_requests_spread_over_replicas_and_all_end(pair: Pair) -> None:
    sinks = [pair.submit(i) for i in range(4)]
    assert [engine.stats().num_running + engine.stats().num_waiting for engine in pair.engines] == [2, 2]
    pair.go()
    assert [sink.wait() for sink in sinks] == ["length"] * 4
    assert pair.orchestrator.drain(10.0)
    stats = pair.orchestrator.stats()
    assert stats.generation_tokens_total == 16 and stats.requests_finished_total["length"] == 4
    assert stats.num_slots == 4 and stats.pages_total == 128 and len(stats.pages_used_per_rank) == 2


def test_overload_is_said_only_when_every_queue_is_full(pair: Pair) -> None:
    accepted = 0
    with pytest.raises(RequestError) as refusal:
        while accepted < 20:
            pair.submit(accepted)
            accepted += 1
    assert refusal.value.kind is ErrorKind.OVERLOADED and accepted >= 4


def test_a_wrong_request_is_refused_by_the_first_engine_at_once(pair: Pair) -> None:
    with pytest.raises(RequestError, match="adapter") as refusal:
        pair.submit(1, adapter="x")
    assert refusal.value.kind is ErrorKind.NOT_FOUND
    assert pair.orchestrator.stats().errors_total["not_found"] == 1


def test_cancellation_reaches_the_engine_that_has_the_request(pair: Pair) -> None:
    sinks = [pair.submit(i, client_id="c" if i == 3 else "") for i in range(4)]
    pair.orchestrator.cancel(0)
    pair.orchestrator.finish(1, "stop")
    pair.orchestrator.cancel_by_client_id("c")
    pair.go()
    assert [sink.wait() for sink in sinks] == ["cancelled", "stop", "length", "cancelled"]


def test_a_dead_replica_turns_it_not_ready_and_gets_nothing_more(pair: Pair) -> None:
    pair.ranks[0].fail_at = 1
    first = pair.submit(1)
    assert first.wait() == "error"
    assert not pair.orchestrator.is_alive()
    pair.go()
    assert pair.submit(2).wait() == "length"
    pair.engines[1].close()
    with pytest.raises(RequestError, match="no replica is alive"):
        pair.submit(3)


def test_drain_refuses_at_once(pair: Pair) -> None:
    pair.go()
    assert pair.orchestrator.is_alive() and pair.orchestrator.drain(5.0)
    with pytest.raises(RequestError, match="draining") as refusal:
        pair.submit(1)
    assert refusal.value.kind is ErrorKind.UNAVAILABLE


def test_it_needs_an_engine() -> None:
    with pytest.raises(ValueError, match="at least one replica"):
        Orchestrator([])
