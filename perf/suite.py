"""All GPU benchmarks in one go: `nmoe bench --suite quick|full --output DIR`, or `python -m perf.suite` with the same.

Each runs in a process of its own, so that it finds an empty GPU, and leaves DIR/<name>.json and .log. Then: a table of
the goals beside the baseline of this kind of GPU (perf/baselines/), DIR/goals.json, and PNGs of the batch sweep and of
latency over throughput. Exit code 1 where a benchmark failed or a figure is more than --percent worse than the
baseline; what this machine has too few GPUs for is named and not run. --collect runs nothing and does the rest for
documents that lie in DIR already. --save keeps the goals' lines, and in files beside them the kernels' and all entries.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf import results
from perf.bench_kernels import kernel_lines
from perf.model_folder import write_model_folder
from perf.regression import regressions

MODEL = "model"  # in the folder: config.json and a tokenizer, for the streams over scripted ranks


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One process."""

    name: str
    arguments: tuple[str, ...] = ()
    goals: tuple[str, ...] = ()  # that it measures
    num_gpus: int = 1

    def command(self, folder: Path, args: argparse.Namespace) -> list[str]:
        """What runs."""
        command = [sys.executable, "-m", f"perf.bench_{self.name}", *self.arguments]
        command += ["--commit", args.commit, "--output", str(self.document(folder))]
        if self.name == "kernels" and args.peers:
            command += ["--peers", str(args.peers.absolute())]
        if self.name == "streaming":
            command += ["--model", str(folder / MODEL)]
        return command

    def document(self, folder: Path) -> Path:
        """The JSON that it leaves."""
        return folder / f"{self.name}.json"


DECODE_GOALS = ("P1", "P2", "P1_deterministic", "P2_deterministic")
SUITES: Mapping[str, tuple[Benchmark, ...]] = {
    "quick": (
        Benchmark(name="lmsys_decode", arguments=("--parts", "goals", "deterministic"), goals=DECODE_GOALS),
        Benchmark(name="prefill", goals=("P3", "P7")),
        Benchmark(name="latency", arguments=("--parts", "decode"), goals=("P4", "P6", "P7_engine")),
    ),
    "full": (
        Benchmark(name="rdep", goals=("P5",), num_gpus=2),
        Benchmark(name="kernels"),
        Benchmark(
            name="lmsys_decode",
            arguments=("--parts", "goals", "deterministic", "batch", "skew", "context"),
            goals=DECODE_GOALS,
        ),
        Benchmark(name="prefill", arguments=("--parts", "goals", "decode", "long"), goals=("P3", "P7")),
        Benchmark(name="latency", goals=("P4", "P6", "P7_engine")),
        Benchmark(name="startup", goals=("start_cold", "capture_eight_ranks")),
        Benchmark(name="load", goals=("load_one_rank", "load_eight_ranks")),
        Benchmark(
            name="streaming",
            arguments=("--name", "P9", "--streams", "2048", "--rates", "22000", "36000", "--clients", "4"),
            goals=("P9",),
            num_gpus=0,
        ),
    ),
}  # fmt: skip


