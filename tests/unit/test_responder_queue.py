"""responder_queue.py: whose turn it is, and what that does to the gaps of streams whose senders are behind."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from dataclasses import dataclass

import pytest

from nmoe_backend.responder_queue import ReadyQueue

WAIT_S = 10.0


@dataclass
class Waiting:
    """A stream as the queue sees it. No order: two of them cannot be compared."""

    request_id: int
    served_s: float = 0.0


def test_who_was_served_longest_ago_goes_first_and_of_equals_who_came_first() -> None:
    ready: ReadyQueue[Waiting] = ReadyQueue()
    for request_id, served_s in enumerate((5.0, 3.5, 4.0, 0.0, 4.0, 4.5)):
        ready.put(Waiting(request_id, served_s))
    assert len(ready) == 6
    order = [ready.get() for _ in range(6)]
    assert [stream.request_id for stream in order if stream is not None] == [3, 1, 2, 4, 5, 0]


def test_takers_end_when_no_stream_is_left() -> None:
    ready: ReadyQueue[Waiting] = ReadyQueue()
    ready.end(num_takers=2)
    last = Waiting(7, 1e9)
    ready.put(last)
    assert [ready.get() for _ in range(3)] == [last, None, None]


def test_a_taker_waits_for_a_stream() -> None:
    ready: ReadyQueue[Waiting] = ReadyQueue()
    taken: list[Waiting | None] = []
    taker = threading.Thread(target=lambda: taken.append(ready.get()))
    taker.start()
    stream = Waiting(1)
    ready.put(stream)
    taker.join(WAIT_S)
    assert taken == [stream]


def test_nobody_waits_for_newcomers_that_began_after_its_last_turn() -> None:
    """One sender, one turn a unit of time, and a newcomer in every one of them: more than can ever be served."""
    ready: ReadyQueue[Waiting] = ReadyQueue()
    old = Waiting(0, served_s=10.0)
    for began in range(8):
        ready.put(Waiting(1 + began, served_s=7.5 + began))  # three of them before
    ready.put(old)
    turns = 0
    while (served := ready.get()) is not old:
        turns += 1
        assert served is not None
        ready.put(Waiting(100 + turns, served_s=15.0 + turns))
    assert turns == 3


def test_threads_take_every_stream_once() -> None:
    """Two of the claim's operations at a time, with a switch of threads wherever one is possible."""
    num_threads, each = 4, 3000
    ready: ReadyQueue[Waiting] = ReadyQueue()
    taken: list[list[int]] = [[] for _ in range(num_threads)]

    def give(thread: int) -> None:
        for index in range(each):
            ready.put(Waiting(thread * each + index, float(index * 7919 % each)))

    def take(thread: int) -> None:
        while (stream := ready.get()) is not None:
            taken[thread].append(stream.request_id)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        givers, takers = (
            [threading.Thread(target=work, args=[thread], daemon=True) for thread in range(num_threads)]
            for work in (give, take)
        )
        for one in (*givers, *takers):
            one.start()
        for one in givers:
            one.join(WAIT_S)
        ready.end(num_threads)
        for one in takers:
            one.join(WAIT_S)
    finally:
        sys.setswitchinterval(before)
    assert Counter(request_id for some in taken for request_id in some) == Counter(range(num_threads * each))


@pytest.mark.parametrize("served_per_step", [19, 30, 41, 64])
def test_with_senders_behind_everybody_waits_for_one_round_and_no_longer(served_per_step: int) -> None:
    """64 streams get a token a step, in the order of their rows, and so many responses fit into one. Served in the
    order of the rows, the gaps would be the round rounded up to whole steps."""
    num_streams, num_steps = 64, 200
    ready: ReadyQueue[Waiting] = ReadyQueue()
    streams = [Waiting(row) for row in range(num_streams)]
    is_ready = [False] * num_streams
    gaps: list[float] = []
    for step in range(1, num_steps + 1):
        for row, stream in enumerate(streams):
            if not is_ready[row]:
                is_ready[row] = True
                ready.put(stream)
        for turn in range(served_per_step):
            served, now_s = ready.get(), step + turn / served_per_step
            assert served is not None
            is_ready[served.request_id] = False
            if served.served_s:
                gaps.append(now_s - served.served_s)
            served.served_s = now_s
    round_s = num_streams / served_per_step
    assert len(gaps) == num_steps * served_per_step - num_streams
    assert min(gaps) == pytest.approx(round_s)
    assert max(gaps) == pytest.approx(round_s)
