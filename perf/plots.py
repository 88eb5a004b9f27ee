"""PNGs of benchmark results. Needs matplotlib (requirements/test.lock); nothing else of perf/ does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

Entries = Sequence[Mapping[str, Any]]


def plot_batch_sweep(entries: Entries, gpu: str, path: Path) -> Path:
    """Entries of bench_lmsys_decode.py: tokens/s a GPU and step time over rows."""
    points = sorted((one for one in entries if one["part"] == "batch"), key=lambda one: one["rows"])
    if not points:
        raise ValueError("got no entries of the part `batch`: run bench_lmsys_decode --parts batch")
    rows = [one["rows"] for one in points]
    figure, rates = pyplot.subplots(figsize=(8, 5))
    rates.plot(rows, [one["corrected_tok_s_gpu"] for one in points], "o-", label="tokens/s, corrected (projected)")
    rates.plot(rows, [one["raw_tok_s_gpu"] for one in points], "o:", label="tokens/s, loopback")
    rates.set_xscale("log", base=2)
    rates.set_xticks(rows, [str(count) for count in rows])
    rates.set_xlabel("sequences a GPU")
    rates.set_ylabel("tokens/s a GPU")
    rates.set_ylim(bottom=0)
    steps = rates.twinx()
    steps.plot(rows, [one["corrected_step_ms"] for one in points], "s--", color="tab:red", label="step, corrected")
    steps.set_ylabel("ms a step")
    steps.set_ylim(bottom=0)
    lines = [*rates.get_lines(), *steps.get_lines()]
    rates.legend(lines, [line.get_label() for line in lines], loc="upper left")
    rates.grid(alpha=0.3)
    rates.set_title(f"DeepSeek-V3 decode, one rank of eight, context {points[0]['context']}, {gpu}")
    return _save(figure, path)


def plot_latency_curve(entries: Entries, gpu: str, path: Path) -> Path:
    """Entries of bench_latency.py: what a rate of tokens costs in time to the first token and between tokens."""
    points = [one for one in entries if one["part"] == "load"]
    if not points:
        raise ValueError("got no entries of the part `load`: run bench_latency --parts load")
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5))
    names = (("ttft_ms", "first token"), ("itl_ms", "between chunks"))
    for axis, (key, title) in zip(axes, names, strict=True):
        for path_name, color in (("engine", "tab:blue"), ("server", "tab:orange")):
            of_path = sorted((one for one in points if one["path"] == path_name), key=lambda one: one["rate"])
            for percentile, style in (("p50", "o-"), ("p95", "o--"), ("p99", "o:")):
                axis.plot(
                    [one["tok_s"] for one in of_path],
                    [one[key][percentile] for one in of_path],
                    style,
                    color=color,
                    label=f"{path_name} {percentile}",
                )
        axis.set_xlabel("tokens/s delivered")
        axis.set_ylabel("ms")
        axis.set_yscale("log")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"Poisson arrivals, engine alone and through tritonserver, {gpu}")
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
