"""Gate: how requests end when something goes wrong or away: clients, time, room, the server, the engine behind it.

The engine runs on scripted ranks that take 20 ms a step, two slots and a queue of four, so that everything lasts long
enough to be interrupted. `max_tokens` of LONG would take 40 s.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIError, APITimeoutError, InternalServerError, OpenAI, RateLimitError

from perf.scripted import benchmark_table, write_repository
from tests.api.live import MODEL, async_client, write_api_config
from tests.front_end import FrontEnd
from tests.triton_server import TritonServer
from tests.waiting import wait_until

LONG: dict[str, Any] = {"model": MODEL, "prompt": "hello", "max_tokens": 2000, "extra_body": {"ignore_eos": True}}
CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 2000,
    "extra_body": {"ignore_eos": True},
}
WITHIN_S = 10.0


@contextmanager
def scripted(folder: Path, checkpoint: Path, openai: str = "drain_s = 20.0") -> Iterator[tuple[TritonServer, Path]]:
    """A Triton on scripted ranks, and the TOML for front ends before it."""
    config = write_api_config(
        folder / "scripted.toml", checkpoint, openai, gpus=[0, 1], max_batch_size=1, max_queue_size=4, max_seq_len=4096
    )
    config.write_text(config.read_text() + benchmark_table({"step_ms": 20}))
    with TritonServer(config, write_repository(folder)) as server:
        yield server, config


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory, api_checkpoint: Path) -> Iterator[tuple[TritonServer, Path]]:
    with scripted(tmp_path_factory.mktemp("slow"), api_checkpoint) as both:
        yield both


@pytest.fixture(scope="module")
def slow_api(slow: tuple[TritonServer, Path]) -> Iterator[FrontEnd]:
    with FrontEnd(slow[1], slow[0].grpc) as server:
        yield server


@pytest.fixture
def triton(slow: tuple[TritonServer, Path]) -> Iterator[TritonServer]:
    """Idle before a test, and behind it: nothing that a test began still runs."""
    yield slow[0]
    wait_for(slow[0], running=0, waiting=0)
    assert slow[0].metric("nmoe_kv_cache_utilization_percent") == 0.0


@pytest.fixture
def sdk(slow_api: FrontEnd) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{slow_api.url}/v1", api_key="none", max_retries=0, timeout=60.0) as client:
        yield client


def wait_for(server: TritonServer, running: int, waiting: int) -> None:
    """The engine's own counts, well before LONG would be over."""

    def holds() -> bool:
        return (server.metric("nmoe_requests_running"), server.metric("nmoe_requests_waiting")) == (running, waiting)

    wait_until(holds, f"{running} running and {waiting} waiting", WITHIN_S)


@contextmanager
def busy(sdk: OpenAI, server: TritonServer, waiting: int = 0) -> Iterator[None]:
    """Both slots are taken, and so many more wait; all of them are left at the end."""
    streams = [sdk.completions.create(stream=True, **LONG) for _ in range(2)]
    for stream in streams:
        next(iter(stream))
    with ThreadPoolExecutor(max(1, waiting)) as pool:
        futures = [pool.submit(first_chunk, sdk) for _ in range(waiting)]
        wait_for(server, 2, waiting)
        try:
            yield
        finally:
            for stream in streams:
                stream.close()
            for future in futures:
                future.result(30)


def first_chunk(sdk: OpenAI) -> None:
    """Wait for a first token, and leave."""
    with sdk.completions.create(stream=True, **LONG) as stream:
        next(iter(stream))


@pytest.mark.parametrize("fields", [LONG, {**LONG, "n": 2}], ids=["one choice", "two choices"])
def test_a_client_that_leaves_a_stream_cancels_its_generations(
    sdk: OpenAI, triton: TritonServer, fields: dict[str, Any]
) -> None:
    with sdk.completions.create(stream=True, **fields) as stream:
        next(iter(stream))
        wait_for(triton, fields.get("n", 1), 0)
    wait_for(triton, 0, 0)
    with sdk.chat.completions.create(stream=True, **CHAT) as stream:
        next(iter(stream))
    wait_for(triton, 0, 0)


