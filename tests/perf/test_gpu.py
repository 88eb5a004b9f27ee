"""On a GPU machine: every kind of kernel case can be made and called; the clock of steps sees a GPU that waits."""

from __future__ import annotations

import time

import pytest
import torch

from perf import bench_kernels, step_clock

pytestmark = pytest.mark.gpu


def test_every_kind_of_kernel_case_runs_and_is_timed() -> None:
    from perf.kernel_cases import makers
    from perf.kernel_peers import Peers

    first = {}
    for operation, make in makers():
        first.setdefault(operation, make)
    flush = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
    for operation, make in first.items():
        case = make(Peers(None))
        bench_kernels.check_equal(case)
        times = bench_kernels.time_rounds({"ours": case.ours}, 2, flush)["ours"]
        assert len(times) == 2 and min(times) > 1.0, operation


def test_the_clock_sees_a_gpu_that_waits_for_the_host_and_one_that_does_not() -> None:
    stream = torch.cuda.Stream()

    def share(pause_s: float) -> float:
        clock = step_clock.StepClock()
        for _ in range(20):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(10_000_000)  # about 5 ms
            clock.launched(stream)
            time.sleep(pause_s)
        return clock.idle_share()

    assert share(0.0) == 0.0
    assert share(0.02) > 0.5
