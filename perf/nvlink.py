"""NVLink put back into a figure that was measured in loopback.

Loopback moves the exchange's rows at the speed of a GPU's own memory. `bench_rdep.py` runs a layer's exchange, with the
shared expert that a step hides behind it, between two GPUs and in loopback, at the message sizes of a group of eight;
the difference is what a step of a rank of eight takes longer, for each of its MoE layers. Such figures are *projected*:
eight GPUs were not there, and what waiting for the slowest of eight costs is not in them.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from perf.results import H200_BASELINE


def nvlink_correction(tokens: int, baseline: Path = H200_BASELINE) -> float:
    """Seconds that an MoE layer of a step of so many tokens a GPU takes longer over NVLink than in loopback.

    Between two measured sizes on the line through them. ValueError outside of what P5's line of the baseline holds.
    """
    lines = json.loads(baseline.read_text())
    if "P5" not in lines:
        raise ValueError(f"{baseline} has no line P5, which the correction comes from: run perf.bench_rdep --save")
    sizes = {int(size): us["two_gpus"] - us["loopback"] for size, us in lines["P5"]["moe_us"].items()}
    for low, high in itertools.pairwise(sorted(sizes)):
        if low <= tokens <= high:
            share = (tokens - low) / (high - low)
            return 1e-6 * (sizes[low] * (1 - share) + sizes[high] * share)
    raise ValueError(f"got {tokens} tokens a GPU; P5 was measured from {min(sizes)} to {max(sizes)}: measure that size")
