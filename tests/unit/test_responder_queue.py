"""responder_queue.py: whose turn it is, and what that does to the gaps of streams whose senders are behind."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest

from nmoe_backend.lifecycle import RequestRecord
from nmoe_backend.responder_queue import ReadyQueue

WAIT_S = 10.0


@dataclass
class Waiting:
    """A stream as the queue sees it."""

    record: RequestRecord


def waiting(request_id: int, last_token_s: float | None = None, started_s: float | None = None) -> Waiting:
    record = RequestRecord(request_id=request_id, client_id="", arrival_s=0.0)
    record.started_s, record.last_token_s = started_s, last_token_s
    return Waiting(record)


def test_who_never_began_goes_first_and_then_who_was_served_or_began_longest_ago() -> None:
    ready: ReadyQueue[Waiting] = ReadyQueue()
    streams = [
        waiting(1, 5.0, started_s=1.0),
        waiting(2, started_s=3.5),
        waiting(3, 4.0, started_s=1.0),
        waiting(4),  # ends with an error before its first step
        waiting(5, 4.0, started_s=1.0),
        waiting(6, started_s=4.5),
    ]
    for stream in streams:
        ready.put(stream)
    assert len(ready) == len(streams)
    order = [ready.get() for _ in streams]
    assert [stream.record.request_id for stream in order if stream is not None] == [4, 2, 3, 5, 6, 1]


def test_takers_end_when_no_stream_is_left() -> None:
    ready: ReadyQueue[Waiting] = ReadyQueue()
    ready.end(num_takers=2)
    last = waiting(7, 1e9)
    ready.put(last)
    assert [ready.get() for _ in range(3)] == [last, None, None]


def test_a_taker_waits_for_a_stream() -> None:
    ready: ReadyQueue[Waiting] = ReadyQueue()
    taken: list[Waiting | None] = []
    taker = threading.Thread(target=lambda: taken.append(ready.get()))
    taker.start()
    stream = waiting(1)
    ready.put(stream)
    taker.join(WAIT_S)
    assert taken == [stream]


@pytest.mark.parametrize("served_per_step", [19, 30, 41, 64])
def test_with_senders_behind_everybody_waits_for_one_round_and_no_longer(served_per_step: int) -> None:
    """64 streams get a token a step, in the order of their rows, and so many responses fit into one. Served in the
    order of the rows, the gaps would be the round rounded up to whole steps."""
    num_streams, num_steps = 64, 200
    ready: ReadyQueue[Waiting] = ReadyQueue()
    streams = [waiting(row) for row in range(num_streams)]
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
            record = served.record
            is_ready[record.request_id] = False
            if record.last_token_s is not None:
                gaps.append(now_s - record.last_token_s)
            record.last_token_s = now_s
    round_s = num_streams / served_per_step
    assert len(gaps) == num_steps * served_per_step - num_streams
    assert min(gaps) == pytest.approx(round_s)
    assert max(gaps) == pytest.approx(round_s)
