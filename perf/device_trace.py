"""What a GPU ran in a stretch of time, from the profiler (CUPTI). It slows launches down: long gaps are not counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

GAP_US = 10.0  # inside a graph kernels follow each other within 2 us: a longer gap lies between steps


def trace(work: Callable[[], object]) -> dict[str, tuple[int, float]]:
    """Runs `work`, waits for the device, and gives name -> (how often, microseconds added) of kernels and copies."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    spans = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    if not spans:
        raise RuntimeError("the profiler saw no kernel: CUPTI is not usable here, or nothing ran on the GPU")
    return added_us(spans)


def added_us(spans: Sequence[tuple[str, float, float]]) -> dict[str, tuple[int, float]]:
    """(name, start, end) in microseconds -> name -> (how often, the end of each less the end of what ended before it).

    Kernels overlap: a duration would hold a kernel's wait for the one ahead (docs/kernels.md, programmatic dependent
    launch). The sum is the time in which something ran, short gaps included.
    """
    found: dict[str, tuple[int, float]] = {}
    ended = float("-inf")
    for name, start, end in sorted(spans, key=lambda span: span[2]):
        count, total = found.get(name, (0, 0.0))
        found[name] = count + 1, total + end - (ended if start - ended <= GAP_US else start)
        ended = end
    return found
