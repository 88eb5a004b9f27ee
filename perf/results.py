"""What a benchmark leaves behind: one JSON document, a line for each goal that it measures, and where it ran.

A document holds name, commit, machine, gpu (null without one), arguments, method, results (a list, whatever the
benchmark measures) and goals: goal id -> {value, raw, unit, goal, commit, method}, the form of a line of
perf/baselines/h200.json. `value` counts against the goal; `raw` is what was measured before any correction.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nmoe_backend import memory
from nmoe_backend.config import ServeConfig

ROOT = Path(__file__).resolve().parents[1]
BASELINES = ROOT / "perf" / "baselines"
H200_BASELINE = BASELINES / "h200.json"
P1_CONFIG = ROOT / "perf" / "lmsys_decode.toml"  # of P1 to P4


def machine() -> str:
    """What it ran on, without the machine's name."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text(encoding="utf-8")
        names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
        model = f"{len(names)} x {names[0]}" if names else model
    return f"{model}, Python {platform.python_version()}"


def commit_id() -> str:
    """The commit that was measured; with + when the product or the benchmarks differ from it."""
    if not (ROOT / ".git").exists():
        raise SystemExit(f"{ROOT} is no git checkout, so the commit is not known. Name it: --commit HASH.")
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    paths = ["nmoe_backend", "model_repository", "perf/*.py"]
    diff = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *paths], cwd=ROOT, check=False)
    return head.stdout.strip() + ("+" if diff.returncode else "")


def gpu() -> dict[str, Any] | None:
    """The GPUs and what runs on them; None where torch sees none."""
    import torch

    if not torch.cuda.is_available():
        return None
    import triton

    return {
        "name": torch.cuda.get_device_name(0),
        "count": torch.cuda.device_count(),
        "memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def memory_gb(config: ServeConfig) -> dict[str, float]:
    """Of a GPU with one rank on it: all that is taken, what torch holds of it, and the sum that the doctor prints."""
    import torch

    budget = memory.memory_budget(config, memory.model_dims(config), config.replicas[0], config.num_pages)
    free, total = torch.cuda.mem_get_info()
    taken = {"device": total - free, "torch": torch.cuda.memory_reserved(), "budget": budget.total}
    return {name: round(num_bytes / 1e9, 2) for name, num_bytes in taken.items()}


def require_gpu(count: int = 1) -> None:
    """Ends the program with a reason where there are fewer."""
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < count:
        raise SystemExit(
            f"got {found} CUDA GPUs, this benchmark needs {count} of Hopper's kind. Run it on such a machine "
            "(CUDA_VISIBLE_DEVICES may hide them; `nvidia-smi` lists them)."
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every GPU benchmark has."""
    parser.add_argument("--commit", default="", help="what was measured; default: asked of git")
    parser.add_argument("--output", type=Path, help="file of the JSON document")
    parser.add_argument("--save", action="store_true", help="write the goals' lines into perf/baselines/h200.json")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with the commit filled in."""
    args = parser.parse_args(argv)
    args.commit = args.commit or commit_id()
    return args


def goal_line(
    value: float, unit: str, goal: str | float, args: argparse.Namespace, *, method: str, raw: float | None = None
) -> dict[str, Any]:
    """A goal's line. Left out, raw is the value: nothing was corrected."""
    return {
        "value": value,
        "raw": value if raw is None else raw,
        "unit": unit,
        "goal": goal,
        "commit": args.commit,
        "method": method,
    }


def document(
    name: str,
    args: argparse.Namespace,
    *,
    method: str,
    results: Sequence[Mapping[str, Any]],
    goals: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The JSON of a run."""
    return {
        "name": name,
        "commit": args.commit,
        "machine": machine(),
        "gpu": gpu(),
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "method": method,
        "results": list(results),
        "goals": dict(goals),
    }


def write(made: Mapping[str, Any], args: argparse.Namespace) -> None:
    """The document to --output, its goals into the baseline with --save. May be called again with more results."""
    write_document(made, args.output)
    if args.save:
        save_lines(H200_BASELINE, made["goals"])


def write_all(
    name: str,
    args: argparse.Namespace,
    method: str,
    entries: Iterable[dict[str, Any]],
    report: Callable[[dict[str, Any]], None],
    goal_lines: Callable[[Sequence[dict[str, Any]], argparse.Namespace], dict[str, dict[str, Any]]],
) -> int:
    """Reports each entry as it is measured and writes the document as it grows; the goals' lines last. Exit code 0."""
    known: list[dict[str, Any]] = []
    for entry in entries:
        report(entry)
        known.append(entry)
        write(document(name, args, method=method, results=known, goals=goal_lines(known, args)), args)
    print(json.dumps(goal_lines(known, args)))
    return 0


def write_document(made: Mapping[str, Any], output: Path | None) -> None:
    """Where that was asked for: whole or not at all, for a benchmark may be ended at any time."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_suffix(".partial")
        partial.write_text(json.dumps(made, indent=1) + "\n")
        partial.replace(output)


def save_lines(path: Path, lines: Mapping[str, Any]) -> None:
    """Replaces these lines of a baseline and keeps the others."""
    known = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**known, **lines}, indent=2, sort_keys=True) + "\n")


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the two nearest values, as numpy does it. ValueError for no values."""
    if not values:
        raise ValueError("got no values: a percentile needs at least one")
    ordered = sorted(values)
    place = percent / 100.0 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99 and the largest."""
    return {f"p{p}": percentile(values, p) for p in (50, 95, 99)} | {"max": max(values)}
