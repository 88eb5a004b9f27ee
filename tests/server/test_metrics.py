"""The metrics of a live server say what its clients counted."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nmoe_backend.metrics_families import SPECS
from perf.scripted import ROOT
from tests.server.client import Answer, Stream
from tests.server.metrics import scrape, scrape_when
from tests.server.scripted_streams import running_streams, scripted
from tests.triton_server import TritonServer

NUM_STREAMS = 12
CLOCKS_S = 0.1  # the server may look at its clock just after the client did, at each of the streams' ends
MAX_TOKENS = 16
OVERFLOWING = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from perf.scripted import scripted_model
from tests.server.failing_engine import start_overflowing
TritonPythonModel = scripted_model(start_overflowing)
"""


def test_every_declared_metric_is_exported(triton: TritonServer) -> None:
    triton.generate({"text_input": "one two three", "max_tokens": 3})
    exported = triton.get("metrics", triton.metrics).decode().splitlines()
    for spec in SPECS:
        assert f"# TYPE {spec.name} {spec.kind}" in exported, spec.name


def test_counters_grow_by_what_the_clients_counted(triton: TritonServer, model_path: Path) -> None:
    def ask(index: int) -> tuple[float, Answer]:
        with Stream(triton.grpc) as stream:
            prompt = [3 + index] * (index + 1)
            asked_s = time.monotonic()
            answer = stream.ask({"input_ids": prompt, "max_tokens": MAX_TOKENS, "stream": True, "ignore_eos": True})
            stream.send({"input_ids": [10**6], "max_tokens": 1})  # outside the vocabulary
            refusal = stream.read()
            assert isinstance(refusal, str) and "token id 1000000" in refusal
            return asked_s, answer

    beats = scrape(triton)["nmoe_engine_heartbeats_total"]
    before = scrape_when(triton, lambda values: values["nmoe_engine_heartbeats_total"] > beats + 1)  # all is pushed
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        asked = list(pool.map(ask, range(NUM_STREAMS)))
    answers = [answer for _, answer in asked]
    responses = [response for answer in answers for response in answer.responses if response.values["output_ids"]]
    num_tokens = sum(len(answer.ids) for answer in answers)
    assert num_tokens == NUM_STREAMS * MAX_TOKENS
    expected = {
        "nmoe_generation_tokens_total": num_tokens,
        "nmoe_response_tokens_total": num_tokens,
        "nmoe_responses_total": len(responses),
        "nmoe_inter_token_intervals_total": num_tokens - sum(len(a.responses[0].values["output_ids"]) for a in answers),
        "nmoe_prompt_tokens_total": sum(range(1, NUM_STREAMS + 1)),
        "nmoe_requests_finished_total{length}": NUM_STREAMS,
        "nmoe_requests_finished_total{error}": 0,
        "nmoe_request_errors_total{invalid}": NUM_STREAMS,
        "nmoe_request_errors_total{engine}": 0,
        "nmoe_time_to_first_token_seconds_count": NUM_STREAMS,
        "nmoe_queue_seconds_count": NUM_STREAMS,
        "nmoe_request_latency_seconds_count": NUM_STREAMS,
        "nmoe_preemptions_total": 0,
        "nmoe_moe_overflow_total": 0,
    }

    def grown(values: dict[str, float]) -> dict[str, float]:
        return {name: values[name] - before[name] for name in expected}

    after = scrape_when(triton, lambda values: grown(values) == expected)
    config = json.loads((model_path / "config.json").read_text())
    num_layers = config["num_hidden_layers"] - config["first_k_dense_replace"]
    num_fed = sum(range(1, NUM_STREAMS + 1)) + num_tokens - NUM_STREAMS  # a last token is fed to nobody
    rows = [after[name] - before[name] for name in before if name.startswith("nmoe_expert_rows_total")]
    assert len(rows) == 8 and sum(rows) == num_fed * num_layers * config["num_experts_per_tok"]
    assert 1.0 <= after["nmoe_expert_imbalance_ratio"] <= config["n_routed_experts"]
    num_steps = after["nmoe_steps_total"] - before["nmoe_steps_total"]
    assert num_steps >= MAX_TOKENS and after["nmoe_step_duration_seconds_count"] <= after["nmoe_steps_total"]
    assert after["nmoe_busy_seconds_total"] > before["nmoe_busy_seconds_total"]
    waited_s, first_s, whole_s, between_s = (
        after[name] - before[name]
        for name in (
            "nmoe_queue_seconds_sum",
            "nmoe_time_to_first_token_seconds_sum",
            "nmoe_request_latency_seconds_sum",
            "nmoe_inter_token_seconds_total",
        )
    )
    seen_first_s, seen_whole_s = (
        sum(answer.responses[at].at_s - began_s for began_s, answer in asked) for at in (0, -1)
    )
    assert 0.0 < waited_s <= first_s < whole_s
    assert first_s <= seen_first_s + CLOCKS_S and whole_s <= seen_whole_s + CLOCKS_S  # what clients see takes longer
    assert first_s + between_s == pytest.approx(whole_s, rel=0.05)


def test_gauges_show_the_load_while_it_lasts(model_path: Path, tmp_path: Path) -> None:
    config, repository = scripted(model_path, tmp_path, step_ms=10)
    with TritonServer(config, repository) as server, running_streams(server, 6, max_tokens=300):
        values = scrape_when(server, lambda values: values["nmoe_requests_running"] == 6)
        assert (
            values["nmoe_rank_sequences{0}"] + values["nmoe_rank_sequences{1}"]
            == 6
            == values["nmoe_batch_size_current"]
        )
        assert values["vllm:num_requests_running"] == values["nv_trt_llm_request_metrics{scheduled}"] == 6
        used, pages = (values[f"nv_trt_llm_kv_cache_block_metrics{{{kind}}}"] for kind in ("used", "max"))
        assert 0 < used < pages and values["vllm:kv_cache_usage_perc"] == pytest.approx(used / pages)
        assert values["nmoe_kv_cache_utilization_percent"] == pytest.approx(100 * used / pages)
        assert values["nmoe_step_seconds"] == pytest.approx(0.01, rel=0.9)
        assert values["nmoe_gpu_utilization_percent{none}"] == 0.0
        fast = scrape_when(server, lambda values: values["nmoe_decode_tokens_per_second"] > 100)  # 600 at most
        assert fast["nmoe_decode_tokens_per_second"] < 900 and fast["nmoe_tokens_per_response"] >= 1.0


def test_an_error_word_is_counted_as_an_overflow_and_ends_the_engine(model_path: Path, tmp_path: Path) -> None:
    config, repository = scripted(model_path, tmp_path, step_ms=5)
    (repository / "deepseek_v3" / "1" / "model.py").write_text(OVERFLOWING)
    with TritonServer(config, repository) as server:
        server.generate({"text_input": "hello", "max_tokens": 1})  # the metrics port opens last, behind readiness
        assert scrape(server)["nmoe_moe_overflow_total"] == 0
        status, answer = server.post(
            "v2/models/deepseek_v3/generate", {"text_input": "hello", "max_tokens": 200, "ignore_eos": True}
        )
        assert status >= 400 and b"error word 0x2" in answer
        values = scrape_when(server, lambda values: values["nmoe_moe_overflow_total"] == 1)
        assert values["nmoe_engine_alive"] == 0 and values["nmoe_request_errors_total{engine}"] == 1
