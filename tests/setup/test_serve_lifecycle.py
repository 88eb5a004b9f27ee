"""`nmoe serve` against a real tritonserver with echo models: starts, answers, stops, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nmoe_backend import server_process
from tests.model_folder import write_model_folder, write_toml
from tests.setup.echo_repository import write_echo_repository
from tests.triton_server import free_ports
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
LIMIT_S = 60.0  # of every wait here; the things waited for take one to three seconds


class Launcher:
    """`python -m nmoe_backend.launch` as a child, its output line by line."""

    def __init__(self, tmp_path: Path, *flags: str, initialize: str = "pass", supervisor: str = "") -> None:
        self.ports = free_ports(3)
        repository = tmp_path / "repository"
        if not repository.exists():
            write_echo_repository(repository, initialize)
        names = ("http_port", "grpc_port", "metrics_port")
        head = "\n".join(f"{name} = {port}" for name, port in zip(names, self.ports, strict=True))
        tables = f"[openai]\nworkers = 0\n[supervisor]\nrestart_delay_s = 0.2\n{supervisor}"
        self.toml = write_toml(tmp_path / "c.toml", write_model_folder(tmp_path / "model"), head, tables)
        arguments = ["--config", str(self.toml), "--model-repository", str(repository), *flags]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nmoe_backend.launch", *arguments],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(tmp_path)},  # one that is killed leaves its copy of the TOML there
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._queue: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._queue.put(line.rstrip("\n"))
        self._queue.put(None)

    def wait_for(self, pattern: str) -> str:
        """The next line that matches; fails at the end of the output."""
        deadline = time.monotonic() + LIMIT_S
        while (line := self._queue.get(timeout=max(0.1, deadline - time.monotonic()))) is not None:
            self.lines.append(line)
            if re.search(pattern, line):
                return line
        raise AssertionError(f"the launcher ended without {pattern!r}:\n" + "\n".join(self.lines))

    def wait_for_end(self) -> int:
        """The exit code; `lines` is complete afterwards."""
        code = self.process.wait(LIMIT_S)
        while (line := self._queue.get(timeout=LIMIT_S)) is not None:
            self.lines.append(line)
        return code

    def server(self) -> int:
        """Process id of its tritonserver."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        assert len(children) == 1, children
        return int(children[0])

    def post(self, text: str) -> str:
        """What the ensemble generates."""
        url = f"http://127.0.0.1:{self.ports[0]}/v2/models/ensemble/generate"
        body = f'{{"text_input": "{text}", "max_tokens": 4}}'.encode()
        with urllib.request.urlopen(url, body, timeout=LIMIT_S) as answer:
            return str(answer.read().decode())

    def assert_nothing_is_left(self, group: int, shm_prefix: str) -> None:
        """No process of the group, no shared memory, no listener."""
        assert server_process.group_members(group) == []
        assert server_process.shared_memory(shm_prefix) == []
        for port in self.ports:
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[list[Launcher]]:
    """Launchers that a test starts; whatever it leaves running is ended."""
    started: list[Launcher] = []
    yield started
    for launcher in started:
        if launcher.process.poll() is None:
            launcher.process.send_signal(signal.SIGTERM)
            launcher.process.send_signal(signal.SIGTERM)
            launcher.process.wait(LIMIT_S)


def start(
    launched: list[Launcher], tmp_path: Path, *flags: str, initialize: str = "pass", supervisor: str = ""
) -> Launcher:
    launched.append(Launcher(tmp_path, *flags, initialize=initialize, supervisor=supervisor))
    return launched[-1]


def prefix_of(group: int) -> str:
    """The shared-memory prefix on a server's command line."""
    command = Path(f"/proc/{group}/cmdline").read_text()
    match = re.search(r"shm-region-prefix-name=([\w]+)", command)
    assert match is not None
    return match.group(1)


