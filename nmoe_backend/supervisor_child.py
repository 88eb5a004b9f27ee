"""One child of `nmoe serve`: started, waited for, watched, and started again with back-off when it dies.

The supervisor calls `tick` ten times a second for each of its children, so that no child's start hides another one's
death. A tick waits for the end of what it kills, for the first request of a server that says that it is ready, and
for what a watch looks at.
"""

from __future__ import annotations

import collections
import enum
import math
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nmoe_backend.doctor_host import port_is_free
from nmoe_backend.server_process import ChildProcess, progress_of
from nmoe_backend.supervisor_config import SupervisorConfig

_PORTS_S = 15.0  # for the ports of a child that was killed
STOP_SLACK_S = 15.0  # beyond drain_s, for a child whose requests have ended
_REPORTED_LINES = 25

Clock = Callable[[], float]


class GaveUp(Exception):
    """A child is dead and is not to be started again. The text says why; what the child said is printed already."""


class Console:
    """What `nmoe serve` prints. Safe from any thread: each child's reader prints too, and lines must stay whole."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()
        self._lock = threading.Lock()

    def say(self, text: str) -> None:
        """Progress: a line with the seconds since the start in front."""
        self.show(f"[{time.monotonic() - self._start_s:6.1f} s] {text}")

    def show(self, line: str) -> None:
        """A line as it is."""
        with self._lock:
            print(line, flush=True)


class Watch:
    """What a child that lives shows again and again. Watching begins with the first sign: a server that is told not to
    offer what is looked for is not ended for it."""

    def __init__(
        self, sees_sign: Callable[[], bool], *, every_s: float, limit_s: float, complaint: str,
        clock: Clock = time.monotonic,
    ) -> None:  # fmt: skip
        """`sees_sign` is asked at once and then every `every_s`, in the supervisor's thread: it must be quick."""
        self._sees_sign, self._every_s, self._limit_s = sees_sign, every_s, limit_s
        self._complaint, self._clock = complaint, clock
        self._asked_s = -math.inf
        self._seen_s: float | None = None

    def complaint(self) -> str | None:
        """What is wrong, once no sign has been seen for limit_s."""
        now = self._clock()
        if now - self._asked_s >= self._every_s:
            self._asked_s = now
            if self._sees_sign():
                self._seen_s = now
        return self._complaint if self._seen_s is not None and now - self._seen_s >= self._limit_s else None


class Advance:
    """Whether a counter stands elsewhere than at the last look; None is no value."""

    def __init__(self, read: Callable[[], float | None]) -> None:
        self._read = read
        self._value: float | None = None

    def __call__(self) -> bool:
        """Look."""
        value = self._read()
        if value is None or value == self._value:
            return False
        self._value = value
        return True


