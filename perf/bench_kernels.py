"""Our kernels beside the best other libraries' at DeepSeek-V3's shapes, interleaved in one run.

    python -m perf.bench_kernels --commit HASH --peers DIR [--operations mla_decode fp8_gemm] [--rounds 15]

A call is timed by CUDA events behind a write of 256 MB (nothing is left in L2) and a spin of the GPU (which hides the
launch); a round times ours and every peer once, in turn, so that a card that throttles slows them all. Medians, lowest
and highest over the rounds; `empty` is what a call that does nothing reads this way. Where a peer computes the same
numbers, its output is compared with ours first: a relative error above 1 % ends the run.

Kernels are compiled beforehand by several processes, into the caches that the run then reads. --peers names the folder
of the other libraries (perf/kernel_peers.py says what it holds); without it ours are timed alone.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from perf import results

FLUSH_BYTES = 256 << 20
SPIN_CYCLES = 500_000  # 0.3 ms: longer than any launch takes the host
TOLERANCE = 0.01
LONG_US = 2000.0  # such calls are timed in a third of the rounds


def time_rounds(calls: Mapping[str, Callable[[], Any]], rounds: int, flush: torch.Tensor) -> dict[str, list[float]]:
    """Microseconds of each call in each round; every call has run before."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        events = []
        for name, call in calls.items():
            flush.zero_()
            torch.cuda._sleep(SPIN_CYCLES)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            events.append((name, start, end))
        torch.cuda.synchronize()
        for name, start, end in events:
            times[name].append(1e3 * start.elapsed_time(end))
    return times


def check_equal(case: Any) -> dict[str, float]:
    """Relative errors of the peers' outputs against ours; also runs every call once."""
    ours = case.ours()
    ours = None if ours is None else ours.float()
    errors = {}
    for name, call in case.peers.items():
        theirs = call()
        if case.compare:
            error = float((theirs.float().view_as(ours) - ours).norm() / ours.norm())
            if not error <= TOLERANCE:
                raise SystemExit(f"{case.operation} {case.shape}: {name} and ours differ by {error:.2e} (relative)")
            errors[name] = error
    return errors


def measure(case: Any, rounds: int, flush: torch.Tensor) -> dict[str, Any]:
    """A case's entry."""
    errors = check_equal(case)
    calls = {"ours": case.ours, **case.peers}
    first = time_rounds(calls, 3, flush)
    is_long = max(map(statistics.median, first.values())) > LONG_US
    times = time_rounds(calls, max(3, rounds // 3) if is_long else rounds, flush)
    return entry(case.operation, case.shape, times, flops=case.flops, num_bytes=case.num_bytes, errors=errors)


def entry(
    operation: str,
    shape: str,
    times: Mapping[str, Sequence[float]],
    *,
    flops: float = 0.0,
    num_bytes: float = 0.0,
    errors: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Medians and what follows from them; `ratio` is ours / best peer."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours = medians["ours"]
    rivals = {name: value for name, value in medians.items() if name != "ours"}
    best = min(rivals, key=lambda name: rivals[name]) if rivals else None
    return {
        "operation": operation,
        "shape": shape,
        "us": {name: round(value, 2) for name, value in medians.items()},
        "range_us": {name: [round(min(values), 2), round(max(values), 2)] for name, values in times.items()},
        "best_peer": best,
        "ratio": round(ours / rivals[best], 3) if best else None,
        "tflops": round(flops / ours / 1e6, 1),
        "gb_s": round(num_bytes / ours / 1e3),
        "errors": dict(errors or {}),
    }


def line_of(one: Mapping[str, Any]) -> str:
    """A line of the table."""
    ours = f"{one['us']['ours']:9.1f}"
    rate = f"{one['tflops']:6.0f} TF" if one["tflops"] >= 100 else f"{one['gb_s']:6.0f} GB/s"
    rate = rate if one["tflops"] or one["gb_s"] else ""
    rivals = ", ".join(f"{name} {us:.1f}" for name, us in one["us"].items() if name != "ours")
    ratio = "" if one["ratio"] is None else f"{one['ratio']:.2f}"
    return f"{one['operation']:20s} {one['shape']:34s} {ours} {rate:12s} {ratio:>5s}  {rivals}"


def kernel_lines(entries: Sequence[Mapping[str, Any]], commit: str) -> dict[str, dict[str, Any]]:
    """A line of the kernels' baseline for each operation and shape."""
    return {
        f"{one['operation']} {one['shape']}".strip(): {
            "value": one["us"]["ours"],
            "unit": "us",
            "peers_us": {name: us for name, us in one["us"].items() if name != "ours"},
            "ratio": one["ratio"],
            "commit": commit,
            "method": "perf/bench_kernels.py, medians, L2 empty, interleaved",
        }
        for one in entries
    }


def _compile_share(peers_dir: Path | None, operations: Sequence[str], share: int, shares: int) -> None:
    """One process's part of the compiling: every shares-th case, run once."""
    for case in _cases(peers_dir, operations, share, shares):
        check_equal(case)
        torch.cuda.synchronize()


def compile_first(peers_dir: Path | None, operations: Sequence[str], processes: int) -> float:
    """Fills the kernel caches; seconds."""
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")
    jobs = [
        context.Process(target=_compile_share, args=(peers_dir, operations, share, processes))
        for share in range(processes)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    failed = [job.exitcode for job in jobs if job.exitcode]
    if failed:
        raise SystemExit(
            f"{len(failed)} of {processes} compiling processes ended with {failed}; their errors are above"
        )
    return time.monotonic() - began


def _cases(peers_dir: Path | None, operations: Sequence[str], share: int = 0, shares: int = 1) -> Iterator[Any]:
    """Cases of these operations (all if none is named), one after the other; of the share-th of `shares` parts."""
    from perf.kernel_cases import makers
    from perf.kernel_peers import Peers

    torch.manual_seed(0)
    peers = Peers(peers_dir)
    wanted = [make for operation, make in makers() if not operations or operation in operations]
    for make in wanted[share::shares]:
        yield make(peers)
        gc.collect()
        torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and writes the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="folder of the other libraries' kernels")
    parser.add_argument("--operations", nargs="+", default=[], help="those of the table's first column; default: all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--processes", type=int, default=8, help="that compile; 1: no compiling beforehand")
    results.add_arguments(parser)
    args = results.parse(parser, argv)
    results.require_gpu()
    if args.processes > 1:
        print(f"compiled in {compile_first(args.peers, args.operations, args.processes):.0f} s", flush=True)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    entries = [entry("empty", "", time_rounds({"ours": lambda: None}, args.rounds, flush))]
    print(f"{'operation':20s} {'shape':34s} {'us':>9s} {'':12s} ratio  peers", flush=True)
    for case in _cases(args.peers, args.operations):
        entries.append(measure(case, args.rounds, flush))
        print(line_of(entries[-1]), flush=True)
        del case
        results.write(results.document("kernels", args, method=__doc__ or "", results=entries, goals={}), args)
    slower = [one for one in entries if one["ratio"] is not None and one["ratio"] > 1.1]
    print(
        f"{len(slower)} of {sum(one['ratio'] is not None for one in entries)} are more than 10 % behind the best peer"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
