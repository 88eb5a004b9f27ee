"""Clients that misbehave harm nobody else, and what they held comes back. A wall clock that jumps moves no deadline."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from perf.scripted import ROOT
from tests.faults.serve import Serve
from tests.waiting import wait_until


@contextmanager
def silent_reader(port: int, path: str, body: dict[str, object]) -> Iterator[None]:
    """Asks over HTTP and reads nothing; its own buffer is as small as the system allows."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(("127.0.0.1", port))
        connection.sendall(head.encode() + data)
        yield


def test_clients_that_never_read_delay_nobody(serve: Serve) -> None:
    prompt = serve.prompt(7)
    openai = {"model": "tiny", "prompt": prompt, "max_tokens": 4000, "ignore_eos": True, "stream": True}
    triton = {"input_ids": prompt, "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with (
        silent_reader(serve.ports["openai_port"], "/v1/completions", openai),
        silent_reader(serve.ports["http_port"], "/v2/models/deepseek_v3/generate_stream", triton),
    ):
        wait_until(lambda: serve.metric("nmoe_requests_running") == 2, "both run")
        began_s = time.monotonic()
        for ask in (serve.ask_grpc, serve.ask_openai):
            outcome = ask(serve.prompt(8), 100)
            assert outcome.is_right and not outcome.error, outcome
        assert time.monotonic() - began_s < 10.0  # 2 s of steps
        wait_until(lambda: serve.metric("nmoe_requests_running") == 2, "the silent ones still run")
    serve.assert_idle()  # they have gone: nothing runs to its 4,000 tokens


VANISHING = """
import asyncio, sys
import grpc.aio, httpx
from nmoe_backend.api.engine_client import encode_request

grpc_address, openai, count = sys.argv[1], sys.argv[2], int(sys.argv[3])

async def direct(channels, index):
    call = channels[index % 4].stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")()
    inputs = {"input_ids": [5, 6, 7], "max_tokens": 4000, "ignore_eos": True, "stream": True}
    await call.write(encode_request(inputs, (), ""))
    while await call.read() is not grpc.aio.EOF:
        pass

async def through(client):
    body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 4000, "ignore_eos": True, "stream": True}
    async with client.stream("POST", openai + "/v1/completions", json=body) as answer:
        async for _ in answer.aiter_bytes():
            pass

async def main():
    channels = [grpc.aio.insecure_channel(grpc_address) for _ in range(4)]
    limits = httpx.Limits(max_connections=count)
    async with httpx.AsyncClient(timeout=600, limits=limits, trust_env=False) as client:
        half = count // 2
        asks = [*(direct(channels, index) for index in range(half)), *(through(client) for _ in range(half))]
        await asyncio.gather(*asks, return_exceptions=True)  # some are refused where the queue is full

asyncio.run(main())
"""


@contextmanager
def many_streams(serve: Serve, count: int) -> Iterator[None]:
    """A process with so many streams, half of them over each face; it is killed at the end."""
    url = f"http://127.0.0.1:{serve.ports['openai_port']}"
    client = subprocess.Popen([sys.executable, "-c", VANISHING, serve.grpc, url, str(count)], cwd=ROOT)
    try:
        yield
    finally:
        os.kill(client.pid, signal.SIGKILL)
        client.wait()


def live(serve: Serve) -> float:
    """Requests that run or wait."""
    return serve.metric("nmoe_requests_running") + serve.metric("nmoe_requests_waiting")


def assert_a_bystander_is_right(serve: Serve, count: int) -> None:
    """One that asks while the others are there, and gets its answer when they have vanished."""
    with ThreadPoolExecutor(1) as pool:
        with many_streams(serve, count):
            wait_until(lambda: live(serve) == count, f"{count} streams live", limit_s=120.0)
            bystander = pool.submit(serve.ask_grpc, serve.prompt(1), 20, priority=1)
        outcome = bystander.result(timeout=60)
    assert outcome.is_right and not outcome.error, outcome
    serve.assert_idle()


def test_a_client_that_opens_100_streams_and_vanishes_gives_everything_back(serve: Serve) -> None:
    assert_a_bystander_is_right(serve, 100)


@pytest.mark.slow
def test_a_client_that_opens_1000_streams_and_vanishes_gives_everything_back(model_path: Path, tmp_path: Path) -> None:
    with Serve(tmp_path, model_path, max_queue_size=1000) as serve:
        assert_a_bystander_is_right(serve, 1000)
        serve.assert_serves()


def test_a_full_queue_refuses_at_once_and_disturbs_nobody(serve: Serve) -> None:
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(serve.ask_grpc, serve.prompt(2), 300)
        wait_until(lambda: live(serve) == 1, "the early one runs")
        with many_streams(serve, 200):  # 64 slots and a queue of 100
            wait_until(lambda: live(serve) >= 164, "all is full")
            began_s = time.monotonic()
            direct, through = serve.ask_grpc(serve.prompt(3), 20), serve.ask_openai(serve.prompt(3), 20)
            assert "max_queue_size=100" in direct.error and direct.num_pieces == 0, direct
            assert through.error.startswith("429 ") and "max_queue_size=100" in through.error, through
            assert time.monotonic() - began_s < 5.0
        outcome = early.result(timeout=60)
    assert outcome.is_right and not outcome.error, outcome
    serve.assert_idle()


def test_a_wall_clock_that_jumps_a_day_moves_no_deadline(serve: Serve) -> None:
    before = serve.children()
    with ThreadPoolExecutor(2) as pool:
        asks = [
            pool.submit(serve.ask_grpc, serve.prompt(4), 200, deadline_ms=30_000),
            pool.submit(serve.ask_openai, serve.prompt(5), 200, timeout=30),
        ]
        wait_until(lambda: live(serve) == 2, "both run")
        serve.inject("clock jumps")
        outcomes = [future.result(timeout=60) for future in asks]
    assert all(outcome.is_right and not outcome.error for outcome in outcomes), outcomes
    began_s = time.monotonic()
    late = serve.ask_grpc(serve.prompt(6), 3000, deadline_ms=1000)
    assert late.is_right and "deadline" in late.error and late.num_pieces > 0, late
    assert 0.9 < late.ended_s - began_s < 5.0
    assert serve.children() == before
