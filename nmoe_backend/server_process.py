"""Our child processes: started in a session of their own, read line by line, stopped without a trace.

Owns the child's process group, and tritonserver's shared-memory regions with its prefix, and removes both. Never
decides when to start or stop. The child gets SIGTERM when our process dies (PR_SET_PDEATHSIG), and SIGPIPE ignored, so
that an orphan survives its closed output for long enough to drain and end by itself.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_SHM = Path("/dev/shm")
_KEPT_LINES = 400
_GROUP_END_S = 10.0


class ChildProcess:
    """A running child. Start and stop it from one thread; `on_line` is called from the reader's thread."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], on_line: Callable[[str], None]) -> None:
        self._on_line = on_line
        self._lines: collections.deque[str] = collections.deque(maxlen=_KEPT_LINES)
        prctl = ctypes.CDLL(None, use_errno=True).prctl  # found before the fork: other threads of ours may hold locks
        parent = os.getpid()

        def die_with_parent() -> None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)

        self._process = subprocess.Popen(
            list(argv),
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            restore_signals=False,
            preexec_fn=die_with_parent,
        )
        self._reader = threading.Thread(target=self._read, name="child-output", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Process id, which is also the id of the group."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def last_lines(self) -> list[str]:
        """What it printed last, oldest first, events of requests left out. Complete once the process has ended and
        `stop` returned."""
        return list(self._lines)

    def stop(self, drain_s: float) -> bool:
        """SIGTERM, wait up to drain_s, kill what is left. True: it ended by itself."""
        self.terminate()
        clean = self.wait(drain_s)
        self.kill()
        return clean

    def terminate(self) -> None:
        """SIGTERM to the child alone."""
        self._process.send_signal(signal.SIGTERM)  # does nothing where it has ended

    def wait(self, limit_s: float) -> bool:
        """Whether it ended within limit_s."""
        try:
            self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """Kill the whole group at once. Idempotent."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._wait_for_group()
        self._reader.join(_GROUP_END_S)

    def _wait_for_group(self) -> None:
        """Killed stubs are reaped by init: wait until the group is gone, and with it ports and memory.

        In a container init is who starts first, and that may be we.
        """
        deadline = time.monotonic() + _GROUP_END_S
        while time.monotonic() < deadline and group_members(self.pid):
            time.sleep(0.02)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-self.pid, os.WNOHANG)[0]:
                pass

    def _read(self) -> None:
        assert self._process.stdout is not None, "the output is a pipe"
        with self._process.stdout as output:
            for raw in output:
                for line in lines_in(raw.decode("utf-8", "replace").rstrip()):
                    if not _tells_of_a_request(line):
                        self._lines.append(line)
                    self._on_line(line)


class ServerProcess(ChildProcess):
    """A running tritonserver, whose end removes its shared memory."""

    def __init__(
        self, argv: Sequence[str], env: Mapping[str, str], shm_prefix: str, on_line: Callable[[str], None]
    ) -> None:
        self._shm_prefix = shm_prefix
        super().__init__(argv, env, on_line)

    def kill(self) -> None:
        """Kill the whole group at once and remove its shared memory. Idempotent."""
        super().kill()
        remove_shared_memory(self._shm_prefix)


def group_members(group: int) -> list[int]:
    """Processes of a group that still run; zombies do not count."""
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            # "pid (comm) state ppid pgrp ...", where comm may hold anything
            state, _, pgrp = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state != "Z":
                members.append(int(entry.name))
    return members


def shared_memory(prefix: str) -> list[Path]:
    """Our regions in /dev/shm."""
    return [path for path in _SHM.iterdir() if path.name.startswith(prefix)] if _SHM.is_dir() else []


def remove_shared_memory(prefix: str) -> None:
    """Remove what a killed server left. The prefix names one server's regions only."""
    for path in shared_memory(prefix):
        path.unlink(missing_ok=True)


_GLOG = re.compile(r"^([IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ \d+ ([\w.\-]+):\d+\] ?(.*)$")
_TABLE = re.compile(r"^[+|]")  # the server's tables of backends, models and options
_NO_GPU = (  # what a server says on a machine without a GPU, as errors and warnings; the doctor judges GPUs
    "CudaDriverHelper has not been initialized",
    "unable to create stream for",
    "no pinned memory pool",
)


_EVENT = re.compile(r'{"time": "[^"]+", "level": "\w+", "event": "(\w+)"')
_OF_REQUESTS = frozenset(("received", "first_token", "finished", "cancelled", "error", "refused"))


def is_event(line: str) -> bool:
    """Whether it is a line of event_log.py, from whatever process."""
    return _EVENT.match(line) is not None


def lines_in(text: str) -> list[str]:
    """A line of output, in two where an event begins behind what another process of the pipe has not ended yet: the
    server writes its tables in pieces, while its model may log."""
    event = _EVENT.search(text)
    return [text] if event is None or not event.start() else [text[: event.start()], text[event.start() :]]


def _tells_of_a_request(line: str) -> bool:
    """Three events a request, and an error for each that was alive, would leave nothing of what broke."""
    event = _EVENT.match(line)
    return event is not None and event[1] in _OF_REQUESTS


def progress_of(line: str) -> tuple[str, str] | None:
    """(level, text) of a line that a person wants to see during the start; None for the server's own chatter.

    `I1123 19:14:00.123 77 model.py:20] "weights 3.1 s"` gives ("I", "weights 3.1 s"): Python's lines, warnings and
    errors are shown; information from the server's C++ files is not. A line without such a head is raw: level "".
    """
    match = _GLOG.match(line)
    if match is None:
        return None if not line.strip() or _TABLE.match(line) else ("", line)
    level, source, text = match.groups()
    if (level == "I" and source.endswith((".cc", ".h"))) or any(words in text for words in _NO_GPU):
        return None
    return level, text.strip('"').replace("\\n", "\n")  # the server escapes the lines of a Python traceback
