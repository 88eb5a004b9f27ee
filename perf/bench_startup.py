"""How long the engine's start takes and of what: with and without compiled kernels, and captures by eight rank threads.

    python -m perf.bench_startup --commit HASH [--parts cold capture] [--config FILE] [--output FILE]

cold     the start with an empty kernel cache, and again with the one that it left. The default TOML is that of P1.
capture  all graphs of a model with DeepSeek's layers, narrow ones, captured by one rank thread and by eight at once.

Each is measured in a process of its own: a start leaves memory, threads and compiled kernels behind. What weights cost
is bench_load.py's, what tritonserver adds (P6) bench_latency.py's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from nmoe_backend.config import ServeConfig
from perf import results
from perf.model_folder import with_model

PARTS = ("cold", "capture")
ResultT = TypeVar("ResultT")
STAGE = re.compile(r"(?:replica \d+: )?(.+?): ([0-9.]+) s(?:, .*)?")  # warmup.py's lines
# DeepSeek's head geometry and number of layers in a width that fits eight times on one GPU: what a capture costs the
# host is its launches, which are the same.
NARROW = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "q_lora_rank": 512,
    "n_routed_experts": 64,
    "vocab_size": 4096,
}
CAPTURE_TOML = """
model_path = "{model}"
device = "cuda"
load_format = "dummy"
max_batch_size = 256
max_prefill_tokens = 256
num_pages = 512
max_seq_len = 2112
rank_timeout_s = 120.0
[[replicas]]
replica_id = 0
{replica}
"""
RANKS = {"1": "gpus = [0]\nloopback_ranks = 8", "8": "gpus = [0, 0, 0, 0, 0, 0, 0, 0]"}


def in_process(work: Callable[..., ResultT], *args: Any) -> ResultT:
    """Called in a fresh process, which takes its GPU memory with it."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *args).result()


def stages(lines: list[str]) -> dict[str, float]:
    """Seconds of each stage, from a start's progress lines."""
    found = (STAGE.fullmatch(line.strip()) for line in lines)
    return {match[1]: float(match[2]) for match in found if match is not None}


def start_engine(config_path: Path, kernel_cache: Path) -> dict[str, Any]:
    """Seconds of warmup.start, in all and by stage, with compiled kernels in that folder."""
    os.environ["TRITON_CACHE_DIR"] = str(kernel_cache)
    lines: list[str] = []
    began = time.monotonic()
    from nmoe_backend import warmup

    imported_s = time.monotonic() - began
    warmup.start(ServeConfig.from_toml(config_path), lines.append).close()
    return {"total_s": round(time.monotonic() - began, 2), "import_s": round(imported_s, 2), "stages_s": stages(lines)}


def write_narrow_model(folder: Path, source: Path) -> Path:
    """config.json of NARROW's widths."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text()) | NARROW
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def capture(config_path: Path) -> dict[str, Any]:
    """Seconds in which all ranks of a replica capture their graphs, each from its own thread.

    Virtual ranks capture nothing in service, because their graphs could not run: a kernel that spins on a peer would
    keep it from running. A capture runs no kernel, so here they do. Ranks that share a device must not wait for it
    while another one captures, so they also meet before.
    """
    from nmoe_backend import models, warmup
    from nmoe_backend.parallel.ranks import RankContext
    from nmoe_backend.runtime import graphs, sampler_kernels, step_graphs

    def meet_first(context: RankContext, *args: Any) -> Any:
        context.meet()
        return graphs.capture(context, *args)

    lines: list[str] = []
    config = ServeConfig.from_toml(config_path)
    spec = models.load_spec(config.model_path)
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(RankContext, "has_own_device", True))
        for module in (step_graphs, sampler_kernels):
            patches.enter_context(mock.patch.object(module, "capture", meet_first))
        workers, _ = warmup.build_workers(config, config.replicas[0], spec, lines.append)
    for worker in workers:
        worker.close()
    return {"ranks": len(workers), "layers": len(spec.layers), "stages_s": stages(lines)}


def run_parts(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Entries as they are measured."""
    with tempfile.TemporaryDirectory(prefix="nmoe-bench-") as name:
        folder = Path(name)
        config_path = with_model(args.config, folder)
        if "cold" in args.parts:
            for kernels in ("cold", "warm"):
                found = in_process(start_engine, config_path, folder / "kernel_cache")
                yield {"part": "cold", "kernels": kernels} | found
        if "capture" in args.parts:
            narrow = write_narrow_model(folder / "narrow", ServeConfig.from_toml(config_path).model_path)
            for ranks, table in RANKS.items():
                toml = folder / f"capture-{ranks}.toml"
                toml.write_text(CAPTURE_TOML.format(model=narrow, replica=table))
                yield {"part": "capture"} | in_process(capture, toml)


def report(entry: dict[str, Any]) -> None:
    """One entry."""
    print(
        f"{entry['part']:8s} " + ", ".join(f"{key} {value}" for key, value in entry.items() if key != "part"),
        flush=True,
    )


def goal_lines(entries: Sequence[dict[str, Any]], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The cold start, which stands beside P6, and captures by eight threads."""
    lines = {}
    for entry in entries:
        if entry["part"] == "cold" and entry["kernels"] == "cold":
            method = f"perf/bench_startup.py, {args.config.name}: the engine's start with an empty kernel cache"
            lines["start_cold"] = results.goal_line(entry["total_s"], "s", "beside P6", args, method=method)
        if entry["part"] == "capture" and entry["ranks"] == 8:
            method = f"perf/bench_startup.py: {entry['layers']} narrow layers, runs and all graphs, 8 threads"
            line = results.goal_line(entry["stages_s"]["steps"], "s", "beside P6", args, method=method)
            lines["capture_eight_ranks"] = line
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Prints each entry and writes the document as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--config", type=Path, default=results.P1_CONFIG, help="of `cold`; default: %(default)s")
    results.add_arguments(parser)
    args = results.parse(parser, argv)
    if "capture" in args.parts or ServeConfig.from_toml(args.config).device == "cuda":
        results.require_gpu()
    return results.write_all("startup", args, __doc__ or "", run_parts(args), report, goal_lines)


if __name__ == "__main__":
    sys.exit(main())
