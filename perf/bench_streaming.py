"""Tokens through the real tritonserver: scripted ranks, gRPC streams, text out, one stop string.

Everything but the model is real: engine, responder, the Python backend's stub, tritonserver, gRPC. The ranks produce a
token for every stream each `streams / rate` seconds; the client (a process of its own) counts what arrives and when.

    python -m perf.bench_streaming                                   # 256 streams at 2k, 8k and 20k tokens/s
    python -m perf.bench_streaming --streams 2048 --rates 22000 36000   # P9, on a host with 16 cores

Prints a table; the last line is JSON. `--write` merges it into perf/baselines/<--machine>.json.
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
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import grpc.aio
from tritonclient.grpc import service_pb2

from nmoe_backend.server_process import group_members
from perf.scripted import ROOT, benchmark_table, write_repository
from tests.triton_server import TritonServer, write_config

STOP = "\n\nObservation:"  # its first characters do occur, so text is held back now and then
_METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
_WARM_UP_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Result:
    """One rate. Gaps are between chunks of a stream, as the client sees them, in ms."""

    streams: int
    ranks: int
    offered_tok_s: float
    generated_tok_s: float
    delivered_tok_s: float
    mean_chunk: float
    gap_p50_ms: float
    gap_p99_ms: float
    gap_max_ms: float
    cpu_server: float  # cores: tritonserver, the stub, the client
    cpu_stub: float
    cpu_client: float


class Reader:
    """Counts one stream."""

    def __init__(self) -> None:
        self.first_s: float | None = None
        self.times: list[float] = []
        self.counts: list[int] = []

    async def run(self, channel: grpc.aio.Channel, request: bytes, until: asyncio.Event) -> None:
        """Reads until told to stop, then cancels."""
        call = channel.stream_stream(_METHOD)(iter_once(request))
        stopper = asyncio.ensure_future(cancel_when(until, call))
        try:
            async for raw in call:
                answer = service_pb2.ModelStreamInferResponse.FromString(raw)
                assert not answer.error_message, answer.error_message
                self.times.append(time.perf_counter())
                self.counts.append(struct.unpack("<i", answer.infer_response.raw_output_contents[1])[0])
        except asyncio.CancelledError:
            assert until.is_set(), "the server cancelled a stream"
        finally:
            stopper.cancel()


async def iter_once(request: bytes):  # type: ignore[no-untyped-def]
    """One request, and the stream stays open."""
    yield request
    await asyncio.Event().wait()


async def cancel_when(event: asyncio.Event, call: grpc.aio.Call) -> None:
    """Ends a call once the time is over."""
    await event.wait()
    call.cancel()


def make_request(max_tokens: int) -> bytes:
    """One streaming request: text and the token count back, one stop string."""
    request = service_pb2.ModelInferRequest(model_name="deepseek_v3")

    def add(name: str, datatype: str, raw: bytes) -> None:
        request.inputs.add(name=name, datatype=datatype, shape=[1, 1])
        request.raw_input_contents.append(raw)

    def text(value: str) -> bytes:
        return struct.pack("<I", len(value.encode())) + value.encode()

    add("text_input", "BYTES", text("Tell me a story."))
    add("max_tokens", "INT32", struct.pack("<i", max_tokens))
    add("stream", "BOOL", b"\1")
    add("stop_words", "BYTES", text(STOP))
    add("ignore_eos", "BOOL", b"\1")
    for name in ("text_output", "num_output_tokens"):
        request.outputs.add(name=name)
    return request.SerializeToString()


async def read_streams(address: str, streams: int, max_tokens: int, duration_s: float) -> list[Reader]:
    """All streams at once, over a few connections."""
    options = [("grpc.max_receive_message_length", -1)]
    channels = [
        grpc.aio.insecure_channel(address, options=[*options, ("grpc.channel_id", index)]) for index in range(4)
    ]
    request, until = make_request(max_tokens), asyncio.Event()
    readers = [Reader() for _ in range(streams)]
    tasks = [
        asyncio.ensure_future(reader.run(channels[index % len(channels)], request, until))
        for index, reader in enumerate(readers)
    ]
    await asyncio.sleep(duration_s)
    until.set()
    await asyncio.gather(*tasks)
    for channel in channels:
        await channel.close()
    return readers


def client(pipe: Connection, address: str, streams: int, max_tokens: int, duration_s: float) -> None:
    """The client process: answers with (streams' times and counts, its CPU seconds)."""
    readers = asyncio.run(read_streams(address, streams, max_tokens, duration_s))
    pipe.send([(reader.times, reader.counts) for reader in readers])


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def stub_pid(server: TritonServer) -> int:
    """The Python process that holds the engine: the child of tritonserver with the most threads."""
    children = [pid for pid in group_members(server.process.pid) if pid != server.process.pid]
    return max(children, key=lambda pid: len(list(Path(f"/proc/{pid}/task").iterdir())))


def measure(args: argparse.Namespace, rate: float, folder: Path) -> Result:
    """One rate, on a server of its own."""
    step_ms = 1e3 * args.streams / rate
    max_tokens = int(1e3 * (args.seconds + 30) / step_ms)
    pages = args.streams * (max_tokens // 16 + 4) // args.ranks + 64
    config = write_config(
        folder / f"rate-{rate:g}.toml",
        args.model,
        gpus=list(range(args.ranks)),
        max_batch_size=-(-args.streams // args.ranks),
        max_prefill_tokens=1024,
        num_pages=pages,
        max_seq_len=4096,
        itl_target_ms=1e6,
        max_queue_size=2 * args.streams,
    )
    config.write_text(config.read_text() + benchmark_table({"step_ms": step_ms}))
    repository = folder / "model_repository"
    with TritonServer(config, repository) as server:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        job = context.Process(
            target=client, args=(theirs, server.grpc, args.streams, max_tokens, args.seconds + _WARM_UP_S)
        )
        job.start()
        assert job.pid is not None
        pids = (server.process.pid, stub_pid(server), job.pid)
        time.sleep(_WARM_UP_S + 1.0)  # spawn takes a second
        before, start = [cpu_seconds(pid) for pid in pids], time.perf_counter()
        generated = server.metric("nmoe_generation_tokens_total")
        time.sleep(max(0.0, args.seconds - 2.0))
        cpu = [after - begin for after, begin in zip(map(cpu_seconds, pids), before, strict=True)]
        elapsed = time.perf_counter() - start
        generated = server.metric("nmoe_generation_tokens_total") - generated
        readers = ours.recv()
        job.join()
    return summarise(args, rate, readers, generated / elapsed, [seconds / elapsed for seconds in cpu])


def summarise(
    args: argparse.Namespace,
    rate: float,
    readers: list[tuple[list[float], list[int]]],
    generated: float,
    cpu: list[float],
) -> Result:
    """Over the time in which every stream was up, the first second of it left out."""
    assert all(times for times, _ in readers), "some streams got nothing"
    begin = max(times[0] for times, _ in readers) + 1.0
    end = min(times[-1] for times, _ in readers)
    tokens = chunks = 0
    gaps: list[float] = []
    for times, counts in readers:
        inside = [index for index, at in enumerate(times) if begin <= at < end]
        tokens += sum(counts[index] for index in inside)
        chunks += len(inside)
        gaps += [1e3 * (times[index] - times[index - 1]) for index in inside if index]
    gaps.sort()
    return Result(
        streams=args.streams,
        ranks=args.ranks,
        offered_tok_s=rate,
        generated_tok_s=round(generated, 1),
        delivered_tok_s=round(tokens / (end - begin), 1),
        mean_chunk=round(tokens / chunks, 3),
        gap_p50_ms=round(statistics.median(gaps), 2),
        gap_p99_ms=round(gaps[int(0.99 * len(gaps))], 2),
        gap_max_ms=round(gaps[-1], 2),
        cpu_server=round(cpu[0], 2),
        cpu_stub=round(cpu[1], 2),
        cpu_client=round(cpu[2], 2),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=ROOT / "models" / "tiny", help="a folder with config and tokenizer"
    )
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rates", type=float, nargs="+", default=[2000.0, 8000.0, 20000.0], help="tokens/s offered")
    parser.add_argument("--seconds", type=float, default=15.0, help="per rate")
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="nmoe-bench-") as name:
        write_repository(Path(name))
        print("offered  generated  delivered  chunk  gap p50/p99/max ms     CPU cores: server  stub  client")
        for rate in args.rates:
            one = measure(args, rate, Path(name))
            results.append(one)
            print(
                f"{one.offered_tok_s:7.0f}  {one.generated_tok_s:9.0f}  {one.delivered_tok_s:9.0f}  {one.mean_chunk:5.2f}  "
                f"{one.gap_p50_ms:7.1f} {one.gap_p99_ms:7.1f} {one.gap_max_ms:7.1f}   {one.cpu_server:14.2f} "
                f"{one.cpu_stub:6.2f} {one.cpu_client:6.2f}",
                flush=True,
            )
    print(json.dumps({"bench": "streaming", "results": [asdict(one) for one in results]}))


if __name__ == "__main__":
    main()
