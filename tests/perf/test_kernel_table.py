"""The kernel benchmark's table: medians, ratios, and a peer whose numbers are wrong."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from perf import bench_kernels as bench


def test_an_entry_names_the_best_peer_and_the_ratio_of_medians() -> None:
    times = {"ours": [11.0, 10.0, 99.0], "A": [9.0, 9.0, 9.5], "B": [8.0, 12.0, 7.0]}
    one = bench.entry("fp8_gemm", "32 x 64 x 128", times, flops=22e9, num_bytes=44e6)
    assert one["us"] == {"ours": 11.0, "A": 9.0, "B": 8.0}
    assert (one["best_peer"], one["ratio"]) == ("B", 1.375)
    assert one["range_us"]["ours"] == [10.0, 99.0]
    assert (one["tflops"], one["gb_s"]) == (2000.0, 4000)
    assert "1.38" in bench.line_of(one) and "2000 TF" in bench.line_of(one)


def test_an_entry_without_peers_has_no_ratio() -> None:
    one = bench.entry("router", "32", {"ours": [3.0]})
    assert one["best_peer"] is None and one["ratio"] is None
    assert bench.line_of(one).split()[:3] == ["router", "32", "3.0"]


def test_a_baseline_line_keeps_the_peers() -> None:
    one = bench.entry("fp8_gemm", "32 x 64 x 128", {"ours": [11.0], "A": [10.0]})
    line = bench.kernel_lines([one], "abc")["fp8_gemm 32 x 64 x 128"]
    assert (line["value"], line["unit"], line["peers_us"], line["ratio"]) == (11.0, "us", {"A": 10.0}, 1.1)
    assert line["commit"] == "abc"


def case(peer: torch.Tensor, *, compare: bool) -> SimpleNamespace:
    ours = torch.linspace(-1, 1, 64)
    return SimpleNamespace(
        operation="gemm", shape="s", ours=lambda: ours, peers={"A": lambda: peer.view(8, 8)}, compare=compare
    )


def test_a_peer_that_computes_something_else_ends_the_run() -> None:
    ours = torch.linspace(-1, 1, 64)
    assert bench.check_equal(case(ours * 1.001, compare=True))["A"] == pytest.approx(1e-3, rel=1e-2)
    for wrong in (ours * 1.1, ours * float("nan")):
        with pytest.raises(SystemExit, match="gemm s: A and ours differ"):
            bench.check_equal(case(wrong, compare=True))
    assert bench.check_equal(case(ours * 2, compare=False)) == {}
