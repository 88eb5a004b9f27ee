"""What a GPU did in a stretch of time, from the profiler (CUPTI): its kernels and copies, and when it did nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

GAP_US = 10.0  # inside a graph kernels follow each other within 2 us: a longer gap lies between steps


@dataclass(frozen=True, kw_only=True)
class DeviceTrace:
    """(name, start, end) of everything that ran, in microseconds, by start."""

    spans: Sequence[tuple[str, float, float]]

    def by_name(self) -> dict[str, tuple[int, float]]:
        """Name -> (how often, microseconds in all)."""
        found: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
        for name, start, end in self.spans:
            count, total = found[name]
            found[name] = count + 1, total + end - start
        return dict(found)

    def span_us(self) -> float:
        """From the first start to the last end."""
        return max(end for _, _, end in self.spans) - self.spans[0][1]

    def idle_us(self, longer_than_us: float = GAP_US) -> float:
        """Sum of the gaps, longer than this, in which nothing ran."""
        idle, until = 0.0, self.spans[0][2]
        for _, start, end in self.spans[1:]:
            if start - until > longer_than_us:
                idle += start - until
            until = max(until, end)
        return idle

    def idle_share(self) -> float:
        """Of the whole span."""
        return self.idle_us() / self.span_us()


def trace(work: Callable[[], object]) -> DeviceTrace:
    """Runs `work`, which may come from any thread, and waits for the device."""
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
    return DeviceTrace(spans=sorted(spans, key=lambda span: span[1]))
