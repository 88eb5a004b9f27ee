"""stub.end_with_server: a model's process ends when its server is gone, whatever its main thread waits for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

CHILD = """
import threading
from nmoe_backend import stub
stub.end_with_server(0.05, {limit_s})
print("up", flush=True)
{then}
"""
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {child!r}])
print(child.pid, flush=True)
child.wait()
"""
WAITS = "threading.Event().wait()"
HOLDS_THE_LOCK = "import ctypes; ctypes.PyDLL(None).sleep(60)"  # PyDLL: a C call that keeps the interpreter's lock


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("then", "limit_s"), [(WAITS, 60.0), (HOLDS_THE_LOCK, 0.5)])
def test_a_stub_ends_when_its_server_is_killed(then: str, limit_s: float) -> None:
    child = CHILD.format(limit_s=limit_s, then=then)
    server = subprocess.Popen([sys.executable, "-c", PARENT.format(child=child)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    said = {server.stdout.readline().strip(), server.stdout.readline().strip()}
    (pid,) = (int(word) for word in said - {"up"})
    os.kill(server.pid, signal.SIGKILL)
    server.wait()
    limit = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < limit, "the stub outlives its server"
        time.sleep(0.02)
