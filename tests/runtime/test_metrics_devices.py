"""metrics_devices.py against a GPU that works: NVML, not a fake of it."""

from __future__ import annotations

import time

import pytest
import torch

from nmoe_backend.metrics_devices import gpu_use_reader

LIMIT_S = 20.0  # NVML looks back over up to a second


@pytest.mark.gpu
def test_a_gpu_that_computes_is_seen_computing_and_its_memory_held() -> None:
    device = torch.device("cuda:0")
    a = torch.randn(8192, 8192, device=device)
    read = gpu_use_reader([0])
    limit, use = time.monotonic() + LIMIT_S, read()
    while use.gpu_percent["0"] < 50.0:
        assert time.monotonic() < limit, f"a GPU that multiplies matrices all the time is at {use.gpu_percent}"
        for _ in range(8):
            a = torch.nn.functional.normalize(a @ a)
        torch.cuda.synchronize(device)
        use = read()
    assert use.gpu_percent.keys() == {"0"} and use.gpu_percent["0"] <= 100.0
    assert use.gpu_bytes >= a.nbytes and use.host_bytes > 1 << 20
