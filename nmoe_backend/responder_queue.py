"""Which stream is served next: of those with something to say, the one that was served longest ago.

The engine puts a step's tokens in the order of its rows. Served in that order, the last rows of a step wait behind the
first rows of the next one whenever the senders are behind, and gaps grow by up to a step. By age every stream gets its
turn once a round. A new one's age counts from the start of its prefill: a burst of them stands among the others.
Nobody starves: a stream that waits keeps its age, and who is served or begins after its last turn stands behind it.
"""

from __future__ import annotations

import heapq
import math
import queue
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """What waits for its turn: a responder.Stream."""

    request_id: int  # unique: between equal ages it decides, and streams are never compared
    served_s: float


WaitingT = TypeVar("WaitingT", bound=Waiting)


class ReadyQueue(Generic[WaitingT]):
    """Any thread may call any method. No lock of its own: heapq is C and compares numbers here, which runs no Python
    code, so that under the interpreter's lock a push and a pop are one operation each."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, WaitingT | None]] = []
        self._tickets: queue.SimpleQueue[None] = queue.SimpleQueue()  # one for each entry: `get` waits for it

    def __len__(self) -> int:
        return len(self._heap)

    def put(self, stream: WaitingT) -> None:
        """It has something to say. In the queue once at a time."""
        heapq.heappush(self._heap, (stream.served_s, stream.request_id, stream))
        self._tickets.put(None)

    def get(self) -> WaitingT | None:
        """Waits for a stream. None: `end` was called, and no stream was left."""
        self._tickets.get()
        return heapq.heappop(self._heap)[2]

    def end(self, num_takers: int) -> None:
        """Each of so many takers gets one None, when no stream is left. What is put later is served while any of them
        has not got it."""
        for taker in range(num_takers):
            heapq.heappush(self._heap, (math.inf, taker, None))
            self._tickets.put(None)
