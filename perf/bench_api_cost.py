"""What a request and a response cost the OpenAI front end: CPU time of a real `nmoe api` before a scripted Triton.

    python -m perf.bench_api_cost [--baseline perf/baselines/cpu.json --save]

CPU time of the front end's process, not latency: what else runs on the machine changes it little, and the smallest of
several rounds is taken. Triton is a gRPC server in a process of its own that answers from a script. A request: a chat
completion of two tokens over SSE, on a connection of its own, four at a time. A response: streams that all get a token
in the same steps, as a decode step brings them. Prints a line; the last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import struct
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2

from nmoe_backend.server_process import group_members
from perf import bench_streaming, results, sse_client
from perf.scripted import ROOT
from tests.front_end import FrontEnd
from tests.triton_server import free_ports, write_config

_CLIENTS, _REQUESTS = 4, 100  # of a round; a request has two tokens
_STREAMS, _TOKENS, _STEP_S = 64, 100, 0.032  # 2,000 responses a second


def _response(outputs: list[str], is_last: bool) -> bytes:
    """A ModelStreamInferResponse with one more token."""
    values: dict[str, bytes | int] = {
        "text_output": b" word",
        "finish_reason": b"length" if is_last else b"",
        "num_input_tokens": 12,
        "num_output_tokens": 1,
        "num_cached_tokens": 0,
        "output_ids": 100,
    }
    message = service_pb2.ModelStreamInferResponse()
    for name in outputs:
        value = values[name]
        raw = struct.pack("<i", value) if isinstance(value, int) else struct.pack("<I", len(value)) + value
        message.infer_response.outputs.add(
            name=name, datatype="INT32" if isinstance(value, int) else "BYTES", shape=[1, 1]
        )
        message.infer_response.raw_output_contents.append(raw)
    return bytes(message.SerializeToString())


async def _stream(requests: AsyncIterator[bytes], _context: object) -> AsyncIterator[bytes]:
    """As many tokens as were asked for: one at once, then one a step; the steps are those of all streams."""
    request = service_pb2.ModelInferRequest.FromString(await anext(aiter(requests)))
    names = [tensor.name for tensor in request.inputs]
    (num_tokens,) = struct.unpack("<i", request.raw_input_contents[names.index("max_tokens")])
    outputs = [output.name for output in request.outputs]
    step_s = _STEP_S if num_tokens > 2 else 0.0
    more, last = (_response(outputs, is_last) for is_last in (False, True))
    clock = asyncio.get_running_loop().time
    for _ in range(num_tokens - 1):
        yield more
        if step_s:
            await asyncio.sleep(step_s - clock() % step_s)
    yield last


async def _ready(_request: bytes, _context: object) -> bytes:
    return bytes(service_pb2.ModelReadyResponse(ready=True).SerializeToString())


def scripted_triton(port: int) -> None:
    """A process: serves until it is ended."""

    async def serve() -> None:
        server = grpc.aio.server()
        methods = {
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(_stream),
            "ModelReady": grpc.unary_unary_rpc_method_handler(_ready),
        }
        service = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", methods)
        server.add_generic_rpc_handlers((service,))
        server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        await server.wait_for_termination()

    asyncio.run(serve())


def make_request(front: FrontEnd, num_tokens: int) -> bytes:
    """A streamed chat completion, as bench_api.py sends it."""
    body: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": bench_streaming.PROMPT}],
        "max_tokens": num_tokens,
        "stop": [bench_streaming.STOP],
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return sse_client.make_request(front.address, body)


def measure(front: FrontEnd, rounds: int) -> dict[str, float]:
    """Microseconds of CPU time of the front end."""
    short, long = make_request(front, 2), make_request(front, _TOKENS)

    def cpu_us(work: Callable[[], Coroutine[Any, Any, object]]) -> float:
        pids = group_members(front.process.pid)
        before = sum(map(bench_streaming.cpu_seconds, pids))
        asyncio.run(work())
        return 1e6 * (sum(map(bench_streaming.cpu_seconds, pids)) - before)

    async def requests() -> None:
        async def client() -> None:
            for _ in range(_REQUESTS):
                await sse_client.read_streams(front.address, 1, short)

        await asyncio.gather(*(client() for _ in range(_CLIENTS)))

    async def responses() -> None:
        await sse_client.read_streams(front.address, _STREAMS, long)

    cpu_us(requests)  # the first ones are slower
    request_us = min(cpu_us(requests) for _ in range(rounds)) / (_CLIENTS * _REQUESTS)
    streams_us = min(cpu_us(responses) for _ in range(rounds)) / _STREAMS
    return {"request_us": round(request_us), "response_us": round((streams_us - request_us) / (_TOKENS - 2), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "tiny", help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--name", default="openai_cost", help="its entry in the baseline")
    parser.add_argument("--commit", default="", help="what was measured; default: asked of git")
    parser.add_argument("--output", type=Path, help="file of the JSON document")
    parser.add_argument("--baseline", type=Path, help="JSON file that --save writes into")
    parser.add_argument("--save", action="store_true")
    args = bench_streaming.check_arguments(parser)
    (port,) = free_ports(1)
    triton = multiprocessing.get_context("spawn").Process(target=scripted_triton, args=(port,))
    triton.start()
    try:
        with tempfile.TemporaryDirectory(prefix="nmoe-bench-") as folder:
            config = write_config(Path(folder) / "cost.toml", args.model.absolute())
            with FrontEnd(config, f"127.0.0.1:{port}") as front:
                row = measure(front, args.rounds)
    finally:
        triton.terminate()
        triton.join()
    print(f"a request of two tokens {row['request_us']:g} us, a further response {row['response_us']:g} us")
    result = {
        "name": args.name,
        "value": row["request_us"],
        "unit": "us of CPU time a request",
        "goal": "the cost is known",
        "commit": args.commit,
        "machine": results.machine(),
        "method": f"perf/bench_api_cost.py, the smallest of {args.rounds} rounds",
        "rows": [row],
    }
    bench_streaming.report(args, result)


if __name__ == "__main__":
    main()