def test_it_starts_answers_the_pasted_commands_and_stops_without_a_trace(
    launched: list[Launcher], tmp_path: Path
) -> None:
    launcher = start(launched, tmp_path)
    launcher.wait_for("doctor: .* checks, ")
    launcher.wait_for("starting Triton")
    launcher.wait_for("echo: loading")
    launcher.wait_for(f"ready: HTTP {launcher.ports[0]}")
    group = launcher.server()
    prefix = prefix_of(group)
    assert server_process.shared_memory(prefix)
    for model in ("ensemble", "deepseek_v3"):
        command = shlex.split(launcher.wait_for(f"curl .*{model}"))
        with urllib.request.urlopen(command[2], command[4].encode(), timeout=LIMIT_S) as answer:
            assert "The capital of France is" in answer.read().decode()
    launcher.process.send_signal(signal.SIGINT)
    assert launcher.wait_for_end() == 0
    assert launcher.lines[-1].endswith("stopped")
    launcher.assert_nothing_is_left(group, prefix)


def test_what_a_model_prints_while_it_loads_is_shown_before_the_server_is_ready(
    launched: list[Launcher], tmp_path: Path
) -> None:
    body = 'from nmoe_backend import stub\nstub.print_lines_at_once()\nprint("weights: 3.1 s")'
    launcher = start(launched, tmp_path, initialize=body)
    launcher.wait_for("ready: ")
    assert any(line.endswith("] weights: 3.1 s") for line in launcher.lines)


def test_a_request_that_runs_when_the_signal_comes_still_gets_its_answer(
    launched: list[Launcher], tmp_path: Path
) -> None:
    launcher = start(launched, tmp_path)
    launcher.wait_for("ready: ")
    group = launcher.server()
    prefix = prefix_of(group)
    with slow_request(launcher):
        launcher.process.send_signal(signal.SIGTERM)
        assert launcher.wait_for_end() == 0
    launcher.assert_nothing_is_left(group, prefix)


def test_a_second_signal_kills_at_once_and_cleans_up(launched: list[Launcher], tmp_path: Path) -> None:
    launcher = start(launched, tmp_path)
    launcher.wait_for("ready: ")
    group = launcher.server()
    prefix = prefix_of(group)
    os.kill(group, signal.SIGSTOP)  # a server that does not react
    launcher.process.send_signal(signal.SIGINT)
    launcher.wait_for("stopping")
    launcher.process.send_signal(signal.SIGINT)
    assert launcher.wait_for_end() == 1
    assert launcher.lines[-1].endswith("stopped by force")
    launcher.assert_nothing_is_left(group, prefix)


def test_a_model_that_fails_to_load_is_reported_with_its_own_words(launched: list[Launcher], tmp_path: Path) -> None:
    launcher = start(launched, tmp_path, initialize='raise RuntimeError("no such weights: lm_head")')
    assert launcher.wait_for_end() == 1
    output = "\n".join(launcher.lines)
    assert "tritonserver ended while it started (exit code 1)" in output
    assert "no such weights: lm_head" in output
    assert "nmoe doctor --config" in output


def test_a_server_that_is_killed_is_cleaned_up_and_started_again(launched: list[Launcher], tmp_path: Path) -> None:
    launcher = start(launched, tmp_path)
    launcher.wait_for("ready: ")
    launcher.toml.write_text("broken = [")  # a half-edited file must not stand in the way of a restart
    group = launcher.server()
    prefix = prefix_of(group)
    os.kill(group, signal.SIGKILL)
    launcher.wait_for("restarting tritonserver in 0.2 s: it died")
    assert any("nmoe: tritonserver died (exit code -9)" in line for line in launcher.lines)
    launcher.wait_for("tritonserver is ready again after")
    assert '"text_output":"again"' in launcher.post("again")
    assert server_process.group_members(group) == [] and server_process.shared_memory(prefix) == []
    group = launcher.server()
    prefix = prefix_of(group)
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.wait_for_end() == 0
    launcher.assert_nothing_is_left(group, prefix)


