"""What benchmarks leave behind: documents, lines, percentiles, and refusals without a GPU."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import pytest

from perf import bench_kernels, bench_lmsys_decode, results, suite


def test_percentiles_equal_numpys() -> None:
    draw = random.Random(0)
    for count in (1, 2, 3, 100, 101):
        values = [draw.gauss(0, 1) for _ in range(count)]
        for percent in (0, 5, 50, 95, 99, 100):
            assert results.percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_percentiles_of_nothing_are_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        results.percentile([], 50)


def test_a_document_has_its_parts_and_can_be_read_again(tmp_path: Path) -> None:
    args = argparse.Namespace(commit="abc", output=tmp_path / "new" / "x.json", save=False)
    line = results.goal_line(4, "ms", "<= 5", args, method="how")
    results.write(results.document("x", args, method="how", results=[{"a": 1}], goals={"P5": line}), args)
    made = json.loads(args.output.read_text())
    assert set(made) == {"name", "commit", "machine", "gpu", "arguments", "method", "results", "goals"}
    assert made["goals"]["P5"] == {
        "value": 4, "raw": 4, "unit": "ms", "goal": "<= 5", "commit": "abc", "method": "how"
    }  # fmt: skip


def test_saved_lines_replace_their_own_and_keep_the_others(tmp_path: Path) -> None:
    path = tmp_path / "new" / "h200.json"
    results.save_lines(path, {"P1": {"value": 1}, "P2": {"value": 2}})
    results.save_lines(path, {"P2": {"value": 3}})
    assert json.loads(path.read_text()) == {"P1": {"value": 1}, "P2": {"value": 3}}


def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; of two lines of one name a reader would see the last."""
    names = [name for name, _ in pairs]
    assert len(set(names)) == len(names), f"twice in one object: {names}"
    return dict(pairs)


@pytest.mark.parametrize("path", sorted(results.BASELINES.glob("*.json")), ids=lambda path: path.name)
def test_no_line_of_a_committed_baseline_stands_twice(path: Path) -> None:
    json.loads(path.read_text(), object_pairs_hook=once)


def test_the_committed_baseline_has_complete_lines() -> None:
    for name, line in json.loads(results.H200_BASELINE.read_text()).items():
        assert {"value", "raw", "unit", "goal", "commit", "method"} <= set(line), name
        assert line["value"] <= line["raw"] or line["unit"] in ("s", "ms", "us"), name


@pytest.mark.parametrize("main", [bench_lmsys_decode.main, bench_kernels.main])
def test_without_a_gpu_it_says_so(main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="got 0 CUDA GPUs, this benchmark needs 1"):
        main(["--commit", "abc"])


def test_a_suite_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs 1 of Hopper's kind"):
        suite.main(["--commit", "abc", "--output", str(tmp_path)])


def test_outside_of_a_checkout_the_commit_must_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(results, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="--commit HASH"):
        results.commit_id()
