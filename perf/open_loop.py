"""Requests that arrive when they arrive, whatever became of those before: through the engine alone, and through Triton.

Both ways give the same Arrivals (bench_streaming.py), one a request: when it was sent, when what arrived, how many
tokens each time. Arrival times are drawn from a seed, so both ways get the same load.
"""

from __future__ import annotations

import asyncio
import random
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import grpc.aio
from tritonclient.grpc import service_pb2

from nmoe_backend.types import FinishReason, Request, RequestError, SamplingParams, TokenLogprobs
from perf.bench_streaming import CONNECTIONS, STOP, Arrivals, read_stream, run_clients
from perf.results import spread

ANSWER_S = 600.0  # bound on one run


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One request of a load."""

    due_s: float  # after the start
    prompt_ids: tuple[int, ...]
    max_tokens: int


def all_at_once(count: int, prompt_len: int, max_tokens: int, vocab_size: int, seed: int = 0) -> list[Planned]:
    """`count` requests at the start; random prompts."""
    return planned([0.0] * count, prompt_len, max_tokens, vocab_size, seed)


def poisson(rate: float, seconds: float, seed: int = 0) -> list[float]:
    """Arrival times in [0, seconds) at `rate` a second on average; never none."""
    draw = random.Random(seed)
    times = [draw.expovariate(rate)]
    while times[-1] < seconds:
        times.append(times[-1] + draw.expovariate(rate))
    return times[:-1] or [0.0]


def planned(due: Sequence[float], prompt_len: int, max_tokens: int, vocab_size: int, seed: int = 0) -> list[Planned]:
    """Requests at these times with random prompts, without the first special ids."""
    draw = random.Random(seed + 1)
    return [
        Planned(
            due_s=due_s,
            prompt_ids=tuple(draw.randrange(8, vocab_size) for _ in range(prompt_len)),
            max_tokens=max_tokens,
        )
        for due_s in due
    ]


class _Sink:
    """A TokenSink that notes when each token came."""

    def __init__(self, sent_s: float) -> None:
        self.arrivals = Arrivals([], [], sent_s)
        self.done = threading.Event()
        self.error: RequestError | None = None

    def put(
        self, token_id: int, logprobs: TokenLogprobs | None = None, finish_reason: FinishReason | None = None
    ) -> None:
        self.arrivals.times.append(time.perf_counter())
        self.arrivals.counts.append(1)
        if finish_reason is not None:
            self.done.set()

    def put_prompt_logprobs(self, logprobs: list[TokenLogprobs]) -> None:
        raise AssertionError("prompt logprobs that nobody asked for")

    def put_embedding(self, embedding: list[float]) -> None:
        raise AssertionError("an embedding that nobody asked for")

    def close(self, finish_reason: FinishReason, error: RequestError | None = None) -> None:
        self.error = error or RequestError(f"ended early: {finish_reason}")
        self.done.set()


def run_engine(orchestrator: Any, load: Sequence[Planned]) -> list[Arrivals]:
    """In this process, greedy."""
    start_s = time.perf_counter()
    sinks = []
    for index, one in enumerate(load):
        time.sleep(max(0.0, start_s + one.due_s - time.perf_counter()))
        sampling = SamplingParams(temperature=0.0, max_tokens=one.max_tokens, ignore_eos=True)
        request = Request(
            request_id=index + 1, prompt_ids=one.prompt_ids, sampling=sampling, arrival_s=time.monotonic()
        )
        sinks.append(_Sink(time.perf_counter()))
        orchestrator.submit(request, sinks[-1])
    for sink in sinks:
        if not sink.done.wait(ANSWER_S):
            raise TimeoutError(f"a request did not end within {ANSWER_S:g} s")
        if sink.error is not None:
            raise sink.error
    return [sink.arrivals for sink in sinks]


def make_request(one: Planned) -> bytes:
    """Ids in; text and the token count out, streamed, one stop string."""
    request = service_pb2.ModelInferRequest(model_name="deepseek_v3")

    def add(name: str, datatype: str, raw: bytes, length: int = 1) -> None:
        request.inputs.add(name=name, datatype=datatype, shape=[1, length])
        request.raw_input_contents.append(raw)

    ids = one.prompt_ids
    add("input_ids", "INT32", struct.pack(f"<{len(ids)}i", *ids), len(ids))
    add("max_tokens", "INT32", struct.pack("<i", one.max_tokens))
    add("temperature", "FP32", struct.pack("<f", 0.0))
    add("stream", "BOOL", b"\1")
    add("ignore_eos", "BOOL", b"\1")
    add("stop_words", "BYTES", struct.pack("<I", len(STOP.encode())) + STOP.encode())
    for name in ("text_output", "num_output_tokens"):
        request.outputs.add(name=name)
    return request.SerializeToString()


async def _send_all(address: str, load: Sequence[tuple[float, bytes]]) -> list[Arrivals]:
    """One client process: each request at its time."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(CONNECTIONS)]
    start_s = time.perf_counter()

    async def one(index: int, due_s: float, request: bytes) -> Arrivals:
        await asyncio.sleep(max(0.0, start_s + due_s - time.perf_counter()))
        return await read_stream(channels[index % len(channels)], request)

    tasks = [one(index, due_s, request) for index, (due_s, request) in enumerate(load)]
    arrivals = await asyncio.gather(*tasks)
    for channel in channels:
        await channel.close()
    return arrivals


