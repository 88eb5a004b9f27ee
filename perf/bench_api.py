"""Tokens through the OpenAI front end, beside gRPC straight to Triton: scripted ranks, real server, real `nmoe api`.

    python -m perf.bench_api [--baseline perf/baselines/cpu.json --save]

Everything but the model is real, as in bench_streaming.py, whose ranks, server and gRPC client these are. For each rate
the same streams run first over gRPC and then as chat completions over SSE, against one server. Then latency, at low
load: the time to the first token, one path after the other; and what the front end adds to each token, both paths at
once, where every stream gets a token in the same step: when it arrived over SSE less when it did over gRPC (the middle
one of the streams). Prints a line a rate and path, then the tables of docs/performance.md; the last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import itertools
import random
import statistics
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc.aio

from nmoe_backend.server_process import group_members
from perf import bench_streaming, results, sse_client
from perf.bench_streaming import Arrivals, Result, run_clients, shares, stub_pid, summarise, watch
from perf.scripted import write_repository
from tests.front_end import FrontEnd
from tests.triton_server import TritonServer

STEP_S = 0.02  # at low load: a decode step of the real model
_ROUNDS: Mapping[int, int] = MappingProxyType({1: 40, 4: 25, 16: 15})  # streams at low load -> requests of each
_FEW_TOKENS = 12  # a stream, for the time to the first one: 16 streams are 60 requests a second
_TOKENS = 500  # a stream, for what the front end adds to each


@dataclass(frozen=True, kw_only=True)
class Throughput(Result):
    """One rate over one path."""

    path: str  # grpc or openai
    front_end_cores: float


@dataclass(frozen=True, kw_only=True)
class Latency:
    """So many streams at a time: the time to the first token over either path, and what each token takes longer."""

    streams: int
    ttft_grpc_p50_ms: float
    ttft_openai_p50_ms: float
    ttft_added_p50_ms: float
    ttft_grpc_p99_ms: float
    ttft_openai_p99_ms: float
    token_added_p50_ms: float
    token_added_p99_ms: float


class Both:
    """One server and one front end: the same request over either path."""

    def __init__(self, server: TritonServer, front: FrontEnd, max_tokens: int) -> None:
        self.server, self.front, self.max_tokens = server, front, max_tokens
        body: dict[str, Any] = {
            "model": server.config.model_name,
            "messages": [{"role": "user", "content": bench_streaming.PROMPT}],
            "max_tokens": max_tokens,
            "stop": [bench_streaming.STOP],
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        self.grpc_request = bench_streaming.make_request("deepseek_v3", max_tokens)
        self.sse_request = sse_client.make_request(front.address, body)
        self.works = {
            "grpc": partial(bench_streaming.read_streams, server.grpc, request=self.grpc_request),
            "openai": partial(sse_client.read_streams, front.address, request=self.sse_request),
        }

    def check(self, streams: Sequence[Arrivals]) -> None:
        """Each must have got all its tokens."""
        got = {sum(arrivals.counts) for arrivals in streams}
        assert got == {self.max_tokens}, f"streams got {got} tokens, need {self.max_tokens}"


def measure_rate(args: argparse.Namespace, rate: float, folder: Path) -> list[Throughput]:
    """Both paths, one after the other, on a server of their own."""
    max_tokens = round(args.seconds * rate / args.streams)
    config = bench_streaming.write_scripted_config(args, rate, folder, max_tokens)
    config.write_text(config.read_text() + f"[openai]\nworkers = {args.workers}\n")
    rows = []
    with TritonServer(config, folder / "model_repository") as server, FrontEnd(config, server.grpc) as front:
        both = Both(server, front, max_tokens)
        for path, work in both.works.items():

            def watch_all(clients: list[int]) -> tuple[list[float], float]:
                pids = [[server.process.pid], [stub_pid(server)], clients, group_members(front.process.pid)]
                return watch(server, pids, args.seconds)

            works = [partial(work, streams=share) for share in shares(args.streams, args.clients)]
            streams, (cores, steps) = run_clients(works, watch_all)
            both.check(streams)
            step_s = args.streams / rate
            one = summarise(rate, 1e3 * step_s, streams, steps * step_s, cores)
            rows.append(Throughput(path=path, front_end_cores=round(cores[3], 2), **asdict(one)))
    return rows


def measure_latency(args: argparse.Namespace, folder: Path) -> list[Latency]:
    """Low load, on one server."""
    config = bench_streaming.write_scripted_config(args, args.streams / STEP_S, folder, _TOKENS)
    rows = []
    with TritonServer(config, folder / "model_repository") as server, FrontEnd(config, server.grpc) as front:
        short, long = Both(server, front, _FEW_TOKENS), Both(server, front, _TOKENS)
        for streams in _ROUNDS:
            ttft = asyncio.run(first_tokens(short, streams))
            direct, openai = ([quantile(ttft[path], q) for q in (0.5, 0.99)] for path in ("grpc", "openai"))
            works = [partial(long.works[path], streams=streams) for path in ("grpc", "openai")]
            arrivals, _ = run_clients(works, len)
            long.check(arrivals)
            added = added_ms(arrivals[:streams], arrivals[streams:])
            rows.append(
                Latency(
                    streams=streams,
                    ttft_grpc_p50_ms=direct[0],
                    ttft_openai_p50_ms=openai[0],
                    ttft_added_p50_ms=round(openai[0] - direct[0], 2),
                    ttft_grpc_p99_ms=direct[1],
                    ttft_openai_p99_ms=openai[1],
                    token_added_p50_ms=quantile(added, 0.5),
                    token_added_p99_ms=quantile(added, 0.99),
                )
            )
    return rows


async def first_tokens(both: Both, streams: int) -> dict[str, list[float]]:
    """path -> ms from a request to its first token, with so many clients that ask again and again after a pause.

    The pauses are drawn, so that requests come at any moment of a step. Each path has its turn twice.
    """
    channel = grpc.aio.insecure_channel(both.server.grpc)

    async def by_grpc() -> Arrivals:
        return await bench_streaming.read_stream(channel, both.grpc_request)

    async def by_sse() -> Arrivals:
        return (await sse_client.read_streams(both.front.address, 1, both.sse_request))[0]

    async def ask(once: Callable[[], Awaitable[Arrivals]], rng: random.Random) -> list[float]:
        times = []
        for _ in range(_ROUNDS[streams]):
            await asyncio.sleep(rng.uniform(0, 2 * STEP_S))
            arrivals = await once()
            times.append(1e3 * (arrivals.times[0] - arrivals.sent_s))
        return times[1:]  # the first one connects

    times: dict[str, list[float]] = {"grpc": [], "openai": []}
    for turn in range(2):
        for path, once in (("grpc", by_grpc), ("openai", by_sse)):
            tasks = [ask(once, random.Random(100 * turn + index)) for index in range(streams)]
            times[path] += itertools.chain.from_iterable(await asyncio.gather(*tasks))
    await channel.close()
    return times


def quantile(values: Sequence[float], q: float) -> float:
    """To two places."""
    return round(sorted(values)[int(q * len(values))], 2)


def added_ms(grpc: Sequence[Arrivals], openai: Sequence[Arrivals]) -> list[float]:
    """How much later than over gRPC each token came over SSE, while both ran.

    A step's tokens arrive over gRPC at about the same time: the middle one stands for the step. Streams begin in
    different steps, so a step is what arrived within half a step of one stream's token, and not their n-th tokens. An
    arrival over SSE belongs to the nearest step before it, or the next one where it was up to a quarter of a step
    earlier.
    """
    everybody = sorted(time_s for one in grpc for time_s in one.times)
    steps = []
    for time_s in grpc[0].times:
        first, last = (bisect.bisect(everybody, time_s + half) for half in (-STEP_S / 2, STEP_S / 2))
        steps.append(statistics.median(everybody[first:last]))
    steps.sort()
    added = []
    for arrivals in openai:
        for time_s in arrivals.times:
            index = bisect.bisect(steps, time_s + STEP_S / 4) - 1
            if 0 < index < len(steps) - 1:
                added.append(1e3 * (time_s - steps[index]))
    assert added, "the two paths did not run at the same time"
    return added


def tables(rows: Sequence[Throughput], latencies: Sequence[Latency]) -> str:
    """As docs/performance.md shows them."""
    lines = []
    for one in rows:
        rate, path = (f"{one.offered_tok_s:,.0f}", "gRPC") if one.path == "grpc" else ("", "OpenAI")
        gaps = " | ".join(f"{gap:.0f} ms" for gap in (one.gap_p50_ms, one.gap_p99_ms, one.gap_max_ms))
        cores = (one.server_cores, one.stub_cores, one.client_cores, one.front_end_cores)
        shown = " | ".join(f"{value:.2f}" if value else "" for value in cores)
        lines.append(f"| {rate} | {path} | {one.delivered_tok_s:,.0f} | {one.mean_chunk:.2f} | {gaps} | {shown} |")
    for late in latencies:
        direct = f"{late.ttft_grpc_p50_ms:.1f} / {late.ttft_grpc_p99_ms:.1f} ms"
        openai = f"{late.ttft_openai_p50_ms:.1f} / {late.ttft_openai_p99_ms:.1f} ms"
        token = f"{late.token_added_p50_ms:.1f} / {late.token_added_p99_ms:.1f} ms"
        lines.append(f"| {late.streams} | {direct} | {openai} | {late.ttft_added_p50_ms:.1f} ms | {token} |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench_streaming.add_arguments(parser, name="openai", seconds=24.0)
    parser.set_defaults(rates=[2000.0, 20000.0, 28000.0])
    parser.add_argument("--workers", type=int, default=1, help="processes of the front end")
    parser.add_argument("--no-latency", action="store_true", help="leave low load out")
    return bench_streaming.check_arguments(parser)


def main() -> None:
    args = parse_arguments()
    rows: list[Throughput] = []
    print(f"{bench_streaming.HEAD}  front end  path")
    with tempfile.TemporaryDirectory(prefix="nmoe-bench-") as name:
        write_repository(Path(name))
        for rate in args.rates:
            for one in measure_rate(args, rate, Path(name)):
                rows.append(one)
                print(f"{bench_streaming.line_of(one)} {one.front_end_cores:10.2f}  {one.path}", flush=True)
        latencies = [] if args.no_latency else measure_latency(args, Path(name))
    print(tables(rows, latencies))
    result = {
        "name": args.name,
        "value": rows[-1].delivered_tok_s,
        "unit": "tokens/s",
        "goal": ">= 20k tokens/s delivered, p99 gap <= 300 ms, added p50 <= 3 ms at low load",
        "commit": args.commit,
        "machine": results.machine(),
        "method": f"perf/bench_api.py, {args.streams} SSE streams, {args.workers} worker process(es), {args.ranks} "
        f"scripted ranks, {args.seconds:g} s a rate and path, the last rate's over SSE",
        "rows": [asdict(one) for one in rows],
        "latency": [asdict(one) for one in latencies],
    }
    bench_streaming.report(args, result)


if __name__ == "__main__":
    main()
