"""All GPU benchmarks in one go: `nmoe bench --suite quick|full --output DIR`, or `python -m perf.suite` with the same.

Each runs in a process of its own, so that it finds an empty GPU, and leaves DIR/<name>.json and .log. Those of one GPU
run side by side, one a GPU; those of several, and those that measure the host too, run before and alone. One that fails
or takes longer than five minutes is ended and named, and the others run on. Then: a table of the goals beside the
baseline of this kind of GPU (perf/baselines/), DIR/goals.json, and PNGs of the batch sweep and of latency over
throughput. Exit code 1 where a benchmark failed or a figure is more than --percent worse than the baseline; what this
machine has too few GPUs for is named and not run. --collect runs nothing and does the rest for documents that lie in
DIR already. --save keeps the goals' lines, and in files beside them the kernels' (with --peers) and all entries.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from perf import plots, results
from perf.bench_kernels import kernel_lines
from perf.model_folder import write_model_folder
from perf.regression import regressions

LIMIT_S = 300.0  # of a benchmark; the longest that was timed whole, latency, took 160
END_S = 75.0  # of one that is told to end: its tritonserver may take 60
LINE_BYTES = 1 << 24  # of a benchmark's longest line: its results as JSON
MODEL = "model"  # in the folder: config.json and a tokenizer, for the streams over scripted ranks


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One process."""

    name: str
    arguments: tuple[str, ...] = ()
    goals: tuple[str, ...] = ()  # that it measures
    num_gpus: int = 1
    is_alone: bool = False  # nothing runs beside it: it needs more GPUs than one, or measures the host too

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
# The sizes of the baseline's lines, which fit `full` into ten minutes on two GPUs.
P9 = ("--name", "P9", "--streams", "2048", "--rates", "22000", "36000", "--clients", "4", "--seconds", "20")
LOADS = ("--tokens", "120", "--rates", "4", "10", "20", "40", "--seconds", "5")
LONG_PREFILL = ("--parts", "goals", "decode", "long", "--chunks", "0", "7", "15")
SUITES: Mapping[str, tuple[Benchmark, ...]] = {
    "quick": (
        Benchmark(name="lmsys_decode", arguments=("--parts", "goals", "deterministic"), goals=DECODE_GOALS),
        Benchmark(name="prefill", goals=("P3", "P7")),
        Benchmark(name="latency", arguments=("--parts", "decode"), goals=("P4", "P6", "P7_engine")),
    ),
    "full": (
        Benchmark(name="rdep", goals=("P5",), num_gpus=2, is_alone=True),
        Benchmark(name="load", goals=("load_one_rank", "load_eight_ranks"), is_alone=True),
        Benchmark(name="streaming", arguments=P9, goals=("P9",), num_gpus=0, is_alone=True),
        Benchmark(
            name="lmsys_decode",
            arguments=("--parts", "goals", "deterministic", "batch", "skew", "context"),
            goals=DECODE_GOALS,
        ),
        Benchmark(name="latency", arguments=LOADS, goals=("P4", "P6", "P7_engine")),
        Benchmark(name="prefill", arguments=LONG_PREFILL, goals=("P3", "P7", "prefill_131072")),
        Benchmark(name="startup", goals=("start_cold", "capture_eight_ranks")),
        Benchmark(name="kernels"),
    ),
}


async def run(benchmark: Benchmark, folder: Path, args: argparse.Namespace, devices: Sequence[str]) -> bool:
    """Prints and keeps what it says, on these GPUs; False where it failed."""
    name = benchmark.name
    print(f"== {name}", flush=True)
    benchmark.document(folder).unlink(missing_ok=True)  # an old one must not pass for this run's
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(devices), "PYTHONUNBUFFERED": "1"}
    process = await asyncio.create_subprocess_exec(
        *benchmark.command(folder, args), cwd=results.ROOT, env=environment, limit=LINE_BYTES, start_new_session=True,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    with (folder / f"{name}.log").open("w") as log:
        try:
            async with asyncio.timeout(LIMIT_S):
                await _copy(process.stdout, name, log)
                code = await process.wait()
        except TimeoutError:
            print(f"== {name}: still runs after {LIMIT_S:g} s, and is ended", flush=True)
            return False
        finally:
            await _end(process)
            await _copy(process.stdout, name, log)  # where it stood when it was interrupted
    print(f"== {name}: exit code {code}", flush=True)
    return code == 0


async def _copy(output: asyncio.StreamReader, name: str, log: TextIO) -> None:
    """Until its end, line by line."""
    async for raw in output:
        line = raw.decode(errors="replace")
        print(f"{name}: {line}", end="", flush=True)
        log.write(line)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Where it still runs, interrupts it, so that it ends its servers. Then kills what is left of its group, at once
    where the waiting itself is interrupted."""
    try:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError, TimeoutError):
                os.killpg(process.pid, signal.SIGINT)
                async with asyncio.timeout(END_S):
                    await process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def run_all(
    chosen: Sequence[Benchmark], folder: Path, args: argparse.Namespace, devices: Sequence[str]
) -> list[str]:
    """Names of what failed. Ends what runs where it is cancelled, as SIGTERM does."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    failed = []

    async def run_next(waiting: deque[Benchmark], on: Sequence[str]) -> None:
        while waiting:
            benchmark = waiting.popleft()
            if not await run(benchmark, folder, args, on[: benchmark.num_gpus]):
                failed.append(benchmark.name)

    await run_next(deque(one for one in chosen if one.is_alone), devices)
    beside = deque(one for one in chosen if not one.is_alone)
    async with asyncio.TaskGroup() as lanes:
        for device in devices:
            lanes.create_task(run_next(beside, [device]))
    return failed


def visible_devices() -> list[str]:
    """This machine's GPUs, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] or [str(index) for index in range(count)]


def with_enough_gpus(chosen: Sequence[Benchmark], found: int) -> list[Benchmark]:
    """Those that can run; names the others."""
    for benchmark in chosen:
        if benchmark.num_gpus > found:
            print(f"{benchmark.name} needs {benchmark.num_gpus} GPUs, this machine has {found}: NOT run", flush=True)
    return [benchmark for benchmark in chosen if benchmark.num_gpus <= found]


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
        if "kernels" in documents and args.peers:  # without, the lines would lose what peers took
            lines = kernel_lines(documents["kernels"]["results"], documents["kernels"]["commit"])
            results.save_lines(path.with_stem(f"{path.stem}_kernels"), lines)
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
    if args.peers and not (args.peers / "peers.py").exists():
        parser.error(f"--peers {args.peers} has no peers.py: it names the unpacked folder of the peers' kernels")
    folder = args.output.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    if args.collect:
        ran = [benchmark for benchmark in chosen if benchmark.document(folder).exists()]
    else:
        results.require_gpu()
        devices = visible_devices()
        ran = with_enough_gpus(chosen, len(devices))
        if any(benchmark.name == "streaming" for benchmark in ran):
            write_model_folder(folder / MODEL)
        try:
            failed = asyncio.run(run_all(ran, folder, args, devices))
        except (KeyboardInterrupt, asyncio.CancelledError):
            raise SystemExit(f"interrupted; --collect looks at what is in {folder}") from None
    worse = conclude(ran, folder, args)
    print("\n".join(f"WORSE {line}" for line in worse) or f"nothing is more than {args.percent:g} % worse")
    if failed:
        print(f"FAILED: {', '.join(failed)}; see their .log in {folder}")
    return 1 if worse or failed else 0


if __name__ == "__main__":
    sys.exit(main())
