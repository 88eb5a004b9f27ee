"""What a GPU ran in a stretch of time, from the profiler (CUPTI). It slows launches down: kernel times only."""

from __future__ import annotations

from collections.abc import Callable


def trace(work: Callable[[], object]) -> dict[str, tuple[int, float]]:
    """Runs `work`, waits for the device, and gives name -> (how often, microseconds in all) of kernels and copies."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    found: dict[str, tuple[int, float]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            count, total_us = found.get(event.name, (0, 0.0))
            found[event.name] = count + 1, total_us + event.device_time_total
    if not found:
        raise RuntimeError("the profiler saw no kernel: CUPTI is not usable here, or nothing ran on the GPU")
    return found
