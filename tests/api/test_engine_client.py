"""engine_client.py against a Triton that answers from a script, over real gRPC: how often it lets the engine answer,
and how streams end."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc
import grpc.aio
import pytest
from tritonclient.grpc import service_pb2

from nmoe_backend.api.engine_client import EngineClient
from nmoe_backend.api.errors import ApiError


class ScriptedTriton:
    """Answers a generation with one response, the final one as soon as `release` is set, and ends it with `end`; or
    with an error within a response, `refusal`."""

    def __init__(self, refusal: str = "") -> None:
        self.refusal = refusal
        self.intervals_ms: list[int] = []
        self.release, self.end = asyncio.Event(), asyncio.Event()
        self.end.set()
        self.ended: list[str] = []  # how

    async def stream(self, requests: AsyncIterator[bytes], _context: object) -> AsyncIterator[bytes]:
        async for raw in requests:
            request = service_pb2.ModelInferRequest.FromString(raw)
            names = [tensor.name for tensor in request.inputs]
            (interval_ms,) = struct.unpack("<I", request.raw_input_contents[names.index("min_response_interval_ms")])
            self.intervals_ms.append(interval_ms)
            try:
                if self.refusal:
                    yield bytes(service_pb2.ModelStreamInferResponse(error_message=self.refusal).SerializeToString())
                else:
                    yield answer("")
                    await self.release.wait()
                    yield answer("stop")
                await self.end.wait()
            except asyncio.CancelledError:
                self.ended.append("cancelled")
                raise
            self.ended.append("whole")


def answer(finish_reason: str) -> bytes:
    """A ModelStreamInferResponse."""
    message = service_pb2.ModelStreamInferResponse()
    message.infer_response.outputs.add(name="finish_reason", datatype="BYTES", shape=[1, 1])
    raw = finish_reason.encode()
    message.infer_response.raw_output_contents.append(struct.pack("<I", len(raw)) + raw)
    return bytes(message.SerializeToString())


async def started(triton: ScriptedTriton) -> tuple[grpc.aio.Server, EngineClient]:
    """On a free port."""
    server = grpc.aio.server()
    method = grpc.stream_stream_rpc_method_handler(triton.stream)
    service = {"ModelStreamInfer": method}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("inference.GRPCInferenceService", service)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, EngineClient(f"127.0.0.1:{port}")


async def run(num_streams: int) -> list[int]:
    """What so many streams ask for that begin one after the other, and then, when they have ended, one more."""
    triton = ScriptedTriton()
    server, engine = await started(triton)
    inputs = {"input_ids": [1], "stream": True}
    streams = [engine.generate(inputs, ("finish_reason",), str(index), 60.0) for index in range(num_streams)]
    for stream in streams:
        await anext(stream)
    await streams.pop(0).aclose()  # a client that left
    triton.release.set()
    for stream in streams:
        assert [delta.finish_reason async for delta in stream] == ["stop"]
    async with aclosing(engine.generate(inputs, ("finish_reason",), "last", 60.0)) as last:
        assert [delta.finish_reason async for delta in last] == ["", "stop"]
    await engine.close()
    await server.stop(None)
    return triton.intervals_ms


def test_the_more_streams_live_the_longer_a_new_one_waits_between_its_responses() -> None:
    *intervals_ms, last = asyncio.run(run(100))
    assert intervals_ms == sorted(intervals_ms)
    assert intervals_ms[0] == 0 and max(intervals_ms[:50]) < 20, "few streams: less than a decode step"
    assert 1000 / intervals_ms[99] * 100 < 2600, "a hundred streams: so many responses a second in all"
    assert last == 0


def test_a_stream_is_cancelled_before_its_last_response_and_never_behind_it() -> None:
    """A cancellation that meets the last response leaks the request in this Triton's gRPC front end."""

    async def run() -> list[str]:
        triton = ScriptedTriton()
        server, engine = await started(triton)
        triton.end.clear()
        left, whole = (
            engine.generate({"input_ids": [1]}, ("finish_reason",), name, 60.0) for name in ("left", "whole")
        )
        await anext(left)
        await left.aclose()
        while not triton.ended:
            await asyncio.sleep(0)
        triton.release.set()
        async with aclosing(whole):
            assert [delta.finish_reason async for delta in whole] == ["", "stop"], "whole without the server's end"
        assert triton.ended == ["cancelled"]
        closing = asyncio.create_task(engine.close())
        for _ in range(200):  # turns of the event loop, in which a cancellation would get there
            await asyncio.sleep(0)
        triton.end.set()
        await closing
        await server.stop(5)
        return triton.ended

    assert asyncio.run(run()) == ["cancelled", "whole"]


def test_an_error_within_a_response_has_its_status_and_is_no_cancellation() -> None:
    async def run() -> tuple[ApiError, list[str]]:
        triton = ScriptedTriton("overloaded: 160 requests wait already")
        server, engine = await started(triton)
        with pytest.raises(ApiError) as refused:
            await anext(engine.generate({"input_ids": [1]}, ("finish_reason",), "refused", 60.0))
        await engine.close()
        await server.stop(5)
        return refused.value, triton.ended

    error, ended = asyncio.run(run())
    assert (error.status, error.message) == (429, "160 requests wait already")
    assert ended == ["whole"]


def test_a_proxy_that_the_environment_names_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("no_proxy", raising=False)
    assert asyncio.run(run(1)) == [0, 0]
