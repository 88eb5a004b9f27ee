"""How answers end when somebody does not play along: slow readers, clients that left, bugs, killed workers."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import orjson
import pytest
from starlette.types import Message, Receive, Scope, Send

from nmoe_backend.api import http
from nmoe_backend.api.engine_client import EngineClient
from nmoe_backend.api.errors import ApiError
from nmoe_backend.api.gate import Gate
from nmoe_backend.api.http import EventStream
from nmoe_backend.api.metrics import ApiMetrics
from nmoe_backend.openai_config import OpenAIConfig
from tests.api import in_process
from tests.api.fake_engine import FakeEngine, deltas
from tests.api.test_engine_client import ScriptedTriton
from tests.triton_server import free_ports


class Client:
    """The far end of one request. It reads `reads` events and then stops, or leaves after them."""

    def __init__(self, reads: int, leaves: bool = False) -> None:
        self.received: list[Message] = []
        self._reads, self._leaves = reads, leaves
        self._left = asyncio.Event()

    async def receive(self) -> Message:
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if len(self.received) > self._reads:
            if self._leaves:
                self._left.set()
            await asyncio.Event().wait()  # its window is full
        self.received.append(message)


async def numbers() -> AsyncIterator[bytes]:
    for number in range(1000):
        yield b"data: %d\n\n" % number


def served(client: Client, monkeypatch: pytest.MonkeyPatch) -> tuple[bool, str]:
    """(whether the stream was closed, what the metrics say) after a stream of a request with no time at all."""
    monkeypatch.setattr(http, "SLOW_READER_S", 0.2)
    metrics, closed = ApiMetrics(), asyncio.Event()

    async def close() -> None:
        closed.set()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await EventStream(numbers(), close, 0.0)(scope, receive, send)

    async def run() -> None:
        scope: dict[str, Any] = {"type": "http", "method": "GET", "path": "/health", "headers": []}
        async with asyncio.timeout(10.0):
            await Gate(app, OpenAIConfig(), metrics)(scope, client.receive, client.send)

    asyncio.run(run())
    return closed.is_set(), metrics.text().decode()


@pytest.mark.parametrize("leaves", [False, True])
def test_a_client_that_stops_reading_or_leaves_is_ended_and_counted_as_gone(
    leaves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, metrics = served(Client(reads=3, leaves=leaves), monkeypatch)
    assert closed and 'status="499"} 1.0' in metrics and 'status="200"' not in metrics


def test_a_client_that_reads_gets_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(reads=10_000)
    closed, metrics = served(client, monkeypatch)
    assert closed and 'status="200"} 1.0' in metrics
    assert b"".join(message.get("body", b"") for message in client.received).count(b"data:") == 1000


@pytest.mark.parametrize("moment", ["at once", "while it works", "as it ends"])
def test_work_ends_with_its_client_whenever_that_leaves(moment: str) -> None:
    """And what the task does afterwards is not disturbed."""

    async def run() -> list[str]:
        left, log = asyncio.Event(), []

        async def receive() -> Message:
            await left.wait()
            return {"type": "http.disconnect"}

        async def work() -> str:
            try:
                if moment == "at once":
                    left.set()
                await asyncio.sleep(0.01)
                left.set()
                if moment != "as it ends":
                    await asyncio.Event().wait()
                return "done"
            finally:
                log.append("closed")

        try:
            log.append(await http.unless_gone(receive, work()))
        except http.ClientGone:
            log.append("gone")
        await asyncio.sleep(0.01)
        task = asyncio.current_task()
        assert task is not None and not task.cancelling()
        return log

    assert asyncio.run(run()) == ["closed", "done" if moment == "as it ends" else "gone"]


def test_who_waits_is_cancelled_with_its_work_and_not_told_that_the_client_left() -> None:
    async def run() -> None:
        async def receive() -> Message:
            return await asyncio.Future()

        waiting = asyncio.create_task(http.unless_gone(receive, asyncio.sleep(60)))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(run())


PROMPTS: dict[str, Any] = {
    "chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "completions": {"prompt": "x"},
}


@pytest.mark.parametrize("path", PROMPTS)
def test_the_beginning_and_the_end_of_a_stream_leave_with_its_text(tmp_path: Path, path: str) -> None:
    service = in_process.make_service(tmp_path)
    client = Client(reads=100)
    body = {"model": in_process.MODEL, "stream": True, "stream_options": {"include_usage": True}, **PROMPTS[path]}
    messages = [{"type": "http.request", "body": orjson.dumps(body), "more_body": False}]

    async def receive() -> Message:
        return messages.pop() if messages else await asyncio.Future()

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": f"/v1/{path}", "headers": headers, "query_string": b""}
    asyncio.run(in_process.application(service, FakeEngine(deltas("a", "b", "c")))(scope, receive, client.send))
    first, second, third, end = (message["body"] for message in client.received[1:])
    for text, event in (("a", first), ("b", second), ("c", third)):
        assert f'"{text}"'.encode() in event
    assert third.endswith(b"data: [DONE]\n\n") and b'"cached_tokens":3}' in third and end == b""


@pytest.mark.parametrize("whole", [True, False])
def test_a_bug_resets_the_connection_only_where_no_whole_answer_left(whole: bool) -> None:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"sorry", "more_body": not whole})
        raise RuntimeError("a bug")

    client = Client(reads=10)
    scope: dict[str, Any] = {"type": "http", "method": "GET", "path": "/health", "headers": []}
    answering = Gate(app, OpenAIConfig(), ApiMetrics())(scope, client.receive, client.send)
    if whole:
        asyncio.run(answering)
    else:
        with pytest.raises(RuntimeError, match="a bug"):
            asyncio.run(answering)


def test_time_that_is_over_is_not_tried_again() -> None:
    assert ApiError(504, "late").headers() == {"x-should-retry": "false"}  # the SDK reads it
    assert "Retry-After" in ApiError(429, "full").headers()


_KILLED = """
import os, pathlib, sys
from nmoe_backend.api.metrics import ApiMetrics
folder = pathlib.Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])
metrics = ApiMetrics(folder)
if sys.argv[1] == "dies":
    metrics.begun()
    metrics.ended("/health", 200, 0.1)
    metrics.begun()
    os._exit(9)