def test_a_client_that_leaves_while_a_whole_answer_is_made_cancels_it(sdk: OpenAI, triton: TritonServer) -> None:
    for create, fields in ((sdk.completions.create, LONG), (sdk.chat.completions.create, CHAT)):
        with ThreadPoolExecutor(1) as pool:
            future: Future[Any] = pool.submit(create, timeout=1.5, **fields)
            wait_for(triton, 1, 0)
            with pytest.raises(APITimeoutError):
                future.result(30)
        wait_for(triton, 0, 0)


def test_a_client_that_leaves_before_the_first_token_leaves_the_queue(sdk: OpenAI, triton: TritonServer) -> None:
    with busy(sdk, triton):
        for stream in (True, False):
            with ThreadPoolExecutor(1) as pool:
                future: Future[Any] = pool.submit(sdk.completions.create, timeout=1.5, stream=stream, **LONG)
                wait_for(triton, 2, 1)
                with pytest.raises(APITimeoutError):
                    future.result(30)
            wait_for(triton, 2, 0)


def test_an_async_task_that_is_cancelled_cancels_its_generation(slow_api: FrontEnd, triton: TritonServer) -> None:
    async def ask() -> None:
        async with async_client(slow_api) as client:
            tasks = [asyncio.create_task(client.completions.create(**LONG)) for _ in range(2)]
            await asyncio.to_thread(wait_for, triton, 2, 0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.to_thread(wait_for, triton, 0, 0)

    asyncio.run(ask())


def test_a_full_queue_is_429_with_retry_after(sdk: OpenAI, triton: TritonServer) -> None:
    with busy(sdk, triton, waiting=4):
        for stream in (False, True):
            with pytest.raises(RateLimitError) as caught:
                sdk.completions.create(stream=stream, **LONG)
            assert caught.value.type == "rate_limit_error"
            assert int(caught.value.response.headers["retry-after"]) >= 1
            assert "max_queue_size=4" in caught.value.message


def test_refusals_that_cancel_what_began_beside_them_do_not_hurt_the_server(
    tmp_path: Path, api_checkpoint: Path
) -> None:
    """Server 2.51 crashes or hangs within fifty such requests where errors are asked for as a stream's status."""
    with scripted(tmp_path, api_checkpoint) as (server, config), FrontEnd(config, server.grpc) as front:
        with OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0, timeout=60.0) as client:
            for _ in range(100):
                with pytest.raises(RateLimitError):
                    client.completions.create(model=MODEL, prompt=["hello"] * 16, max_tokens=1)
            assert server.process.exit_code() is None
            wait_for(server, running=0, waiting=0)
            patient = client.with_options(max_retries=5)  # the counts are a quarter of a second old
            assert patient.completions.create(model=MODEL, prompt="hello", max_tokens=1).usage
        server.process.kill()  # it would wait half a minute for requests that it leaked when they were cancelled


def test_the_request_s_own_time_limit_is_504_or_an_error_event(sdk: OpenAI, triton: TritonServer) -> None:
    hasty = {**LONG, "extra_body": {"ignore_eos": True, "timeout": 0.5}}
    with pytest.raises(InternalServerError) as whole:
        sdk.completions.create(**hasty)
    assert whole.value.status_code == 504 and whole.value.type == "timeout_error"
    texts = []
    with pytest.raises(APIError) as streamed:
        for chunk in sdk.completions.create(stream=True, **hasty):
            texts.append(chunk.choices[0].text)
    assert streamed.value.type == "timeout_error" and len(texts) > 3


def test_priority_decides_who_waits(sdk: OpenAI, triton: TritonServer) -> None:
    order: list[int] = []

    def ask(priority: int) -> None:
        fields = {**LONG, "max_tokens": 10, "extra_body": {"ignore_eos": True, "priority": priority}}
        with sdk.completions.create(stream=True, **fields) as stream:
            next(iter(stream))
            order.append(priority)
            list(stream)

    with ThreadPoolExecutor(4) as pool:
        with busy(sdk, triton):
            futures = [pool.submit(ask, priority) for priority in (1, 2, 3, 4)]
            wait_for(triton, 2, 4)
        for future in futures:
            future.result(30)
    assert set(order[:2]) == {3, 4}


