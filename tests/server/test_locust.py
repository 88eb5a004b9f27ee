"""perf/locustfile.py against both faces: every user asks, every token arrives, and the report is written."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from perf.scripted import ROOT
from tests.front_end import FrontEnd
from tests.server.metrics import settled, snapshot_at_rest
from tests.triton_server import TritonServer

GENERATED = "nmoe_generation_tokens_total"
PYTHON = ROOT / ".venv-tools" / "bin" / "python"


@pytest.mark.slow
def test_locusts_users_get_every_token_that_they_asked_for(
    triton: TritonServer, config_path: Path, tmp_path: Path
) -> None:
    assert PYTHON.exists(), "locust is not set up. Run scripts/_tools, or scripts/test --all."
    before = snapshot_at_rest(triton, [GENERATED])[GENERATED]
    with FrontEnd(config_path, triton.grpc) as front:
        command = [
            str(PYTHON), "-m", "locust", "-f", "perf/locustfile.py", "--headless", "--host", front.url,
            "--grpc", triton.grpc, "--users", "11", "--spawn-rate", "11", "--run-time", "8s", "--stop-timeout", "60s",
            "--scale", "0.05", "--long", "300", "--burst", "4", "--pause", "0.5",
            "--html", str(tmp_path / "load.html"), "--json-file", str(tmp_path / "load"), "--only-summary",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr  # 1 where a request failed
    lines = {one["name"]: one for one in json.loads((tmp_path / "load.json").read_text())}
    whole = ["chat", "deepseek_v3", "long context", "burst"]
    assert lines.keys() == {name + part for name in whole for part in ("", ": first token", ": between tokens")}
    assert all(lines[name]["num_requests"] == lines[f"{name}: first token"]["num_requests"] > 0 for name in whole)
    num_tokens = sum(lines[name]["total_content_length"] for name in whole)
    settled(triton, {GENERATED: before + num_tokens})
    assert "chat: first token" in (tmp_path / "load.html").read_text()
