"""Ends: SIGTERM under load, unload and reload, a broken engine; and a load tool that must run unmodified."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nmoe_backend.server_process import group_members
from perf import perf_analyzer
from perf.scripted import ROOT
from tests.server.client import Stream
from tests.server.metrics import settled
from tests.server.scripted_streams import LONG, running_streams, scripted
from tests.triton_server import TritonServer

SHM = Path("/dev/shm")


def leftovers(server: TritonServer) -> tuple[list[int], list[str]]:
    """Processes of the group and its shared memory."""
    names = [path.name for path in SHM.iterdir() if path.name.startswith(server.shm_prefix)]
    return group_members(server.process.pid), names


def test_sigterm_under_load_lets_streams_finish_and_leaves_nothing(model_path: Path, tmp_path: Path) -> None:
    config, repository = scripted(model_path, tmp_path, step_ms=20)
    with TritonServer(config, repository) as server:
        with running_streams(server, 16, max_tokens=100) as futures:
            server.terminate()
            answers = [future.result(timeout=60) for future in futures]
        assert [answer.error for answer in answers] == [""] * 16
        assert {len(answer.ids) for answer in answers} == {100}
        assert all(answer.responses[-1].final for answer in answers)
        assert server.wait_for_exit(30) == 0
        assert leftovers(server) == ([], [])


def test_sigterm_ends_streams_that_outlast_the_limit_with_an_error(model_path: Path, tmp_path: Path) -> None:
    config, repository = scripted(model_path, tmp_path, step_ms=20)
    with TritonServer(config, repository, flags=["--exit-timeout-secs=2"]) as server:
        with running_streams(server, 16, max_tokens=3000) as futures:
            # With streams left at its limit this server crashes, and may hang in its own handler: its starter kills it.
            server.process.stop(drain_s=6.0)
            answers = [future.result(timeout=60) for future in futures]
        assert all(answer.error for answer in answers)
    assert leftovers(server) == ([], [])


def test_a_broken_engine_ends_every_stream_with_an_error_and_says_why_once(model_path: Path, tmp_path: Path) -> None:
    config, repository = scripted(model_path, tmp_path, step_ms=10)
    model = repository / "deepseek_v3" / "1" / "model.py"
    model.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from perf.scripted import scripted_model\nfrom tests.server.failing_engine import start_failing\n"
        "TritonPythonModel = scripted_model(start_failing)\n"
    )
    with TritonServer(config, repository) as server:
        with running_streams(server, 8, max_tokens=2000) as futures:
            answers = [future.result(timeout=30) for future in futures]
        assert all("device 1 fell off the bus" in answer.error for answer in answers)
        with Stream(server.grpc) as stream:
            assert "no replica is alive" in stream.ask({**LONG, "max_tokens": 2}).error
        settled(server, {"nmoe_engine_alive": 0.0, "nmoe_request_errors_total{engine}": 8.0})
    assert len([line for line in server.lines if '"event": "engine_failed"' in line]) == 1  # of all that it printed


def resident_kb(pid: int) -> int:
    """RSS."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0])


def test_unloading_and_loading_leaves_no_memory_behind(config_path: Path) -> None:
    flags = ["--model-control-mode=explicit"]
    with TritonServer(config_path, flags=flags) as server:
        pid = server.process.pid
        assert leftovers(server) == ([pid], [])
        resident = []
        for _ in range(4):
            assert server.post("v2/repository/models/deepseek_v3/load", {})[0] == 200
            answer = server.generate({"text_input": "hello", "max_tokens": 4, "return_log_probs": True})
            assert answer["num_output_tokens"] == 4
            with Stream(server.grpc) as running, Stream(server.grpc) as control:
                running.send({**LONG, "max_tokens": 500}, request_id="a")
                running.read()
                assert control.ask({"stop": True}, request_id="a").error == ""
                assert "cancelled" in running.read_all().error
            assert server.post("v2/repository/models/deepseek_v3/unload", {})[0] == 200
            limit = time.monotonic() + 20
            while leftovers(server) != ([pid], []):
                assert time.monotonic() < limit, f"left after an unload: {leftovers(server)}"
                time.sleep(0.05)
            resident.append(resident_kb(pid))
        assert resident[3] - resident[1] < 8_000  # of the server itself; the engine lived in processes that have ended


def analyze(triton: TritonServer, folder: Path, model: str, *options: str) -> list[list[int]]:
    """perf_analyzer over six of the committed requests: of each concurrency, the tokens that each request brought."""
    asked = json.loads(perf_analyzer.INPUT.read_text())["data"][:6]
    (folder / "input.json").write_text(json.dumps({"data": asked}))
    command = [
        sys.executable, "-m", "perf.perf_analyzer", "-m", model, "-u", triton.grpc, "-i", "grpc", "--streaming",
        "--async", "--input-data", str(folder / "input.json"), "--profile-export-file", str(folder / "all.json"),
        *options,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    experiments = json.loads((folder / "all.json").read_text())["experiments"]
    found = [
        [sum(int(response["num_output_tokens"]) for response in one["response_outputs"]) for one in each["requests"]]
        for each in experiments
    ]
    assert {length for lengths in found for length in lengths} == {one["max_tokens"][0] for one in asked}
    return found


@pytest.mark.parametrize("model", ["deepseek_v3", "ensemble"])
def test_perf_analyzer_runs_unmodified(triton: TritonServer, tmp_path: Path, model: str) -> None:
    (lengths,) = analyze(triton, tmp_path, model, "--concurrency-range", "4", "--request-count", "24")
    assert len(lengths) >= 24


@pytest.mark.slow
def test_perf_analyzer_sweeps_concurrencies(triton: TritonServer, tmp_path: Path) -> None:
    table = tmp_path / "sweep.csv"
    swept = analyze(
        triton, tmp_path, "deepseek_v3", "--concurrency-range", "1:5:4", "--measurement-mode", "count_windows",
        "--measurement-request-count", "12", "--stability-percentage", "999", "-f", str(table),
    )  # fmt: skip
    assert all(len(lengths) >= 12 for lengths in swept)
    assert [row["Concurrency"] for row in csv.DictReader(table.read_text().splitlines())] == ["1", "5"]