@pytest.mark.parametrize(
    ("supervisor", "reason"),
    [("restart = false", "died; it is not restarted because"), ("restart_limit = 1", "after 1 restarts within 3600 s")],
)
def test_where_it_is_not_to_be_restarted_the_end_has_an_exit_code_and_a_reason(
    launched: list[Launcher], tmp_path: Path, supervisor: str, reason: str
) -> None:
    launcher = start(launched, tmp_path, supervisor=supervisor)
    launcher.wait_for("ready: ")
    group = launcher.server()
    os.kill(group, signal.SIGKILL)
    if "limit" in supervisor:
        launcher.wait_for("ready again")
        group = launcher.server()
        os.kill(group, signal.SIGKILL)
    assert launcher.wait_for_end() == 1
    assert any("nmoe: giving up: tritonserver died" in line and reason in line for line in launcher.lines)
    launcher.assert_nothing_is_left(group, "nmoe_none_")


def test_nmoe_drain_lets_requests_finish_and_waits_for_the_end(launched: list[Launcher], tmp_path: Path) -> None:
    launcher = start(launched, tmp_path)
    launcher.wait_for("ready: ")
    group = launcher.server()
    prefix = prefix_of(group)
    with slow_request(launcher):
        arguments = [sys.executable, "-m", "nmoe_backend", "drain", "--config", str(launcher.toml)]
        drained = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        assert (drained.returncode, drained.stdout) == (0, "drained\n"), drained
        assert launcher.wait_for_end() == 0
    launcher.assert_nothing_is_left(group, prefix)


def test_when_the_launcher_is_killed_the_server_ends_by_itself(launched: list[Launcher], tmp_path: Path) -> None:
    launcher = start(launched, tmp_path)
    launcher.wait_for("ready: ")
    group = launcher.server()
    prefix = prefix_of(group)
    launcher.process.kill()
    wait_until(
        lambda: not server_process.group_members(group) and not server_process.shared_memory(prefix),
        "nothing of the server is left",
    )
    launcher.assert_nothing_is_left(group, prefix)


def test_a_signal_during_the_start_ends_it(launched: list[Launcher], tmp_path: Path) -> None:
    launcher = start(launched, tmp_path, initialize="time.sleep(3)")
    launcher.wait_for("echo: loading")
    group = launcher.server()
    prefix = prefix_of(group)
    launcher.process.send_signal(signal.SIGTERM)
    launcher.wait_for_end()
    launcher.assert_nothing_is_left(group, prefix)


def test_a_start_that_takes_too_long_is_given_up(launched: list[Launcher], tmp_path: Path) -> None:
    launcher = start(launched, tmp_path, "--start-timeout", "1", initialize="time.sleep(600)")
    assert launcher.wait_for_end() == 1
    assert any("was not ready after 1 s" in line for line in launcher.lines)


def test_flags_behind_two_dashes_reach_tritonserver(launched: list[Launcher], tmp_path: Path) -> None:
    launcher = start(launched, tmp_path, "--", "--id=chosen-name")
    launcher.wait_for("ready: ")
    with urllib.request.urlopen(f"http://127.0.0.1:{launcher.ports[0]}/v2", timeout=LIMIT_S) as answer:
        assert '"name":"chosen-name"' in answer.read().decode()


@contextlib.contextmanager
def slow_request(launcher: Launcher) -> Iterator[None]:
    """A request that is running inside, and has its answer behind it."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(launcher.post, "slow")
        wait_until(lambda: connections_to(launcher.ports[0]) > 0, "the client is connected")
        yield
        assert '"text_output":"slow"' in answer.result(LIMIT_S)


def connections_to(port: int) -> int:
    """Established connections to a local port, from /proc/net/tcp."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return sum(1 for line in lines if line.split()[2].endswith(f":{port:04X}") and line.split()[3] == "01")
