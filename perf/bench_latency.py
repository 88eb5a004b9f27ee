"""P4, P6, P7: what the server adds to the engine, how long a start takes, and whether the GPU waits between steps.

    python -m perf.bench_latency --commit HASH [--parts decode load] [--paths engine server] [--output FILE]
    python -m perf.bench_latency --config tiny.toml --streams 8 ...     # any TOML; how it is tried without a GPU

Two sessions on one GPU, one after the other: the engine in a process of its own (an Orchestrator and no more), then a
real tritonserver with the same TOML, asked over gRPC by client processes; text comes out, and one stop string is looked
for. The default TOML is that of P1 (one rank of eight in loopback, random weights of full size) with a synthetic
tokenizer of 129,280 ids.

decode   --streams requests at once, --prompt tokens in, --tokens out. Rate and gaps count while all of them run. P4 is
         the server's rate over the engine's; what it adds to a token is the difference of the median gaps. P7_engine
         is the share of as many tokens' time in which the GPU waits for the host between steps (perf/step_clock.py).
         Contexts are short: a step is shorter than P1's, so that the server has less time for each token.
load     Poisson arrivals at each of --rates requests/s for --seconds, --load-prompt tokens in, --load-tokens out: time
         to the first token and gaps between chunks, p50, p95 and p99.
startup  P6: from the launch of tritonserver to the first token of the first answer, kernels compiled before. The
         server's session always measures it.
memory   GB of the GPU when the engine has answered (device), of it held by torch, and the doctor's sum (budget).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nmoe_backend.config import ServeConfig
from perf import open_loop, results
from perf.bench_startup import in_process, stages
from perf.bench_streaming import Arrivals
from perf.model_folder import with_model
from tests.triton_server import TritonServer

PATHS = ("engine", "server")
PARTS = ("decode", "load", "startup")
Run = Callable[[Sequence[open_loop.Planned]], list[Arrivals]]


def run_loads(path: str, run: Run, args: argparse.Namespace, vocab_size: int) -> list[dict[str, Any]]:
    """The entries of `decode` and `load` of one session."""
    run(open_loop.all_at_once(min(8, args.streams), args.prompt, 8, vocab_size))  # first requests are slower
    entries = []
    if "decode" in args.parts:
        load = open_loop.all_at_once(args.streams, args.prompt, args.tokens, vocab_size)
        entries.append({"part": "decode", "path": path} | open_loop.steady(run(load)))
        print(line_of(entries[-1]), flush=True)
    for rate in args.rates if "load" in args.parts else ():
        due = open_loop.poisson(rate, args.seconds)
        load = open_loop.planned(due, args.load_prompt, args.load_tokens, vocab_size)
        entries.append({"part": "load", "path": path, "rate": rate} | open_loop.latencies(run(load)))
        print(line_of(entries[-1]), flush=True)
    return entries


def engine_session(config_path: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs in a process of its own."""
    from nmoe_backend import warmup

    config = ServeConfig.from_toml(config_path)
    orchestrator = warmup.start(config)
    try:
        entries = run_loads("engine", lambda load: open_loop.run_engine(orchestrator, load), args, config.vocab_size)
        if "decode" in args.parts and config.device == "cuda":
            entries.append({"part": "idle", "path": "engine"} | idle_of(orchestrator, args, config.vocab_size))
            print(line_of(entries[-1]), flush=True)
        if config.device == "cuda":
            entries.append({"part": "memory", "path": "engine"} | results.memory_gb(config))
            print(line_of(entries[-1]), flush=True)
    finally:
        orchestrator.close()
    return entries


def idle_of(orchestrator: Any, args: argparse.Namespace, vocab_size: int) -> dict[str, Any]:
    """The GPU's idle share while all streams decode."""
    from perf.step_clock import clocked_workers

    load = open_loop.all_at_once(args.streams, args.prompt, args.tokens, vocab_size, seed=1)
    with clocked_workers() as clock:
        open_loop.run_engine(orchestrator, load)
    return {"idle_percent": round(100 * clock.idle_share(), 3), "steps": clock.num_steps}