metrics.begun()
print(metrics.text().decode())
"""


def test_requests_of_a_killed_worker_are_not_live_any_more_but_stay_counted(tmp_path: Path) -> None:
    def worker(how: str) -> str:
        environment = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", _KILLED, how]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout

    worker("dies")
    shown = worker("lives")
    assert "nmoe_api_requests_live 1.0" in shown
    assert 'nmoe_api_requests_total{endpoint="/health",status="200"} 1.0' in shown


def test_a_server_that_comes_back_is_reached_within_seconds() -> None:
    async def run() -> float:
        (port,) = free_ports(1)
        engine = EngineClient(f"127.0.0.1:{port}")
        clock = asyncio.get_running_loop().time
        down_until = clock() + 5.5
        while clock() < down_until:  # long enough for the default back-off to have grown beyond a second or two
            with pytest.raises(ApiError):
                await anext(engine.generate({"input_ids": [1]}, ("finish_reason",), "1", 60.0))
            await asyncio.sleep(0.05)
        triton, server = ScriptedTriton(), grpc.aio.server()
        method = grpc.stream_stream_rpc_method_handler(triton.stream)
        handlers = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ModelStreamInfer": method})
        server.add_generic_rpc_handlers([handlers])
        server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        began_s = clock()
        while True:
            stream = engine.generate({"input_ids": [1]}, ("finish_reason",), "1", 60.0)
            try:
                await anext(stream)
                break
            except ApiError:
                await asyncio.sleep(0.02)
        took_s = clock() - began_s
        await stream.aclose()
        await engine.close()
        await server.stop(0)
        return took_s

    assert asyncio.run(run()) < 2.5
