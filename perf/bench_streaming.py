"""Tokens through the real tritonserver: scripted ranks, gRPC streams, text out, one stop string.

    python -m perf.bench_streaming [--baseline perf/baselines/cpu.json --save]
    python -m perf.bench_streaming --name P9 --streams 2048 --rates 22000 36000 --clients 4    # a host with 16 cores

Everything but the model is real: engine, responder, the Python backend's stub, tritonserver, gRPC. The ranks produce a
token for every stream each `streams / rate` seconds. Client processes count what arrives and when. Every stream is read
to its end and must have got all its tokens; `delivered` is the sum of the streams' own rates, first token to last, so
whatever lags behind the ranks at the end lowers it. `busy` is the ranks' share of the time, from the engine's steps.

Needs a model folder with config.json and tokenizer (scripts/make_tiny_checkpoint.py); weights are not read. Prints a
table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio
from tritonclient.grpc import service_pb2

from nmoe_backend.server_process import group_members
from perf import results
from perf.scripted import ROOT, benchmark_table, write_repository
from tests.triton_server import TritonServer, write_config

PROMPT = "Tell me a story."
STOP = "\n\nObservation:"  # its first characters do occur, so text is held back now and then
_METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
CONNECTIONS = 4  # of a client process
_EDGE_S = 2.0  # left out of the middle part, in which CPU time and steps are measured
WatchT = TypeVar("WatchT")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One rate. Gaps are between chunks of a stream, as the client sees them."""

    offered_tok_s: float
    delivered_tok_s: float
    mean_chunk: float
    gap_p50_ms: float
    gap_p99_ms: float
    gap_max_ms: float
    step_ms: float
    busy: float
    server_cores: float
    stub_cores: float
    client_cores: float


@dataclass
class Arrivals:
    """What one stream got."""

    times: list[float]  # perf_counter, the same clock in all processes
    counts: list[int]  # tokens
    sent_s: float  # when it was asked for


Work = Callable[[], Coroutine[Any, Any, list[Arrivals]]]  # of one client process


async def read_stream(channel: grpc.aio.Channel, request: bytes) -> Arrivals:
    """One request, to the server's end of it. The raw stub: the client library takes three times as long a response."""
    arrivals = Arrivals([], [], time.perf_counter())
    async for raw in channel.unary_stream(_METHOD)(request):  # half-closed behind the request
        now = time.perf_counter()
        answer = service_pb2.ModelStreamInferResponse.FromString(raw)
        assert not answer.error_message, answer.error_message
        arrivals.times.append(now)
        response = answer.infer_response
        raw_counts = (
            raw
            for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
            if output.name == "num_output_tokens"
        )
        arrivals.counts.append(struct.unpack("<i", next(raw_counts))[0])
    return arrivals


async def read_streams(address: str, streams: int, request: bytes) -> list[Arrivals]:
    """All streams at once, over a few connections."""
    channels = [
        grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(CONNECTIONS)
    ]
    tasks = [read_stream(channels[index % CONNECTIONS], request) for index in range(streams)]
    arrivals = await asyncio.gather(*tasks)
    for channel in channels:
        await channel.close()
    return arrivals


def client(pipe: Connection, work: Work) -> None:
    """A client process: starts when it is told to."""
    pipe.send("ready")
    pipe.recv()
    pipe.send(asyncio.run(work()))


def run_clients(works: Sequence[Work], watch: Callable[[list[int]], WatchT]) -> tuple[list[Arrivals], WatchT]:
    """A process for each of `works`, all at once. `watch` gets their pids and runs beside them."""
    context = multiprocessing.get_context("spawn")
    pipes, jobs = [], []
    for work in works:
        ours, theirs = context.Pipe()
        jobs.append(context.Process(target=client, args=(theirs, work)))
        jobs[-1].start()
        theirs.close()  # so that a client that dies is an EOFError here
        pipes.append(ours)
    assert all(pipe.recv() == "ready" for pipe in pipes)
    for pipe in pipes:
        pipe.send("go")
    seen = watch([job.pid or 0 for job in jobs])
    arrivals = [one for pipe in pipes for one in pipe.recv()]
    for job in jobs:
        job.join()
    return arrivals, seen