def run_server(address: str, load: Sequence[Planned], clients: int = 2) -> list[Arrivals]:
    """Over gRPC, from client processes that share the load in turn."""
    requests = [(one.due_s, make_request(one)) for one in load]
    works = [partial(_send_all, address, requests[share::clients]) for share in range(clients)]
    arrivals, _ = run_clients([work for work in works if work.args[1]], lambda pids: None)
    short = [sum(one.counts) for one in arrivals if sum(one.counts) != load[0].max_tokens]
    if short:
        raise RuntimeError(f"{len(short)} streams got {sorted(set(short))} tokens instead of {load[0].max_tokens}")
    return arrivals


def latencies(arrivals: Sequence[Arrivals]) -> dict[str, Any]:
    """Time to the first token, gaps between chunks, and tokens a second from the first request to the last token."""
    first = [1e3 * (one.times[0] - one.sent_s) for one in arrivals]
    gaps = [1e3 * (after - before) for one in arrivals for before, after in pairwise(one.times)]
    tokens = sum(sum(one.counts) for one in arrivals)
    took_s = max(one.times[-1] for one in arrivals) - min(one.sent_s for one in arrivals)
    return {
        "requests": len(arrivals),
        "ttft_ms": _rounded(spread(first)),
        "itl_ms": _rounded(spread(gaps)),
        "tok_s": round(tokens / took_s, 1),
        "mean_chunk": round(tokens / sum(len(one.counts) for one in arrivals), 3),
    }


def steady(arrivals: Sequence[Arrivals]) -> dict[str, Any]:
    """Rate and gaps while all streams run: between the last first token and the first last one. ValueError if never."""
    start_s = max(one.times[0] for one in arrivals)
    end_s = min(one.times[-1] for one in arrivals)
    if end_s <= start_s:
        raise ValueError(
            f"the {len(arrivals)} streams never ran all at once: the last began {start_s - end_s:.2f} s after the "
            "first had ended. Ask for more tokens."
        )
    chunks = [pair for one in arrivals for pair in zip(one.times, one.counts, strict=True)]
    tokens = sum(count for time_s, count in chunks if start_s < time_s <= end_s)
    gaps = [
        1e3 * (after - before)
        for one in arrivals
        for before, after in pairwise(one.times)
        if start_s <= before and after <= end_s
    ]
    inside = [count for time_s, count in chunks if start_s < time_s <= end_s]
    return {
        "streams": len(arrivals),
        "window_s": round(end_s - start_s, 2),
        "tok_s": round(tokens / (end_s - start_s), 1),
        "itl_ms": _rounded(spread(gaps)),
        "mean_chunk": round(tokens / len(inside), 3),
    }


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in values.items()}
