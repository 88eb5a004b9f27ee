"""Which stream is served next: of those with something to say, the one whose last response lies furthest back.

The engine puts a step's tokens in the order of its rows. Served in that order, the last rows of a step wait behind the
first rows of the next one whenever the senders are behind, and gaps grow by up to a step. By age every stream gets its
turn once a round. A new one's age counts from the start of its prefill: a burst of them stops nobody.
"""

from __future__ import annotations

import heapq
import math
import queue
from typing import Generic, Protocol, TypeVar

from nmoe_backend.lifecycle import RequestRecord


class Waiting(Protocol):
    """What waits for its turn: a responder.Stream."""

    record: RequestRecord


WaitingT = TypeVar("WaitingT", bound=Waiting)


class ReadyQueue(Generic[WaitingT]):
    """Any thread may call any method. No lock of its own: a push and a pop of a heap are one operation each."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, WaitingT | None]] = []  # ids are unique: streams are never compared
        self._tickets: queue.SimpleQueue[None] = queue.SimpleQueue()  # one for each entry: `get` waits for it

    def __len__(self) -> int:
        return len(self._heap)

    def put(self, stream: WaitingT) -> None:
        """It has something to say. In the queue once at a time."""
        record = stream.record
        since_s = record.last_token_s or record.started_s or 0.0
        heapq.heappush(self._heap, (since_s, record.request_id, stream))
        self._tickets.put(None)

    def get(self) -> WaitingT | None:
        """Waits for a stream. None: `end` was called, and what was put before has been taken."""
        self._tickets.get()
        return heapq.heappop(self._heap)[2]

    def end(self, num_takers: int) -> None:
        """Each of so many takers gets one None, when no stream is left."""
        for taker in range(num_takers):
            heapq.heappush(self._heap, (math.inf, taker, None))
            self._tickets.put(None)
