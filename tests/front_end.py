"""`nmoe api` for tests and benchmarks: the product's own command line, on a free port, in front of a running Triton."""

from __future__ import annotations

import os
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from nmoe_backend.server_process import ChildProcess
from tests.running import Running
from tests.triton_server import free_ports

START_S = 60.0


class FrontEnd(Running[ChildProcess]):
    """One front end; a context manager. `lines` is everything that it printed."""

    stop_s = 30.0

    def __init__(self, config_path: Path, triton: str, environment: Mapping[str, str] | None = None) -> None:
        """`triton`: HOST:PORT of gRPC."""
        super().__init__()
        (port,) = free_ports(1)
        self.address = f"127.0.0.1:{port}"
        self.url = f"http://{self.address}"
        options = ["--config", str(config_path), "--host", "127.0.0.1", "--openai-port", str(port), "--triton", triton]
        self._argv = [sys.executable, "-m", "nmoe_backend", "api", *options]
        self._environment = dict(environment or {})

    def _start(self) -> ChildProcess:
        root = Path(__file__).resolve().parents[1]
        env = {**os.environ, "PYTHONPATH": str(root), **self._environment}
        return ChildProcess(self._argv, env, self.lines.append)

    def _wait_until_ready(self) -> None:
        limit = time.monotonic() + START_S
        while time.monotonic() < limit and self.process.exit_code() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/ready", timeout=5):
                    return
            except OSError:
                time.sleep(0.1)
        raise AssertionError("the front end did not become ready:\n" + "\n".join(self.lines))
