"""SIGTERM and `nmoe drain`: no port is ready any more, what runs ends whole, exit code 0, nothing stays behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from perf.scripted import ROOT
from tests.faults.serve import LIMIT_S, Serve
from tests.waiting import wait_until

AT_ONCE_S = 2.0  # `nmoe drain` is a Python that starts


@pytest.mark.parametrize("how", ["SIGTERM", pytest.param("nmoe drain", marks=pytest.mark.slow)])
def test_a_drain_during_prefill_lets_it_finish(model_path: Path, tmp_path: Path, how: str) -> None:
    with Serve(tmp_path, model_path, step_ms=250) as serve, ThreadPoolExecutor(3) as pool:
        serve.children()
        before = serve.metric("nmoe_generation_tokens_total")
        asks = [pool.submit(ask, serve.prompt(1, length=1000), 4) for ask in (serve.ask_grpc, serve.ask_openai)]
        wait_until(lambda: serve.metric("nmoe_requests_running") == 2, "both are in prefill: 8 steps of 128 tokens")
        assert serve.metric("nmoe_generation_tokens_total") == before
        if how == "SIGTERM":
            serve.process.send_signal(signal.SIGTERM)
        else:
            command = [sys.executable, "-m", "nmoe_backend", "drain", "--http-port", str(serve.ports["http_port"])]
            drain = pool.submit(subprocess.run, command, cwd=ROOT, timeout=LIMIT_S, check=False)
        wait_until(lambda: serve.status("http_port", "/v2/health/ready") != 200, "Triton is not ready", AT_ONCE_S)
        wait_until(lambda: serve.status("openai_port", "/ready") != 200, "the front end is not ready", AT_ONCE_S)
        assert not any(ask.done() for ask in asks)
        for ask in asks:
            outcome = ask.result(timeout=LIMIT_S)
            assert outcome.is_right and not outcome.error, outcome
        assert serve.process.wait(LIMIT_S) == 0
        if how == "nmoe drain":
            assert drain.result(timeout=LIMIT_S).returncode == 0


@pytest.mark.slow
def test_what_outlasts_the_drain_ends_with_an_error(model_path: Path, tmp_path: Path) -> None:
    with Serve(tmp_path, model_path, supervisor="drain_s = 2.0\n[openai]\ndrain_s = 2.0") as serve:
        with serve.live(4, max_tokens=3500) as futures:
            serve.children()
            serve.process.send_signal(signal.SIGTERM)
            signalled_s = time.monotonic()
            outcomes = [future.result(timeout=LIMIT_S) for future in futures]
        for outcome in outcomes:
            assert outcome.is_right and outcome.error and outcome.ended_s - signalled_s < 2.0 + 5.0, outcome
        assert serve.process.wait(LIMIT_S) == 0  # the deadline is part of what was asked for
        assert "tritonserver still had requests after 2 s: they are cut off" in "".join(serve.output)


@pytest.mark.slow
def test_a_drain_while_it_restarts_ends_it(model_path: Path, tmp_path: Path) -> None:
    with Serve(tmp_path, model_path, supervisor="restart_delay_s = 600.0") as serve:
        serve.kill(serve.children()["triton"])
        serve.wait_for("restarting tritonserver in 600 s")
        assert serve.status("openai_port", "/ready") == 503
        command = [sys.executable, "-m", "nmoe_backend", "drain", "--config", str(serve.config)]
        assert subprocess.run(command, cwd=ROOT, timeout=LIMIT_S, check=False).returncode == 0
        assert serve.process.wait(LIMIT_S) == 0