def _chunks(url: str, texts: list[str], max_tokens: int) -> tuple[str | None, str]:
    """(finish reason, last line) of a stream read as bare lines."""
    reason, last = None, ""
    body = {"model": MODEL, "prompt": "hello", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60, trust_env=False) as answer:
        for line in answer.iter_lines():
            last = line or last
            if line.startswith("data: {") and "choices" in line:
                choice = json.loads(line.removeprefix("data: "))["choices"][0]
                texts.append(choice["text"])
                reason = choice["finish_reason"] or reason
    return reason, last


def test_sigterm_lets_running_answers_finish(slow: tuple[TritonServer, Path], triton: TritonServer) -> None:
    with FrontEnd(slow[1], triton.grpc) as server, ThreadPoolExecutor(1) as pool:
        texts: list[str] = []
        future = pool.submit(_chunks, server.url, texts, 100)
        wait_until(lambda: len(texts) > 3, "a stream has begun", WITHIN_S)
        server.terminate()

        def refuses() -> bool:
            try:
                return httpx.get(f"{server.url}/health", trust_env=False).status_code != 200
            except httpx.TransportError:
                return True

        wait_until(refuses, "no new connections", WITHIN_S)
        assert not future.done()
        assert future.result(30) == ("length", "data: [DONE]")
        wait_until(lambda: server.process.exit_code() is not None, "the front end has ended", WITHIN_S)
        assert server.process.exit_code() == 0
        assert not [line for line in server.lines if "Traceback" in line or '"level": "error"' in line]


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_cancels_what_is_not_done_in_time(
    slow: tuple[TritonServer, Path], triton: TritonServer, tmp_path: Path, workers: int
) -> None:
    config = tmp_path / "hasty.toml"
    config.write_text(slow[1].read_text().replace("drain_s = 20.0", f"drain_s = 1.0\nworkers = {workers}"))
    with FrontEnd(config, triton.grpc) as server, ThreadPoolExecutor(2) as pool:
        texts: list[str] = []
        streamed = pool.submit(_chunks, server.url, texts, 2000)
        body = {"model": MODEL, "prompt": "hello", "max_tokens": 2000, "ignore_eos": True}
        whole = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=60, trust_env=False)
        wait_until(lambda: len(texts) > 3, "a stream has begun", WITHIN_S)
        wait_for(triton, running=2, waiting=0)
        server.terminate()
        wait_until(lambda: server.process.exit_code() is not None, "the front end has ended", WITHIN_S)
        assert server.process.exit_code() == 0
        reason, last = streamed.result(30)
        assert reason is None
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "service_unavailable_error"
        assert whole.result(30).status_code == 503 and "retry-after" in whole.result().headers
        assert whole.result().json()["error"]["type"] == "service_unavailable_error"
        assert not [line for line in server.lines if "Traceback" in line]
        endings = [json.loads(line) for line in server.lines if '"latency_s"' in line and "completions" in line]
        assert sorted((one["event"], one["status"]) for one in endings) == [("cancelled", 499), ("refused", 503)]
    wait_for(triton, 0, 0)


def test_an_engine_that_goes_away_is_an_error_event_and_then_503(tmp_path: Path, api_checkpoint: Path) -> None:
    with scripted(tmp_path, api_checkpoint) as (server, config), FrontEnd(config, server.grpc) as front:
        with ThreadPoolExecutor(1) as pool:
            texts: list[str] = []
            future = pool.submit(_chunks, front.url, texts, 2000)
            wait_until(lambda: len(texts) > 3, "a stream has begun", WITHIN_S)
            server.process.kill()
            reason, last = future.result(30)
        assert reason is None
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["type"] == "service_unavailable_error"
        with OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0, timeout=30.0) as client:
            for stream in (False, True):
                with pytest.raises(InternalServerError) as caught:
                    client.completions.create(stream=stream, **LONG)
                assert caught.value.status_code == 503
                assert int(caught.value.response.headers["retry-after"]) >= 1
        ready = httpx.get(f"{front.url}/ready", trust_env=False, timeout=30.0)
        assert ready.status_code == 503 and ready.json()["error"]["type"] == "service_unavailable_error"
        assert httpx.get(f"{front.url}/health", trust_env=False).status_code == 200
        assert httpx.get(f"{front.url}/v1/models", trust_env=False).status_code == 200
