"""What a person does on a fresh machine, whole: clone, scripts/serve, paste the commands, Ctrl-C, start again.

Slow: installs the locked packages from the package index that pip is configured for.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from nmoe_backend import server_process

ROOT = Path(__file__).parents[2]
INSTALL_S = 900.0
SECOND_START_S = 15.0


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def serve(clone: Path, ports: list[int], env: dict[str, str], limit_s: float) -> tuple[list[str], float]:
    """Start, wait for the commands, paste them, Ctrl-C. Returns the output and the seconds to ready."""
    names = ("--http-port", "--grpc-port", "--metrics-port")
    flags = [text for pair in zip(names, map(str, ports), strict=True) for text in pair]
    began = time.monotonic()
    process = subprocess.Popen(
        [clone / "scripts" / "serve", *flags],
        cwd="/",
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line.rstrip())
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    output: list[str] = []
    commands: list[str] = []
    ready_s = 0.0
    try:
        while len(commands) < 2:
            line = lines.get(timeout=limit_s)
            assert line is not None, "\n".join(output)
            output.append(line)
            if "ready: HTTP" in line:
                ready_s = time.monotonic() - began
            if line.startswith("  curl "):
                commands.append(line.strip())
        for command in commands:
            answer = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=True)
            assert "text_output" in answer.stdout, answer.stdout
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert server_process.group_members(process.pid) == []
    return output, ready_s


@pytest.mark.slow
def test_a_fresh_clone_serves_and_starts_again_without_installing(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for name in ("VIRTUAL_ENV", "NMOE_CONFIG", "NMOE_MODEL_PATH"):
        env.pop(name, None)
    ports = free_ports(3)
    first, _ = serve(clone, ports, env, INSTALL_S)
    text = "\n".join(first)
    for stage in ("making .venv", "installing requirements/cpu.lock", "writing the tiny checkpoint", "doctor: "):
        assert stage in text, text
    second, ready_s = serve(clone, ports, env, 60.0)
    text = "\n".join(second)
    assert "installing" not in text and "writing" not in text
    assert ready_s <= SECOND_START_S, text
    status = subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True)
    assert status.stdout == "", "setting up changed tracked files or left untracked ones"
