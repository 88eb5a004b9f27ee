"""How long a GPU waited for the host between steps, without a profiler.

A step is launched while the one before runs. Where the host has launched it before that one ends, the GPU goes on at
once; where not, it has waited at most from the end to the moment when the launch was over. Ends come from CUDA events,
launches from the host's clock; both clocks are read at the same moment in the beginning, behind a synchronisation.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock


def idle_share(ends_s: Sequence[float], launches_s: Sequence[float]) -> float:
    """Upper bound on the share of the time from the first step's end to the last one's in which the GPU waited.

    launches_s[i]: when step i was launched completely; ends_s[i]: when it ended.
    """
    if len(ends_s) < 2 or len(ends_s) != len(launches_s):
        raise ValueError(f"got {len(ends_s)} ends and {len(launches_s)} launches; need as many, and two steps at least")
    waits = (max(0.0, launched - end) for end, launched in zip(ends_s, launches_s[1:], strict=False))
    return sum(waits) / (ends_s[-1] - ends_s[0])


class StepClock:
    """Times of the steps of one rank."""

    def __init__(self) -> None:
        self._events: list[Any] = []
        self._launches_s: list[float] = []

    @property
    def num_steps(self) -> int:
        return len(self._launches_s)

    def launched(self, stream: Any) -> None:
        """A step is on the stream, as a whole; called by the rank's thread."""
        import torch

        if not self._events:
            torch.cuda.synchronize(stream.device)
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[0].record(stream)
            self._events[0].synchronize()
            self._begin_s = time.perf_counter()
            return
        self._events.append(torch.cuda.Event(enable_timing=True))
        self._events[-1].record(stream)
        self._launches_s.append(time.perf_counter() - self._begin_s)

    def idle_share(self) -> float:
        """Of all steps but the first, which only sets the clock. Waits for the last one."""
        begin, *ends = self._events
        ends[-1].synchronize()
        return idle_share([begin.elapsed_time(end) / 1e3 for end in ends], self._launches_s)


@contextmanager
def clocked_workers() -> Iterator[StepClock]:
    """Every step that a worker of this process executes meanwhile goes into the clock; for one rank."""
    from nmoe_backend.runtime.worker import Worker

    clock, execute = StepClock(), Worker.execute

    def timed(self: Worker, plan: Any) -> Any:
        pending = execute(self, plan)
        clock.launched(self._context.stream)
        return pending

    with mock.patch.object(Worker, "execute", timed):
        yield clock
