"""Many streams at once: exactly the tokens of the engine alone, in order, each once; who leaves leaves nothing."""

from __future__ import annotations

import json
import random
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from nmoe_backend.config import ServeConfig
from nmoe_backend.orchestrator import Orchestrator
from nmoe_backend.text import Text
from nmoe_backend.types import SamplingParams
from perf.scripted import benchmark_table, write_repository
from tests.generation import Collected, engine_of, request_of, tokens
from tests.server.client import Stream
from tests.server.metrics import settled
from tests.triton_server import TritonServer, write_config
from tests.waiting import wait_until

NUM_STREAMS = 64


@pytest.fixture(scope="module")
def offline(config_path: Path) -> Iterator[Orchestrator]:
    """The same engine in this process, without Triton."""
    threads = torch.get_num_threads()
    with engine_of(ServeConfig.from_toml(config_path)) as orchestrator:
        yield orchestrator
    torch.set_num_threads(threads)


def test_64_concurrent_streams_get_exactly_the_offline_tokens(
    triton: TritonServer, offline: Orchestrator, model_path: Path
) -> None:
    rng = random.Random(1)
    text = Text(model_path)
    prompts = [tuple(rng.randrange(3, 900) for _ in range(rng.randrange(1, 120))) for _ in range(NUM_STREAMS)]
    lengths = [rng.randrange(1, 60) for _ in range(NUM_STREAMS)]
    temperatures = [rng.choice([0.0, 1.0]) for _ in range(NUM_STREAMS)]
    # Batches differ between both runs, and so do last bits: none of these seeds draws that close to a boundary.
    seeds = range(1000, 1000 + NUM_STREAMS)

    def by_engine() -> list[list[int]]:
        sinks = [Collected() for _ in prompts]
        for index, sink in enumerate(sinks):
            sampling = SamplingParams(max_tokens=lengths[index], temperature=temperatures[index], seed=seeds[index])
            offline.submit(request_of(prompts[index], sampling), sink)
        return tokens(sink.result() for sink in sinks)

    def by_server(index: int) -> None:
        model = ("deepseek_v3", "ensemble")[index % 2]
        with Stream(triton.grpc) as stream:
            answer = stream.ask(
                {
                    "input_ids": list(prompts[index]),
                    "max_tokens": lengths[index],
                    "temperature": temperatures[index],
                    "seed": seeds[index],
                    "stream": True,
                },
                model,
            )
            assert stream.pending() == 0
        assert answer.error == ""
        assert answer.ids == expected[index]
        assert [response.final for response in answer.responses] == [False] * (len(answer.responses) - 1) + [True]
        ends_by_id = answer.responses[-1].values["finish_reason"] == "stop"
        assert answer.text == text.decode(expected[index][: -1 if ends_by_id else None])

    expected = by_engine()
    assert len({tuple(ids) for ids in expected}) > NUM_STREAMS // 2, "the model always says the same"
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        list(pool.map(by_server, range(NUM_STREAMS)))


def test_random_text_arrives_as_whole_characters(triton: TritonServer, model_path: Path) -> None:
    text = Text(model_path)
    body = {"text_input": "x", "max_tokens": 200, "temperature": 8.0, "ignore_eos": True, "stream": True, "seed": 3}
    with Stream(triton.grpc) as stream:
        answer = stream.ask(body)  # every chunk is decoded as strict UTF-8 on the way
    assert "\ufffd" in answer.text, "the draw held no broken character: raise the temperature"
    assert answer.text == text.decode(answer.ids)
    assert len({len(response.values["text_output"]) for response in answer.responses}) > 2


def test_a_client_that_disconnects_frees_its_pages_within_a_second(triton: TritonServer) -> None:
    def pages() -> float:
        return triton.metric("nmoe_kv_cache_utilization_percent")

    before = triton.metric("nmoe_request_errors_total", kind="cancelled")
    streams = [Stream(triton.grpc).__enter__() for _ in range(4)]
    for stream in streams:
        prompt = list(range(3, 103))
        stream.send({"input_ids": prompt, "max_tokens": 900, "temperature": 0.0, "ignore_eos": True, "stream": True})
    for stream in streams:
        assert not isinstance(stream.read(), str)
    wait_until(lambda: pages() > 0, "pages are taken")
    for stream in streams:
        stream.disconnect()
    wait_until(lambda: pages() == 0, "all pages are free", 1.0)
    settled(triton, {"nmoe_request_errors_total{cancelled}": before + 4, "nmoe_requests_running": 0.0})


def test_an_http_stream_that_disconnects_frees_its_pages_within_a_second(triton: TritonServer) -> None:
    body = {"input_ids": list(range(3, 103)), "max_tokens": 900, "temperature": 0.0, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(
        f"http://{triton.http}/v2/models/deepseek_v3/generate_stream", json.dumps(body).encode()
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.readline().startswith(b"data: ")
        wait_until(lambda: triton.metric("nmoe_kv_cache_utilization_percent") > 0, "pages are taken")
    wait_until(lambda: triton.metric("nmoe_kv_cache_utilization_percent") == 0, "all pages are free", 1.0)


def test_requests_with_one_tensor_set_batch_and_mixed_sets_are_all_answered(triton: TritonServer) -> None:
    def executions() -> float:
        return triton.metric("nv_inference_exec_count", model="deepseek_v3")

    def burst(extra: Callable[[int], dict[str, object]]) -> float:
        before = executions()
        with Stream(triton.grpc) as stream:
            for index in range(NUM_STREAMS):
                stream.send(
                    {"input_ids": [5] * (1 + index % 7), "max_tokens": 1, **extra(index)}, request_id=str(index)
                )
            answers = [stream.read() for _ in range(NUM_STREAMS)]
        assert all(not isinstance(answer, str) and answer.final for answer in answers)
        return executions() - before

    assert burst(lambda _: {}) < NUM_STREAMS
    extras: list[dict[str, object]] = [{}, {"temperature": 0.0}, {"stop_words": ["a"]}, {"stop_words": ["a", "b"]}]
    assert burst(lambda index: extras[index % 4]) <= NUM_STREAMS


def test_the_queue_delay_adds_at_most_a_millisecond_to_the_median_ttft(model_path: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "scripted.toml", model_path, gpus=[0, 1])
    config.write_text(config.read_text() + benchmark_table({"step_ms": 1}))
    repositories = [write_repository(tmp_path / name) for name in ("delay", "none")]
    pbtxt = repositories[1] / "deepseek_v3" / "config.pbtxt"
    shipped = pbtxt.read_text()
    without = shipped.replace("max_queue_delay_microseconds: 500", "max_queue_delay_microseconds: 0")
    assert without != shipped
    pbtxt.write_text(without)
    ttfts: list[list[float]] = [[], []]
    with TritonServer(config, repositories[0]) as first, TritonServer(config, repositories[1]) as second:
        with Stream(first.grpc) as delayed, Stream(second.grpc) as prompt:
            for round_ in range(220):  # in turn, so that other load on the machine meets both
                for index, stream in enumerate((delayed, prompt)):
                    start = time.monotonic()
                    answer = stream.ask({"input_ids": [5, 6, 7], "max_tokens": 1})
                    if round_ >= 20:
                        ttfts[index].append(answer.responses[0].at_s - start)
    median = [sorted(values)[len(values) // 2] for values in ttfts]
    assert median[0] - median[1] <= 1e-3