def shares(streams: int, clients: int) -> list[int]:
    """How many streams each client has."""
    return [streams // clients + (index < streams % clients) for index in range(clients)]


def make_request(target: str, max_tokens: int) -> bytes:
    """One streaming request: text and the token count back, one stop string."""
    request = service_pb2.ModelInferRequest(model_name=target)
    shape = [1] if target == "deepseek_v3_vllm" else [1, 1]

    def add(name: str, datatype: str, raw: bytes) -> None:
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(raw)

    def text(value: str) -> bytes:
        return struct.pack("<I", len(value.encode())) + value.encode()

    add("text_input", "BYTES", text(PROMPT))
    add("stream", "BOOL", b"\1")
    if target == "deepseek_v3_vllm":
        sampling = {"max_tokens": max_tokens, "stop": [STOP], "ignore_eos": True}
        add("sampling_parameters", "BYTES", text(json.dumps(sampling)))
        add("return_num_output_tokens", "BOOL", b"\1")
    else:
        add("max_tokens", "INT32", struct.pack("<i", max_tokens))
        add("stop_words", "BYTES", text(STOP))
        add("ignore_eos", "BOOL", b"\1")
    for name in ("text_output", "num_output_tokens"):
        request.outputs.add(name=name)
    return request.SerializeToString()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def stub_pid(server: TritonServer) -> int:
    """The Python process that holds the engine: the one of the group with the most threads but for the server."""
    children = [pid for pid in group_members(server.process.pid) if pid != server.process.pid]
    return max(children, key=lambda pid: len(list(Path(f"/proc/{pid}/task").iterdir())))


def write_scripted_config(args: argparse.Namespace, rate: float, folder: Path, max_tokens: int) -> Path:
    """Room for all streams at once; the ranks' step time stands in [benchmark]."""
    slots = -(-args.streams // args.ranks)
    config = write_config(
        folder / f"rate-{rate:g}.toml",
        args.model,
        gpus=list(range(args.ranks)),
        max_batch_size=slots,
        max_prefill_tokens=1024,
        num_pages=slots * (max_tokens // 16 + 4),
        max_seq_len=4096,
        itl_target_ms=1e6,
        max_queue_size=2 * args.streams,
    )
    config.write_text(config.read_text() + benchmark_table({"step_ms": 1e3 * args.streams / rate}))
    return config


def measure(args: argparse.Namespace, rate: float, folder: Path) -> Result:
    """One rate, on a server of its own."""
    max_tokens = round(args.seconds * rate / args.streams)
    config = write_scripted_config(args, rate, folder, max_tokens)
    with TritonServer(config, folder / "model_repository") as server:
        request = make_request(args.target, max_tokens)
        works = [partial(read_streams, server.grpc, share, request) for share in shares(args.streams, args.clients)]

        def watch_all(clients: list[int]) -> tuple[list[float], float]:
            return watch(server, [[server.process.pid], [stub_pid(server)], clients], args.seconds)

        streams, (cores, steps) = run_clients(works, watch_all)
    assert all(sum(arrivals.counts) == max_tokens for arrivals in streams), "a stream did not get all its tokens"
    step_s = args.streams / rate
    return summarise(rate, 1e3 * step_s, streams, steps * step_s, cores)


def watch(server: TritonServer, pids: Sequence[Sequence[int]], seconds: float) -> tuple[list[float], float]:
    """In the middle of a run of so many seconds: (cores of each group of processes, steps per second)."""

    def now() -> tuple[float, float, list[float]]:
        steps = server.metric("nmoe_steps_total")
        return time.perf_counter(), steps, [sum(map(cpu_seconds, group)) for group in pids]

    time.sleep(_EDGE_S)
    start_s, start_steps, start_cpu = now()
    time.sleep(max(1.0, seconds - 2 * _EDGE_S))
    end_s, end_steps, end_cpu = now()
    elapsed = end_s - start_s
    cores = [(end - start) / elapsed for start, end in zip(start_cpu, end_cpu, strict=True)]
    return cores, (end_steps - start_steps) / elapsed


def summarise(rate: float, step_ms: float, streams: list[Arrivals], busy: float, cores: list[float]) -> Result:
    """Every chunk of every stream."""
    tokens = sum(sum(arrivals.counts) for arrivals in streams)
    delivered = sum(sum(arrivals.counts[1:]) / (arrivals.times[-1] - arrivals.times[0]) for arrivals in streams)
    chunks = sum(len(arrivals.counts) for arrivals in streams)
    gaps = sorted(
        1e3 * (after - before)
        for arrivals in streams
        for before, after in zip(arrivals.times, arrivals.times[1:], strict=False)
    )
    return Result(
        offered_tok_s=rate,
        delivered_tok_s=round(delivered, 1),
        mean_chunk=round(tokens / chunks, 3),
        gap_p50_ms=round(statistics.median(gaps), 2),
        gap_p99_ms=round(gaps[int(0.99 * len(gaps))], 2),
        gap_max_ms=round(gaps[-1], 2),
        step_ms=round(step_ms, 2),
        busy=round(busy, 3),
        server_cores=round(cores[0], 2),
        stub_cores=round(cores[1], 2),
        client_cores=round(cores[2], 2),
    )


def add_arguments(parser: argparse.ArgumentParser, name: str, seconds: float) -> None:
    """What bench_api.py has too."""
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "tiny", help="default %(default)s")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--clients", type=int, default=1, help="client processes")
    parser.add_argument("--rates", type=float, nargs="+", default=[2000.0, 8000.0, 20000.0], help="tokens/s offered")
    parser.add_argument("--seconds", type=float, default=seconds, help="per rate")
    parser.add_argument("--name", default=name, help="its entry in the baseline")
    parser.add_argument("--commit", default="", help="what was measured; default: asked of git")
    parser.add_argument("--output", type=Path, help="file of the JSON document")
    parser.add_argument("--baseline", type=Path, help="JSON file that --save writes into")
    parser.add_argument("--save", action="store_true")


def check_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments given."""
    args = results.parse(parser, argv)
    if args.save and args.baseline is None:
        parser.error("--save needs --baseline FILE")
    return args


def line_of(one: Result) -> str:
    """A line of the table."""
    return (
        f"{one.offered_tok_s:7.0f} {one.delivered_tok_s:10.0f} {one.mean_chunk:6.2f} {one.gap_p50_ms:8.1f} "
        f"{one.gap_p99_ms:7.1f} {one.gap_max_ms:7.1f} {one.busy:10.3f} {one.server_cores:15.2f} "
        f"{one.stub_cores:6.2f} {one.client_cores:8.2f}"
    )


HEAD = "offered  delivered  chunk  gap p50     p99     max ms   busy   cores: server   stub  clients"


def report(args: argparse.Namespace, result: Mapping[str, Any], goals: Mapping[str, Any] | None = None) -> None:
    """Save it where that is asked for, and print it."""
    made = results.document(args.name, args, method=result["method"], results=result["rows"], goals=goals or {})
    results.write_document(made, args.output)
    if args.save:
        results.save_lines(args.baseline, {args.name: result})
    print(json.dumps(result))


def p9_line(rows: Sequence[Result], args: argparse.Namespace, method: str) -> dict[str, Any]:
    """P9's line: the highest rate's, the others in the method."""
    each = "; ".join(
        f"{one.offered_tok_s:g} offered: {one.delivered_tok_s:.0f} delivered, p99 gap "
        f"{one.gap_p99_ms / one.step_ms:.2f} steps, ranks busy {one.busy:.1%}"
        for one in rows
    )
    goal = "delivered = offered, p99 gap <= 2 steps, ranks idle <= 3 %"
    return results.goal_line(
        rows[-1].delivered_tok_s, "tokens/s", goal, args, method=f"{method}; {results.machine()}: {each}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, name="streaming", seconds=40.0)
    parser.add_argument("--target", default="deepseek_v3", choices=("deepseek_v3", "ensemble", "deepseek_v3_vllm"))
    args = check_arguments(parser, argv)
    rows = []
    print(HEAD)
    with tempfile.TemporaryDirectory(prefix="nmoe-bench-") as name:
        write_repository(Path(name))
        for rate in args.rates:
            rows.append(measure(args, rate, Path(name)))
            print(line_of(rows[-1]), flush=True)
    method = (
        f"perf/bench_streaming.py, {args.streams} gRPC streams to {args.target}, {args.ranks} scripted ranks, "
        f"{args.seconds:g} s a rate, the last rate's"
    )
    report(
        args,
        {
            "name": args.name,
            "value": rows[-1].delivered_tok_s,
            "unit": "tokens/s",
            "goal": "delivered = offered, chunk 1.0 at 2k, p99 gap <= 250 ms at 20k",
            "commit": args.commit,
            "machine": results.machine(),
            "method": method,
            "rows": [asdict(one) for one in rows],
        },
        {"P9": p9_line(rows, args, method)} if args.name == "P9" else {},
    )


if __name__ == "__main__":
    main()
