"""Prometheus over a live server: every query gives data, and each alert fires under a fault made for it and clears.

One server with room for few sequences, so that a small load is too much for it. All windows and waits of the rules are
a sixtieth.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nmoe_backend.server_process import group_members
from tests.deploy.load import Load
from tests.deploy.manifests import ROOT, TOOLS
from tests.deploy.prometheus import RULES, Prometheus, alerts, panels, shortened
from tests.front_end import FrontEnd
from tests.triton_server import TritonServer, write_config
from tests.waiting import wait_until

QUIET = {"NmoeNoReplica"}  # `absent`: its query has data only while it fires
LIMIT_S = 90.0


def stub_of(triton: TritonServer) -> int:
    """The process of the engine: the stub with the most memory."""

    def resident(pid: int) -> int:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1])

    stubs = [pid for pid in group_members(triton.process.pid) if b"stub" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return max(stubs, key=resident)


@contextmanager
def stuttering(pid: int) -> Iterator[None]:
    """The process stands still for most of the time: the fault of a machine that somebody else uses."""
    over = threading.Event()

    def stutter() -> None:
        while not over.wait(0.1):
            os.kill(pid, signal.SIGSTOP)
            over.wait(0.4)
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=stutter)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.slow
def test_every_query_has_data_and_every_alert_fires_and_clears(tmp_path: Path, api_checkpoint: Path) -> None:
    config = write_config(
        tmp_path / "small.toml", api_checkpoint, gpus=[0, 1], max_batch_size=32, num_pages=400, max_queue_size=160
    )
    with TritonServer(config) as triton, FrontEnd(config, triton.grpc) as front:
        targets = {"nmoe": [triton.metrics], "nmoe-api": [front.address]}
        with Prometheus(tmp_path, targets) as prometheus:
            fires = Watch(prometheus)
            with Load(front.url, per_s=4.0, max_tokens=24) as load:
                wait_until(lambda: load.ends["ok"] > 60, "60 answers", LIMIT_S)
                assert prometheus.firing() == set() and set(load.ends) == {"ok"}
                assert_every_query_has_data(prometheus)
            # long answers: a page stays free for each sequence, and few of them hold many pages each
            with Load(front.url, per_s=40.0, max_tokens=950, leaves=True):
                fires.wait_for("NmoeQueueGrowing", "NmoeKVCacheNearlyFull", "NmoeTimeToFirstTokenHigh", "NmoeErrorRate")
                draw(prometheus, tmp_path / "dashboard.svg")
                with stuttering(stub_of(triton)):
                    fires.wait_for("NmoeDecodeThroughputLow", "NmoeInterTokenLatencyHigh")
            fires.wait_for_none()
            triton.process.kill()
            fires.wait_for("NmoeNotReady", "NmoeNoReplica")
            assert fires.seen == set(alerts())
            with triton:
                fires.wait_for_none()
            assert prometheus.broken_rules() == []


class Watch:
    """What has fired so far."""

    def __init__(self, prometheus: Prometheus) -> None:
        self._prometheus = prometheus
        self.seen: set[str] = set()

    def wait_for(self, *names: str) -> None:
        """Until each has fired since now."""
        missing, limit = set(names), time.monotonic() + LIMIT_S
        while missing:
            assert time.monotonic() < limit, f"{sorted(missing)} did not fire within {LIMIT_S} s"
            firing = self._prometheus.firing()
            self.seen.update(firing)
            missing -= firing
            time.sleep(0.1)

    def wait_for_none(self) -> None:
        """Until nothing fires."""
        wait_until(lambda: not self._prometheus.firing(), "no alert fires", LIMIT_S)


def assert_every_query_has_data(prometheus: Prometheus) -> None:
    def has_data(text: str) -> bool:
        """A quantile of a histogram without an observation is a series too, of NaN."""
        return any(one["value"][1] != "NaN" for one in prometheus.query(text))

    for title, expressions in panels().items():
        for text in expressions:
            assert has_data(text), f"no data for panel {title}: {text}"
    for name, text in alerts(shortened(RULES.read_text())).items():
        for operand in re.split(r"\s(?:and|or)\s", text):  # a comparison gives data only while it holds
            everything = re.sub(r"\s([<>]|==)\s", r" \1 bool ", operand)
            assert name in QUIET or has_data(everything), f"no data for alert {name}: {everything}"


def draw(prometheus: Prometheus, picture: Path) -> None:
    """The picture of the main panels, as docs/ has one."""
    program = TOOLS / "python"
    assert program.exists(), "matplotlib is not set up. Run scripts/_tools, or scripts/test --all."
    command = [str(program), "-m", "perf.draw_dashboard", prometheus.url, "--seconds", "60", "--out", str(picture)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "Time to the first token" in picture.read_text()