class Backoff:
    """When a child may be started again: after a delay that doubles, and no more than restart_limit times a window."""

    def __init__(self, settings: SupervisorConfig, clock: Clock = time.monotonic) -> None:
        self._settings, self._clock = settings, clock
        self._restarts: collections.deque[float] = collections.deque()

    def next_delay_s(self) -> float | None:
        """Seconds to wait before the next start, which counts from now on; None: there were too many."""
        settings, now = self._settings, self._clock()
        while self._restarts and now - self._restarts[0] >= settings.restart_window_s:
            self._restarts.popleft()
        count = len(self._restarts)
        if count >= settings.restart_limit:
            return None
        self._restarts.append(now)
        return float(min(settings.restart_delay_s * 2**count, settings.restart_max_delay_s))


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What the supervisor must know about one of its children."""

    name: str
    start: Callable[[], ChildProcess]
    ports: Sequence[int]
    is_ready: Callable[[], bool]
    failure_of_first_request: Callable[[], str | None]  # None: it was answered
    watches: Callable[[], Sequence[Watch]]  # new ones for every start; none: its process's end is all there is to see
    start_timeout_s: float
    drain_s: float  # from SIGTERM to the kill, where is_busy says so then
    is_busy: Callable[[], bool]


class _State(enum.Enum):
    DOWN = enum.auto()
    STARTING = enum.auto()
    READY = enum.auto()


class SupervisedChild:
    """A part and its process, if it has one now. One thread."""

    def __init__(
        self, part: Part, host: str, settings: SupervisorConfig, console: Console, shown_config: Path, *,
        clock: Clock = time.monotonic,
    ) -> None:  # fmt: skip
        self._part, self._host, self._settings, self._console = part, host, settings, console
        self._shown_config, self._clock = shown_config, clock
        self._backoff = Backoff(settings, clock)
        self._process: ChildProcess | None = None
        self._state = _State.DOWN
        self._due_s = clock()
        self._begun_s = 0.0
        self._watches: Sequence[Watch] = ()
        self._was_ready = False

    @property
    def is_ready(self) -> bool:
        """As of the last tick."""
        return self._state is _State.READY

    @property
    def name(self) -> str:
        """For messages."""
        return self._part.name

    def tick(self) -> None:
        """Look once, and do what is due. Raises GaveUp."""
        if self._state is _State.DOWN:
            self._start_when_due()
        elif self._state is _State.STARTING:
            self._look_whether_it_has_started()
        else:
            self._look_whether_it_lives()

    def stop(self) -> bool:
        """SIGTERM, time to end, then a kill. False: it hung. What outlasts drain_s is cut off, as announced."""
        process, part = self._process, self._part
        if process is None:
            return True
        process.terminate()
        is_clean = process.wait(part.drain_s)
        if not is_clean and part.is_busy():
            self._console.say(f"{self.name} still had requests after {part.drain_s:g} s: they are cut off")
            is_clean = True
        elif not is_clean:
            is_clean = process.wait(STOP_SLACK_S)
        process.kill()
        return is_clean

    def kill(self) -> None:
        """Kill it at once. Idempotent."""
        if self._process is not None:
            self._process.kill()

    def _start_when_due(self) -> None:
        now = self._clock()
        if now < self._due_s:
            return
        taken = [port for port in self._part.ports if not port_is_free(self._host, port)]
        if taken and now < self._due_s + _PORTS_S:
            return
        if taken:
            self._fail(f"cannot start: {self._host}:{taken[0]} is still in use (ss -ltnp 'sport = :{taken[0]}')")
            return
        self._process = self._part.start()
        self._state, self._begun_s = _State.STARTING, now

    def _look_whether_it_has_started(self) -> None:
        assert self._process is not None, "a child that starts has a process"
        if self._process.exit_code() is not None:
            self._fail("ended while it started")
        elif self._part.is_ready():
            failure = self._part.failure_of_first_request()
            if failure is not None:
                self._fail(f"answers health, but not a request: {failure}")
                return
            self._watches = self._part.watches()
            self._state = _State.READY
            if self._was_ready:
                self._console.say(f"{self.name} is ready again after {self._clock() - self._begun_s:.1f} s")
            self._was_ready = True
        elif self._clock() - self._begun_s > self._part.start_timeout_s:
            self._fail(f"was not ready after {self._part.start_timeout_s:g} s")

    def _look_whether_it_lives(self) -> None:
        assert self._process is not None, "a child that is ready has a process"
        if self._process.exit_code() is not None:
            self._fail("died")
            return
        for watch in self._watches:
            if (complaint := watch.complaint()) is not None:
                self._fail(complaint)
                return

    def _fail(self, what: str) -> None:
        """End what is left of it, say why, and plan the next start. Raises GaveUp where there is to be none."""
        self._report(what)
        settings = self._settings
        if not self._was_ready:
            raise GaveUp(f"{self.name} {what}")  # a restart helps against accidents, not against a first start's errors
        if not settings.restart:
            raise GaveUp(f"{self.name} {what}; it is not restarted because [supervisor] restart = false")
        delay_s = self._backoff.next_delay_s()
        if delay_s is None:
            raise GaveUp(
                f"{self.name} {what}, after {settings.restart_limit} restarts within {settings.restart_window_s:g} s"
            )
        self._console.say(f"restarting {self.name} in {delay_s:g} s: it {what}")
        self._state, self._due_s = _State.DOWN, self._clock() + delay_s

    def _report(self, what: str) -> None:
        """What a person needs who sees a child gone: the lines that matter, and where to look."""
        process, self._process = self._process, None
        if process is None:
            return
        code = process.exit_code()
        process.kill()
        ending = "" if code is None else f" (exit code {code})"
        print(f"nmoe: {self.name} {what}{ending}. Its last lines:", file=sys.stderr)
        for text in _notable(process.last_lines())[-_REPORTED_LINES:]:
            print(textwrap.indent(text, "  "), file=sys.stderr)
        print(
            f"Check the machine with `nmoe doctor --config {self._shown_config}`, and see docs/runbook.md for the "
            "message above; --verbose prints everything that the server says.",
            file=sys.stderr,
            flush=True,
        )


def _notable(lines: Sequence[str]) -> Sequence[str]:
    """Without tritonserver's information; all of them where nothing else is left."""
    return [shown[1] for line in lines if (shown := progress_of(line)) is not None and shown[0] != "I"] or lines
