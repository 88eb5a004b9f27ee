"""`nmoe serve` watches its server from outside: without restarts it ends with what it watches. More: tests/faults."""

from __future__ import annotations

import os
import queue
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nmoe_backend import grpc_probe
from nmoe_backend.server_process import group_members, shared_memory
from perf.scripted import ROOT
from tests.server.scripted_streams import scripted
from tests.triton_server import TritonServer, free_ports

LIMIT_S = 20.0


class Serve:
    """`nmoe serve` over a repository, its output line by line."""

    def __init__(self, config: Path, repository: Path) -> None:
        self.http_port, grpc_port, metrics_port = free_ports(3)
        ports = [f"--http-port={self.http_port}", f"--grpc-port={grpc_port}", f"--metrics-port={metrics_port}"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nmoe_backend.launch", "--config", config, "--model-repository", repository, *ports],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(config.parent)},  # one that is killed leaves its copy of the TOML there
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)

    def wait_for(self, pattern: str) -> None:
        """The next line that matches."""
        while not re.search(pattern, self.lines.get(timeout=LIMIT_S)):
            pass

    def server(self) -> int:
        """Process id of its tritonserver, which leads the group."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        assert len(children) == 1, children
        return int(children[0])

    def generate(self, max_tokens: int) -> int:
        """The status of a generation; 0 where the connection broke."""
        url = f"http://127.0.0.1:{self.http_port}/v2/models/deepseek_v3/generate"
        body = f'{{"text_input": "hello", "max_tokens": {max_tokens}, "ignore_eos": true}}'.encode()
        try:
            with urllib.request.urlopen(url, body, timeout=LIMIT_S) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0


@pytest.fixture
def serve(model_path: Path, tmp_path: Path) -> Iterator[Callable[[str], Serve]]:
    """Starts `nmoe serve` over scripted ranks, with other lines as its model.py where they are given."""
    started: list[Serve] = []

    def start(model: str) -> Serve:
        config, repository = scripted(model_path, tmp_path, step_ms=10)
        config.write_text(config.read_text() + "[supervisor]\nrestart = false\n[openai]\nworkers = 0\n")
        if model:
            (repository / "deepseek_v3" / "1" / "model.py").write_text(model)
        started.append(Serve(config, repository))
        started[-1].wait_for("ready: ")
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait(LIMIT_S)


def assert_ends_within_5_s(one: Serve, group: int, prefix: str) -> None:
    """The heartbeat is pushed four times a second and read twice a second; the limit is 3.5 s."""
    began = time.monotonic()
    assert one.process.wait(LIMIT_S) == 1
    assert time.monotonic() - began < 7.0  # 5 s, and the kill
    one.wait_for("engine without a heartbeat")
    assert group_members(group) == [] and shared_memory(prefix) == []


def prefix_of(group: int) -> str:
    """Of its shared memory, from its command line."""
    return re.findall(r"shm-region-prefix-name=(\w+)", Path(f"/proc/{group}/cmdline").read_text())[0]


def test_dead_senders_end_the_server(serve: Callable[[str], Serve]) -> None:
    one = serve(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from types import SimpleNamespace\n"
        "from perf.scripted import scripted_model\n"
        "class TritonPythonModel(scripted_model()):\n"
        "    def execute(self, requests):\n"
        "        if any(one.name() == 'ignore_eos' for one in requests[0].inputs()):  # ours, not the launcher's\n"
        "            for sender in range(4):\n"
        "                no_stream = SimpleNamespace(served_s=0.0, request_id=-1 - sender)\n"
        "                self._responder._ready.put(no_stream)  # ends a sender's thread\n"
        "        return super().execute(requests)\n"
    )
    group = one.server()
    prefix = prefix_of(group)
    assert one.generate(max_tokens=3) == 0  # nobody is left to answer: the connection breaks with the server
    assert_ends_within_5_s(one, group, prefix)


def test_a_live_server_answers_over_grpc_whatever_proxy_the_environment_names(
    triton: TritonServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert grpc_probe.answers(triton.grpc)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("no_proxy", raising=False)
    assert grpc_probe.answers(triton.grpc)
    assert not grpc_probe.answers(triton.http), "no gRPC there"


def test_when_the_launcher_is_killed_nothing_outlives_it(serve: Callable[[str], Serve]) -> None:
    one = serve("")
    group = one.server()
    prefix = prefix_of(group)
    one.process.kill()  # the server is killed with it, so the models never hear of an end
    limit = time.monotonic() + LIMIT_S
    while group_members(group) or shared_memory(prefix):
        assert time.monotonic() < limit, f"left: {group_members(group)}, {shared_memory(prefix)}"
        time.sleep(0.05)
