"""The suite over benchmarks that are small programs: what it runs, prints, draws, compares and exits with."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from nmoe_backend import bench
from nmoe_backend.types import ConfigError
from perf import bench_streaming, plots, suite
from perf.suite import Benchmark

FAKE = """
import json, sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
print("measuring", arguments["--commit"])
value = float(arguments["--value"])
line = {"value": value, "raw": value, "unit": "ms", "goal": "<= 9", "commit": arguments["--commit"], "method": "fake"}
entry = {"part": "x", "step_ms": value, "kernels_us": {"k": 1}}
document = {"name": "fake", "gpu": {"name": "NVIDIA H200"}, "results": [entry], "goals": {"G1": line}}
document |= {"commit": arguments["--commit"], "machine": "a machine"}
if value < 0:
    raise SystemExit("it broke")
open(arguments["--output"], "w").write(json.dumps(document))
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a suite of one fake benchmark that measures so many ms; returns the exit code."""
    (tmp_path / "fake.py").write_text(FAKE)
    baseline = tmp_path / "h200.json"
    baseline.write_text(json.dumps({name: {"value": 2.0, "unit": "ms", "commit": "old"} for name in ("G1", "other")}))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    out = tmp_path / "out"

    def command(self: Benchmark, folder: Path, args: Any) -> list[str]:
        where = ["--output", str(self.document(folder)), "--commit", args.commit]
        return ["python3", str(tmp_path / "fake.py"), *self.arguments, *where]

    monkeypatch.setattr(Benchmark, "command", command)

    def run_it(value: float, *argv: str, num_gpus: int = 1) -> int:
        fake = Benchmark(name="fake", arguments=("--value", str(value)), goals=("G1",), num_gpus=num_gpus)
        monkeypatch.setattr(suite, "SUITES", {"quick": (fake,)})
        return suite.main(["--output", str(out), "--commit", "abc", "--baseline", str(baseline), *argv])

    return run_it


def test_as_good_as_the_baseline_is_exit_code_0(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(2.09) == 0
    said = capsys.readouterr().out
    assert "\nfake: measuring abc\n== fake: exit code 0\n" in said and "nothing is more than 5 % worse" in said
    assert (tmp_path / "out" / "fake.log").read_text() == "measuring abc\n"
    assert json.loads((tmp_path / "out" / "goals.json").read_text())["G1"]["value"] == 2.09


def test_a_regression_beyond_five_percent_is_exit_code_1(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(2.11) == 1
    assert "WORSE G1: 2.11 ms, was 2 at old: +5.5 %" in capsys.readouterr().out
    assert run(2.11, "--percent", "6") == 0


def test_a_benchmark_that_fails_is_exit_code_1_and_leaves_no_old_result(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(2.0) == 0
    assert run(-1.0) == 1
    said = capsys.readouterr().out
    assert "FAILED: fake" in said and "it broke" in (tmp_path / "out" / "fake.log").read_text()
    assert "WORSE G1: the baseline has 2.0 ms, the run has no such entry" in said
    assert not (tmp_path / "out" / "fake.json").exists()


def test_too_few_gpus_are_named_and_nothing_is_missed(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(2.0, num_gpus=2) == 0
    assert "fake needs 2 GPUs, this machine has 1: NOT run" in capsys.readouterr().out


def test_save_keeps_the_other_lines(run: Any, tmp_path: Path) -> None:
    assert run(1.0, "--save") == 0
    saved = json.loads((tmp_path / "h200.json").read_text())
    assert saved["G1"]["value"] == 1.0 and saved["other"]["value"] == 2.0
    entries = json.loads((tmp_path / "h200_entries.json").read_text())
    assert entries["fake"]["results"] == [{"part": "x", "step_ms": 1.0}] and entries["fake"]["commit"] == "abc"


def test_collect_looks_at_what_is_there(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(2.11) == 1
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(Benchmark, "command", None)
    assert run(0.0, "--collect") == 1
    (tmp_path / "out" / "fake.json").unlink()
    assert run(0.0, "--collect") == 0


def test_every_benchmark_of_the_suites_exists_and_measures_what_it_says() -> None:
    goals = [goal for benchmark in suite.SUITES["full"] for goal in benchmark.goals]
    assert {"P1", "P2", "P4", "P5", "P6", "P7_engine", "P9"} <= set(goals) and len(goals) == len(set(goals))
    assert all(benchmark.is_alone for benchmark in suite.SUITES["full"] if benchmark.num_gpus != 1)
    for benchmark in (one for chosen in suite.SUITES.values() for one in chosen):
        source = Path(suite.__file__).with_name(f"bench_{benchmark.name}.py").read_text()
        assert all(f'"{goal}"' in source for goal in benchmark.goals), benchmark.name
        options = [argument for argument in benchmark.arguments if argument.startswith("--")]
        assert all(f'"{option}"' in source for option in options), benchmark.name


@pytest.mark.parametrize("benchmark", suite.SUITES["full"][1:], ids=lambda one: one.name)
def test_the_benchmarks_take_what_the_full_suite_gives_them(
    benchmark: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to where they want a GPU. The first, bench_rdep, cannot be imported without Triton-lang."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    args = argparse.Namespace(commit="abc", peers=None)
    _, _, module, *arguments = benchmark.command(tmp_path, args)
    main = importlib.import_module(module).main
    if benchmark.name != "streaming":
        with pytest.raises(SystemExit, match="got 0 CUDA GPUs"):
            main(arguments)
        return
    row = bench_streaming.Result(**dict.fromkeys(bench_streaming.Result.__dataclass_fields__, 1.0))
    monkeypatch.setattr(bench_streaming, "measure", lambda args, rate, folder: row)
    main(arguments)
    assert list(json.loads((tmp_path / "streaming.json").read_text())["goals"]) == ["P9"]


@pytest.mark.parametrize(
    ("gpu", "file"), [("NVIDIA H200", "h200.json"), ("NVIDIA H100 80GB HBM3", "h100.json"), ("Tesla T4", "t4.json")]
)
def test_a_baseline_belongs_to_a_kind_of_gpu(gpu: str, file: str) -> None:
    assert suite.baseline_path(gpu).name == file


def test_paths_reach_the_benchmarks_that_want_them(tmp_path: Path) -> None:
    args = argparse.Namespace(commit="abc", peers=Path("/p"))
    commands = {one.name: one.command(tmp_path, args) for one in suite.SUITES["full"]}
    assert {name for name, command in commands.items() if "--peers" in command} == {"kernels"}
    assert {name for name, command in commands.items() if "--model" in command} == {"streaming"}
    assert commands["rdep"][1:] == [
        "-m", "perf.bench_rdep", "--commit", "abc", "--output", str(tmp_path / "rdep.json")
    ]  # fmt: skip


def test_an_unknown_benchmark_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        suite.main(["--output", str(tmp_path), "--commit", "abc", "--only", "lmsys"])
    assert "has no lmsys; it has lmsys_decode" in capsys.readouterr().err


def test_nmoe_bench_hands_over_and_explains_itself_without_a_source_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(suite, "main", lambda argv: asked.append(argv) or 3)
    assert bench.main(["--suite", "full"]) == 3 and asked == [["--suite", "full"]]
    monkeypatch.setitem(sys.modules, "perf.suite", None)  # as where something that it imports is missing
    with pytest.raises(ConfigError, match="the benchmarks need perf.suite.*scripts/_setup gpu test"):
        bench.main([])
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "nmoe_backend" / "bench.py"))
    with pytest.raises(ConfigError, match="Run it from a checkout"):
        bench.main([])


def test_plots_are_drawn_from_what_benchmarks_leave(tmp_path: Path) -> None:
    decode = [
        {
            "part": "batch",
            "rows": rows,
            "context": 2000,
            "raw_tok_s_gpu": 16.0 * rows,
            "corrected_tok_s_gpu": 15.0 * rows,
            "corrected_step_ms": 60.0,
        }
        for rows in (1, 32, 256)
    ]
    spread = {"p50": 1.0, "p95": 2.0, "p99": 3.0}
    load = [
        {"part": "load", "path": path, "rate": rate, "tok_s": 64 * rate, "ttft_ms": spread, "itl_ms": spread}
        for path in ("engine", "server")
        for rate in (1.0, 4.0)
    ]
    documents = {
        "lmsys_decode": {"results": decode, "gpu": {"name": "NVIDIA H200"}},
        "latency": {"results": load, "gpu": None},
    }
    drawn = suite.draw(documents, tmp_path)
    assert [path.name for path in drawn] == ["batch_sweep.png", "latency_throughput.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in drawn)
    assert suite.draw({"lmsys_decode": {"results": [{"part": "goals"}], "gpu": None}}, tmp_path) == []
    with pytest.raises(ValueError, match="--parts batch"):
        plots.plot_batch_sweep([], "", tmp_path / "x.png")