def server_session(config_path: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A real tritonserver; its start is measured too."""
    vocab_size = ServeConfig.from_toml(config_path).vocab_size
    began = time.monotonic()
    with TritonServer(config_path) as server:
        ready_s = time.monotonic() - began
        open_loop.run_server(server.grpc, open_loop.all_at_once(1, args.prompt, 1, vocab_size), 1)
        start = {
            "part": "startup",
            "path": "server",
            "first_token_s": round(time.monotonic() - began, 2),
            "ready_s": round(ready_s, 2),
            "stages_s": stages(server.lines),
        }
        print(line_of(start), flush=True)
        run = lambda load: open_loop.run_server(server.grpc, load, args.clients)  # noqa: E731
        return [start, *run_loads("server", run, args, vocab_size)]


def line_of(one: dict[str, Any]) -> str:
    """An entry in one line."""
    head = f"{one['part']:8s} {one.get('path', ''):7s}"
    if one["part"] in ("decode", "load"):
        itl = " / ".join(f"{one['itl_ms'][name]:.1f}" for name in ("p50", "p95", "p99"))
        what = f"{one['streams']} streams" if one["part"] == "decode" else f"{one['rate']:g} requests/s"
        text = (
            f"{head} {what:16s} {one['tok_s']:8.0f} tok/s, gap p50 / p95 / p99 {itl} ms, chunk {one['mean_chunk']:.2f}"
        )
        if "ttft_ms" in one:
            text += ", first token " + " / ".join(f"{one['ttft_ms'][name]:.0f}" for name in ("p50", "p95", "p99"))
        return text
    return f"{head} " + ", ".join(f"{key} {value}" for key, value in one.items() if key not in ("part", "path"))


def goal_lines(entries: Sequence[dict[str, Any]], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """P4, P6 and the engine's part of P7, where they were measured."""
    lines = {}
    where = f"perf/bench_latency.py, {args.config.name}"
    found = {(one["part"], one.get("path", "")): one for one in entries}
    engine, server = found.get(("decode", "engine")), found.get(("decode", "server"))
    if engine and server:
        added = server["itl_ms"]["p50"] - engine["itl_ms"]["p50"]
        shape = f"{args.streams} streams of {args.prompt} + {args.tokens} tokens"
        lines["P4"] = results.goal_line(
            round(100 * server["tok_s"] / engine["tok_s"], 2),
            "% of the engine alone",
            ">= 97, added p50 <= 2 ms",
            args,
            method=f"{where}: {shape}, gRPC, text out; {server['tok_s']:.0f} of {engine['tok_s']:.0f} tokens/s; p50 of "
            f"the gaps {server['itl_ms']['p50']:.2f} ms, {added:+.2f} ms",
        )
    if ("startup", "server") in found:
        start = found["startup", "server"]
        method = f"{where}: launch of tritonserver to the first token over gRPC, kernels compiled before"
        lines["P6"] = results.goal_line(start["first_token_s"], "s", "<= 60", args, method=method)
    if ("idle", "engine") in found:
        idle = found["idle", "engine"]
        method = f"{where}: {args.streams} streams through the engine, {idle['steps']} steps, upper bound"
        lines["P7_engine"] = results.goal_line(idle["idle_percent"], "% idle", "<= 3", args, method=method)
    return lines


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["decode", "load"])
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS), help="of decode and load")
    parser.add_argument(
        "--config", type=Path, default=results.P1_CONFIG, help="TOML; default: %(default)s with a model folder made"
    )
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--rates", type=float, nargs="+", default=[2.0, 8.0, 20.0, 40.0], help="requests/s")
    parser.add_argument("--seconds", type=float, default=10.0, help="of arrivals, at each rate")
    parser.add_argument("--load-prompt", type=int, default=128)
    parser.add_argument("--load-tokens", type=int, default=64)
    parser.add_argument("--clients", type=int, default=4, help="client processes")
    results.add_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints each entry and writes the document as it grows."""
    args = results.parse(arguments(), argv)
    entries: list[dict[str, Any]] = []

    def add(more: Sequence[dict[str, Any]]) -> None:
        entries.extend(more)
        goals = goal_lines(entries, args)
        results.write(results.document("latency", args, method=__doc__ or "", results=entries, goals=goals), args)

    with tempfile.TemporaryDirectory(prefix="nmoe-bench-") as name:
        config_path = with_model(args.config, Path(name))
        if ServeConfig.from_toml(config_path).device == "cuda":
            results.require_gpu()
        if "engine" in args.paths and {"decode", "load"} & set(args.parts):
            add(in_process(engine_session, config_path, args))
        if "server" in args.paths and {"decode", "load", "startup"} & set(args.parts):
            add(server_session(config_path, args))
    print({name: line["value"] for name, line in goal_lines(entries, args).items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
