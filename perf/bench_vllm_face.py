"""What `deepseek_v3_vllm` costs beside `deepseek_v3`: scripted ranks, real tritonserver, gRPC streams, text out.

    python -m perf.bench_vllm_face [--baseline perf/baselines/cpu.json --save]

The same streams through either model, as in bench_streaming.py, one after the other on a server each; what a response
costs is the processor time of server and stub over the responses. Then low load: the age of a token (bench_api.py),
both models at the same time on one server. Prints tables; the last line is JSON.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path

from perf import bench_streaming, results
from perf.bench_api import STEP_S, added_ms
from perf.scripted import write_repository
from tests.triton_server import TritonServer

TARGETS = ("deepseek_v3", "deepseek_v3_vllm")
_LOW_LOAD = (1, 4, 16)  # streams of each model
_TOKENS = 500  # a stream, for the age of a token


def measure_rates(args: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    """Every rate through both."""
    rows: list[dict[str, object]] = []
    for rate in args.rates:
        for target in TARGETS:
            one = bench_streaming.measure(argparse.Namespace(**{**vars(args), "target": target}), rate, folder)
            response_us = 1e6 * (one.server_cores + one.stub_cores) * one.mean_chunk / one.delivered_tok_s
            print(f"{bench_streaming.line_of(one)} {response_us:12.0f}  {target}", flush=True)
            rows.append({**asdict(one), "target": target, "response_cpu_us": round(response_us, 1)})
    return rows


def measure_latency(args: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """Low load, on one server."""
    config = bench_streaming.write_scripted_config(args, args.streams / STEP_S, folder, _TOKENS)
    rows = []
    with TritonServer(config, folder / "model_repository") as server:
        for streams in _LOW_LOAD:
            works = [
                partial(
                    bench_streaming.read_streams, server.grpc, streams, bench_streaming.make_request(target, _TOKENS)
                )
                for target in TARGETS
            ]
            arrivals, _ = bench_streaming.run_clients(works, len)
            added = sorted(added_ms(arrivals[:streams], arrivals[streams:]))
            row = {
                "streams": streams,
                "added_token_p50_ms": statistics.median(added),
                "added_token_p99_ms": added[int(0.99 * len(added))],
            }
            rows.append({name: round(value, 2) for name, value in row.items()})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench_streaming.add_arguments(parser, name="vllm_face", seconds=20.0)
    args = bench_streaming.check_arguments(parser)
    print(f"{bench_streaming.HEAD}  us/response  model")
    with tempfile.TemporaryDirectory(prefix="nmoe-bench-") as name:
        write_repository(Path(name))
        rows = measure_rates(args, Path(name))
        latency = measure_latency(args, Path(name))
    result = {
        "name": args.name,
        "value": rows[-1]["delivered_tok_s"],
        "unit": "tokens/s",
        "goal": "the cost is known",
        "commit": args.commit,
        "machine": results.machine(),
        "method": f"perf/bench_vllm_face.py, {args.streams} gRPC streams to {TARGETS[1]} and to {TARGETS[0]}, "
        f"{args.ranks} scripted ranks, {args.seconds:g} s a rate and model, the last rate's of {TARGETS[1]}",
        "rows": rows,
        "latency": latency,
    }
    bench_streaming.report(args, result)


if __name__ == "__main__":
    main()
