"""The correction is read from P5's line: exact at measured sizes, on the line between them, an error outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perf.nvlink import nvlink_correction


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    layers = {"32": (20.0, 10.0), "256": (70.0, 24.0), "4096": (900.0, 400.0), "1": (16.0, 9.0)}
    path = tmp_path / "h200.json"
    line = {"moe_us": {size: {"two_gpus": two, "loopback": one} for size, (two, one) in layers.items()}}
    path.write_text(json.dumps({"P5": line}))
    return path


@pytest.mark.parametrize(("tokens", "us"), [(1, 7.0), (32, 10.0), (144, 28.0), (256, 46.0), (4096, 500.0)])
def test_the_difference_of_a_layer(baseline: Path, tokens: int, us: float) -> None:
    assert nvlink_correction(tokens, baseline) == pytest.approx(us * 1e-6)


def test_what_was_not_measured_is_an_error(baseline: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 8192 tokens a GPU; P5 was measured from 1 to 4096"):
        nvlink_correction(8192, baseline)
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(ValueError, match=r"run perf\.bench_rdep --save"):
        nvlink_correction(256, tmp_path / "empty.json")
