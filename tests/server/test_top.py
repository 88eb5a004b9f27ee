"""`nmoe top` beside a live server."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from perf.scripted import ROOT
from tests.server.metrics import scrape_when
from tests.server.scripted_streams import running_streams, scripted
from tests.triton_server import TritonServer


def test_one_frame_of_a_server_under_load(model_path: Path, tmp_path: Path) -> None:
    config, repository = scripted(model_path, tmp_path, step_ms=10)
    with TritonServer(config, repository) as server, running_streams(server, 6, max_tokens=300):
        scrape_when(server, lambda values: values["nmoe_decode_tokens_per_second"] > 100)
        command = [sys.executable, "-m", "nmoe_backend", "top", "--once", server.metrics]
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    flat = " ".join(out.replace("│", " ").split())  # a terminal of 80 columns breaks lines
    assert "alive" in flat and "running 6 waiting 0" in flat
    assert re.search(r"decode \d{3} tok/s", flat) and re.search(r"time to first token [\d.]+ [\d.]+ [\d.]+", flat)
    ranks = re.search(r"prefill backlog 0 (\d) [\d.]+ 0 1 (\d) [\d.]+ 0 ", flat)
    assert ranks is not None and int(ranks[1]) + int(ranks[2]) == 6