def run(benchmark: Benchmark, folder: Path, args: argparse.Namespace) -> bool:
    """Prints and keeps what it says; False where it failed."""
    print(f"\n== {benchmark.name}", flush=True)
    benchmark.document(folder).unlink(missing_ok=True)  # an old one must not pass for this run's
    command = benchmark.command(folder, args)
    with (folder / f"{benchmark.name}.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=results.ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
        code = process.wait()
    if code:
        print(f"{benchmark.name}: exit code {code}", flush=True)
    return code == 0


def run_all(chosen: Sequence[Benchmark], folder: Path, args: argparse.Namespace) -> tuple[list[str], list[Benchmark]]:
    """(names of what failed, what was run)."""
    import torch

    found = torch.cuda.device_count()
    if any(benchmark.name == "streaming" for benchmark in chosen):
        write_model_folder(folder / MODEL)
    ran = [benchmark for benchmark in chosen if benchmark.num_gpus <= found]
    for benchmark in chosen:
        if benchmark not in ran:
            print(f"{benchmark.name} needs {benchmark.num_gpus} GPUs, this machine has {found}: NOT run", flush=True)
    return [benchmark.name for benchmark in ran if not run(benchmark, folder, args)], ran


def read_documents(chosen: Sequence[Benchmark], folder: Path) -> dict[str, dict[str, Any]]:
    """By name; only those that are there."""
    paths = {benchmark.name: benchmark.document(folder) for benchmark in chosen}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def baseline_path(gpu_name: str) -> Path:
    """The baseline of a kind of GPU: "NVIDIA H100 80GB HBM3" -> h100.json"""
    words = [word for word in gpu_name.split() if word.upper() not in ("NVIDIA", "TESLA")]
    return results.BASELINES / f"{words[0].lower()}.json"


def table(goals: Mapping[str, Mapping[str, Any]], baseline: Mapping[str, Mapping[str, Any]]) -> str:
    """A line a goal."""
    lines = [f"{'goal':18s} {'value':>10s} {'raw':>10s} {'baseline':>10s}  unit; goal"]
    for name, line in sorted(goals.items()):
        known = baseline.get(name, {}).get("value", "")
        lines.append(f"{name:18s} {line['value']:>10} {line['raw']:>10} {known:>10}  {line['unit']}; {line['goal']}")
    return "\n".join(lines)


def draw(documents: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Path]:
    """The PNGs that the documents have points for."""
    from perf import plots

    drawn = []
    decode, latency = documents.get("lmsys_decode"), documents.get("latency")
    if decode and any(one["part"] == "batch" for one in decode["results"]):
        drawn.append(plots.plot_batch_sweep(decode["results"], decode["gpu"]["name"], folder / "batch_sweep.png"))
    if latency and any(one["part"] == "load" for one in latency["results"]):
        name = (latency["gpu"] or {"name": "CPU"})["name"]
        drawn.append(plots.plot_latency_curve(latency["results"], name, folder / "latency_throughput.png"))
    return drawn


def without_kernels(made: Mapping[str, Any]) -> dict[str, Any]:
    """What stays of a document beside its goals: everything that it measured but the table of single kernels."""
    kept = [{key: value for key, value in one.items() if key != "kernels_us"} for one in made["results"]]
    return {"commit": made["commit"], "gpu": made["gpu"], "machine": made["machine"], "results": kept}


def conclude(ran: Sequence[Benchmark], folder: Path, args: argparse.Namespace) -> list[str]:
    """Table, goals.json, PNGs; what is worse than the baseline."""
    documents = read_documents(ran, folder)
    goals = {name: line for made in documents.values() for name, line in made["goals"].items()}
    (folder / "goals.json").write_text(json.dumps(goals, indent=2) + "\n")
    gpu = next((made["gpu"]["name"] for made in documents.values() if made["gpu"]), None)
    path = args.baseline or (baseline_path(gpu) if gpu else None)
    baseline = json.loads(path.read_text()) if path is not None and path.exists() else {}
    print(f"\n{table(goals, baseline)}")
    for drawn in draw(documents, folder):
        print(f"drew {drawn}")
    expected = {name for benchmark in ran for name in benchmark.goals}
    worse = regressions({name: line for name, line in baseline.items() if name in expected}, goals, args.percent)
    if not baseline:
        print(f"no baseline for {gpu or 'a machine without a GPU'}: nothing was compared (--save writes one)")
    if args.save:
        if path is None:
            raise SystemExit("no GPU is named in the documents: say with --baseline FILE where --save shall write")
        results.save_lines(path, goals)
        entries = {name: without_kernels(made) for name, made in documents.items() if name != "kernels"}
        results.save_lines(path.with_stem(f"{path.stem}_entries"), entries)
        if "kernels" in documents:
            made = documents["kernels"]
            results.save_lines(
                path.with_stem(f"{path.stem}_kernels"), kernel_lines(made["results"], made["commit"])
            )  # fmt: skip
    return worse


def main(argv: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(
        prog="nmoe bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=sorted(SUITES), default="quick")
    parser.add_argument("--output", type=Path, required=True, help="folder, made if missing")
    parser.add_argument("--only", nargs="+", help="these benchmarks of the suite")
    parser.add_argument("--peers", type=Path, help="folder of other libraries' kernels, for `kernels`")
    parser.add_argument("--commit", default="", help="what was measured; default: asked of git")
    parser.add_argument("--collect", action="store_true", help="run nothing: only look at what --output holds")
    parser.add_argument("--baseline", type=Path, help="default: perf/baselines/ by the name of the GPU")
    parser.add_argument("--save", action="store_true", help="write the goals' lines into the baseline")
    parser.add_argument("--percent", type=float, default=5.0, help="worse by more than this is a regression")
    args = results.parse(parser, argv)
    chosen = SUITES[args.suite]
    names = [benchmark.name for benchmark in chosen]
    unknown = sorted(set(args.only or ()) - set(names))
    if unknown:
        parser.error(f"the suite {args.suite} has no {', '.join(unknown)}; it has {', '.join(names)}")
    chosen = tuple(benchmark for benchmark in chosen if args.only is None or benchmark.name in args.only)
    folder = args.output.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    if args.collect:
        ran = [benchmark for benchmark in chosen if benchmark.document(folder).exists()]
    else:
        results.require_gpu()
        failed, ran = run_all(chosen, folder, args)
    worse = conclude(ran, folder, args)
    print("\n".join(f"WORSE {line}" for line in worse) or f"nothing is more than {args.percent:g} % worse")
    if failed:
        print(f"FAILED: {', '.join(failed)}; see their .log in {folder}")
    return 1 if worse or failed else 0


if __name__ == "__main__":
    sys.exit(main())
