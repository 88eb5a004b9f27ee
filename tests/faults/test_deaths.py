"""What dies is noticed, ended, cleaned up and restarted; no client sees a wrong token or waits for ever."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest

from tests.faults.faulty_engine import CUDA_ERROR
from tests.faults.serve import Outcome, Serve
from tests.waiting import wait_until

WITHIN_S = 5.0  # every live request ends, whatever died


def break_it(serve: Serve, fault: Callable[[], None]) -> list[str]:
    """The errors of eight live requests, each right as far as it came and ended in time."""
    with serve.live(8, max_tokens=3000) as futures:
        before, open_files = serve.children(), serve.open_files()
        fault()
        broken_s = time.monotonic()
        outcomes = [future.result(timeout=30) for future in futures]
    assert_ended(outcomes, broken_s)
    assert all(outcome.num_pieces > 0 for outcome in outcomes)
    serve.wait_for(r"restarting tritonserver in [\d.]+ s: it (died|has an engine without a heartbeat)")
    serve.wait_for("tritonserver is ready again")
    after = serve.children()
    assert after["front end"] == before["front end"] and after["triton"] != before["triton"]
    serve.assert_serves()
    wait_until(lambda: serve.open_files() == open_files, "nothing of the dead child is held open")
    return [outcome.error for outcome in outcomes]


def assert_ended(outcomes: Sequence[Outcome], broken_s: float) -> None:
    """With an error, no wrong token before it, and in time."""
    for outcome in outcomes:
        assert outcome.is_right and outcome.error, outcome
        assert outcome.ended_s - broken_s < WITHIN_S, outcome


def assert_unavailable(errors: Sequence[str]) -> None:
    """gRPC's status, and OpenAI's error event: nobody was left to say more."""
    assert all("StatusCode.UNAVAILABLE" in error for error in errors[::2]), errors
    assert all("service_unavailable_error" in error for error in errors[1::2]), errors


def test_a_rank_that_raises(serve: Serve) -> None:
    errors = break_it(serve, lambda: serve.inject("rank raises"))
    assert all("rank 1 broke in its own thread" in error for error in errors)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "words"),
    [("cuda error", CUDA_ERROR), ("error word", "error word"), ("engine raises", "a bug in the engine's loop")],
)
def test_an_engine_that_breaks(serve: Serve, kind: str, words: str) -> None:
    errors = break_it(serve, lambda: serve.inject(kind))
    assert all(words in error for error in errors), errors


def test_a_stub_that_is_killed(serve: Serve) -> None:
    assert_unavailable(break_it(serve, lambda: serve.kill(serve.stub())))


@pytest.mark.slow
def test_a_tritonserver_that_is_killed(serve: Serve) -> None:
    assert_unavailable(break_it(serve, lambda: serve.kill(serve.children()["triton"])))


@pytest.mark.slow
def test_both_children_killed_at_once_are_both_restarted(serve: Serve) -> None:
    with serve.live(8, max_tokens=3000) as futures:
        before, broken_s = serve.children(), time.monotonic()
        for pid in before.values():
            serve.kill(pid)
        outcomes = [future.result(timeout=30) for future in futures]
    assert_ended(outcomes, broken_s)
    for _ in before:
        serve.wait_for("(tritonserver|the OpenAI front end) is ready again")
    assert not {*serve.children().values()} & {*before.values()}
    wait_until(lambda: serve.status("openai_port", "/ready") == 200, "the front end sees Triton")
    serve.assert_serves()


def test_only_the_front_end_is_restarted_when_it_is_killed(serve: Serve) -> None:
    with serve.live(8, max_tokens=300) as futures:
        before, broken_s = serve.children(), time.monotonic()
        serve.kill(before["front end"])
        outcomes = [future.result(timeout=30) for future in futures]
    assert_ended(outcomes[1::2], broken_s)
    assert all(outcome.is_right and not outcome.error for outcome in outcomes[::2])  # Triton's own streams go on
    serve.wait_for("the OpenAI front end is ready again")
    after = serve.children()
    assert after["front end"] != before["front end"] and after["triton"] == before["triton"]
    serve.assert_serves()
