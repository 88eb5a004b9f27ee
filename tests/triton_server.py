"""A real tritonserver for tests and benchmarks, started with the product's own command line, on free ports."""

from __future__ import annotations

import json
import socket
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from nmoe_backend.config import ServeConfig
from nmoe_backend.server_process import ServerProcess
from nmoe_backend.tritonserver import server_command
from tests.running import Running

REPOSITORY = Path(__file__).resolve().parents[1] / "model_repository"
START_S = 180.0


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


class TritonServer(Running[ServerProcess]):
    """One server over one TOML; a context manager. `lines` is everything that it printed."""

    stop_s = 60.0

    def __init__(
        self,
        config_path: Path,
        repository: Path = REPOSITORY,
        flags: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        names = ("http_port", "grpc_port", "metrics_port")
        ports = dict(zip(names, free_ports(3), strict=True))
        self.config = ServeConfig.from_toml(config_path, ports)
        self.http, self.grpc, self.metrics = (f"127.0.0.1:{ports[name]}" for name in names)
        self.shm_prefix = f"nmoe_test_{uuid.uuid4().hex[:12]}_"
        self._repository, self._flags, self._environment = repository, tuple(flags), dict(environment or {})

    def _start(self) -> ServerProcess:
        argv, env = server_command(self.config, self._repository, self._flags, self.shm_prefix)
        return ServerProcess(argv, env | self._environment, self.shm_prefix, self.lines.append)

    def wait_for_exit(self, limit_s: float) -> int:
        """The exit code."""
        limit = time.monotonic() + limit_s
        while (code := self.process.exit_code()) is None:
            assert time.monotonic() < limit, f"tritonserver still runs after {limit_s} s"
            time.sleep(0.02)
        return code

    def get(self, path: str, address: str | None = None) -> bytes:
        """GET from the HTTP port, or from another address of this server."""
        with urllib.request.urlopen(f"http://{address or self.http}/{path}", timeout=30) as answer:
            body: bytes = answer.read()
            return body

    def post(self, path: str, body: object, timeout_s: float = 60.0) -> tuple[int, bytes]:
        """(status, body) of a POST of JSON, or of bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(f"http://{self.http}/{path}", data=data, timeout=timeout_s) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def generate(self, body: Mapping[str, object], model: str = "deepseek_v3") -> dict[str, object]:
        """The answer of /generate, which must be a 200."""
        status, answer = self.post(f"v2/models/{model}/generate", body)
        assert status == 200, f"{status}: {answer!r}"
        value: dict[str, object] = json.loads(answer)
        return value

    def metric(self, name: str, **labels: str) -> float:
        """The value of one series; 0 where it is not there yet."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        for line in self.get("metrics", self.metrics).decode().splitlines():
            series, _, value = line.rpartition(" ")
            if series.partition("{")[0] == name and all(label in series for label in wanted):
                return float(value)
        return 0.0

    def _wait_until_ready(self) -> None:
        limit = time.monotonic() + START_S
        while time.monotonic() < limit:
            if self.process.exit_code() is not None:
                break
            try:
                self.get("v2/health/ready")
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError(
            "tritonserver did not become ready:\n"
            + "\n".join(line for line in self.lines if not line.startswith(("+", "|  ")))
        )


def write_config(path: Path, model_path: Path, **values: object) -> Path:
    """A TOML for the CPU. Dotted table names are not needed: `replicas` gets eight ranks unless `gpus` says else."""
    gpus = values.pop("gpus", list(range(8)))
    settings = {
        "model_path": str(model_path),
        "model_name": "tiny",
        "device": "cpu",
        "dtype": "float32",
        "max_batch_size": 32,
        "max_prefill_tokens": 128,
        "num_pages": 512,
        "max_seq_len": 1024,
        "itl_target_ms": 500.0,
        "max_queue_size": 512,
        **values,
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    lines += ["[kv_layout]", "page_size = 16", "[[replicas]]", "replica_id = 0", f"gpus = {json.dumps(gpus)}"]
    path.write_text("\n".join(lines) + "\n")
    return path
