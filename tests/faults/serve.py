"""`nmoe serve` with both faces, as an operator starts it, and clients that check every token that they get."""

from __future__ import annotations

import http.client
import json
import os
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from nmoe_backend.server_process import group_members, shared_memory
from perf.known_tokens import alphabet, known_tokens, write_known_repository
from perf.scripted import ROOT
from tests.server.client import Stream
from tests.triton_server import REPOSITORY, free_ports, write_config
from tests.waiting import wait_until

LIMIT_S = 60.0
PORTS = ("http_port", "grpc_port", "metrics_port", "openai_port")
QUICK = "restart_delay_s = 0.2\nrestart_limit = 50\n"


@dataclass(frozen=True)
class Outcome:
    """How one request ended. `is_right`: the answer, or its beginning where there is an error."""

    is_right: bool
    num_pieces: int  # tokens over gRPC, characters over OpenAI's API
    error: str
    ended_s: float


class Serve:
    """A context manager. `[supervisor]` gets the lines `supervisor`, the top level `values`; engine None: ours."""

    def __init__(
        self,
        folder: Path,
        model_path: Path,
        supervisor: str = QUICK,
        engine: str | None = "tests.faults.faulty_engine",
        step_ms: float = 10.0,
        **values: Any,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.ports = dict(zip(PORTS, free_ports(4), strict=True))
        self.config = write_config(
            folder / "faults.toml", model_path,
            **{"gpus": [0, 1], "max_seq_len": 4096, "num_pages": 2048, **self.ports, **values},
        )  # fmt: skip
        self.fault = folder / "fault"
        tables = f'[supervisor]\n{supervisor}\n[benchmark]\nstep_ms = {step_ms}\nfault = "{self.fault}"\n'
        self.config.write_text(self.config.read_text() + tables)
        self.repository = REPOSITORY if engine is None else write_known_repository(folder, engine)
        self.grpc = f"127.0.0.1:{self.ports['grpc_port']}"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.letters = alphabet(model_path)
        self.tokenizer = Tokenizer.from_file(str(model_path / "tokenizer.json"))
        self._lines: queue.Queue[str | None] = queue.Queue()
        self.output: list[str] = []
        self._prefixes: set[str] = set()
        self._groups: set[int] = set()

    def __enter__(self) -> Serve:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nmoe_backend", "serve", "-c", self.config, "--model-repository", self.repository],
            cwd=ROOT, env={**os.environ, "TMPDIR": str(self.temporary)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.wait_for("ready: ")
        except BaseException:
            self.process.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(LIMIT_S)
        self.assert_nothing_is_left()
        assert all(json.loads(line) for line in self.output if '{"time"' in line), "events are JSON, a line each"

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)
            self._lines.put(line)
        self._lines.put(None)

    def wait_for(self, pattern: str) -> str:
        """The next line that matches."""
        limit = time.monotonic() + LIMIT_S
        while (line := self._lines.get(timeout=max(0.1, limit - time.monotonic()))) is not None:
            if re.search(pattern, line):
                return line
        raise AssertionError(f"it ended without {pattern!r}:\n{''.join(self.output)}")

    # Processes

    def children(self) -> dict[str, int]:
        """`triton` and `front end` -> process id, those that run."""
        pids = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        found = {}
        for pid in map(int, pids):
            command = Path(f"/proc/{pid}/cmdline").read_text()
            found["front end" if "api.server" in command else "triton"] = pid
            self._groups.add(pid)
            self._prefixes.update(re.findall(r"shm-region-prefix-name=(\w+)", command))
        return found

    def open_files(self) -> int:
        """Of `nmoe serve` itself."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def stub(self) -> int:
        """Process id of the engine's process."""
        members = group_members(self.children()["triton"])
        (pid,) = [one for one in members if re.search(rb"models/deepseek_v3/|/deepseek_v3/1/", _command(one))]
        return pid

    def shared_memory(self) -> list[Path]:
        """Of every Triton that `children` saw."""
        return [path for prefix in self._prefixes for path in shared_memory(prefix)]

    def kill(self, pid: int) -> None:
        """SIGKILL."""
        self.children()
        os.kill(pid, signal.SIGKILL)

    def assert_nothing_is_left(self) -> None:
        """No temporary file, no listener, and of all that `children` saw: no process of a group, no shared memory."""
        assert list(self.temporary.iterdir()) == []
        assert [group_members(group) for group in self._groups if group_members(group)] == []
        assert self.shared_memory() == []
        for port in self.ports.values():
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", port)) != 0

    def inject(self, kind: str) -> None:
        """See faulty_engine.py."""
        self.fault.write_text(kind)
        wait_until(lambda: not self.fault.exists(), f"{kind!r} was taken")

    # Clients

    def prompt(self, seed: int, length: int = 12) -> list[int]:
        """Ids."""
        return random.Random(seed).choices(self.letters, k=length)

    def ask_grpc(self, prompt: list[int], max_tokens: int, **fields: object) -> Outcome:
        """One stream of `deepseek_v3`."""
        with Stream(self.grpc) as stream:
            answer = stream.ask(
                {"input_ids": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": True, **fields}
            )
        expected = known_tokens(self.letters, prompt, max_tokens)
        return _outcome(expected, answer.ids, answer.error)

    def ask_openai(self, prompt: list[int], max_tokens: int, stream: bool = True, **fields: object) -> Outcome:
        """One completion of the front end."""
        expected = self.tokenizer.decode(known_tokens(self.letters, prompt, max_tokens))
        body = {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": stream,
            **fields,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.ports["openai_port"], timeout=LIMIT_S)
        text, error = "", "the stream broke off"
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200 or not stream:
                whole = json.loads(answer.read())
                text, error = (
                    ("", f"{answer.status} {whole}") if answer.status != 200 else (whole["choices"][0]["text"], "")
                )
            else:
                for line in answer:
                    if line.startswith(b"data: {"):
                        event = json.loads(line[6:])
                        error = str(event["error"]) if "error" in event else error
                        text += event["choices"][0]["text"] if "choices" in event else ""
                    elif line.startswith(b"data: [DONE]"):
                        error = ""
        except (OSError, http.client.HTTPException) as failure:
            error = repr(failure)
        finally:
            connection.close()
        return _outcome(expected, text, error)

    @contextmanager
    def live(self, count: int, max_tokens: int) -> Iterator[list[Future[Outcome]]]:
        """Requests that run, half of them over each face."""
        before = self.metric("nmoe_generation_tokens_total")
        with ThreadPoolExecutor(count) as pool:
            asks: Sequence[Callable[..., Outcome]] = (self.ask_grpc, self.ask_openai)
            futures = [pool.submit(asks[index % 2], self.prompt(index), max_tokens) for index in range(count)]
            wait_until(lambda: self.metric("nmoe_requests_running") == count, "all run")
            wait_until(lambda: self.metric("nmoe_generation_tokens_total") > before, "tokens came")
            yield futures

    def assert_serves(self) -> None:
        """Both faces answer, rightly and wholly, and afterwards nothing is held."""
        for ask in (self.ask_grpc, self.ask_openai):
            outcome = ask(self.prompt(99), 20)
            assert outcome.error == "" and outcome.is_right, outcome
        self.assert_idle()

    def assert_idle(self) -> None:
        """No request, no page."""
        for name in ("nmoe_requests_running", "nmoe_requests_waiting", "nmoe_kv_cache_utilization_percent"):
            wait_until(lambda name=name: self.metric(name) == 0.0, f"{name} is 0")  # type: ignore[misc]

    def status(self, port: str, path: str) -> int:
        """Of a GET; 0 where nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[port], timeout=5)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return 0
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        """A series without labels; -1 where there is none now."""
        connection = http.client.HTTPConnection("127.0.0.1", self.ports["metrics_port"], timeout=5)
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        except (OSError, http.client.HTTPException):
            return -1.0
        finally:
            connection.close()
        found = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else -1.0


def _outcome(expected: Sequence[object], got: Sequence[object], error: str) -> Outcome:
    is_right = got == (expected[: len(got)] if error else expected)
    return Outcome(is_right, len(got), error, time.monotonic())


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
