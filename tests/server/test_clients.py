"""What clients see: both models, both protocols, every kind of answer."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from nmoe_backend.contract_outputs import OUTPUTS
from nmoe_backend.text import Text
from tests.server.client import Stream
from tests.server.metrics import settled, snapshot_at_rest
from tests.triton_server import TritonServer

PROMPT = "The capital of France is"
GREEDY: dict[str, object] = {"temperature": 0.0, "ignore_eos": True}
MODELS = ["deepseek_v3", "ensemble"]


@pytest.fixture(scope="module")
def text(model_path: Path) -> Text:
    return Text(model_path)


@pytest.mark.parametrize("model", MODELS)
def test_generate_gives_one_response_with_every_output(triton: TritonServer, text: Text, model: str) -> None:
    answer = triton.generate(
        {"text_input": PROMPT, "max_tokens": 12, "bad_words": "", "stop_words": "", **GREEDY}, model
    )
    assert answer["text_output"] == text.decode(answer["output_ids"])  # type: ignore[arg-type]
    assert answer["num_output_tokens"] == len(answer["output_ids"]) == 12  # type: ignore[arg-type]
    assert answer["num_input_tokens"] == len(text.encode(PROMPT))
    assert answer["finish_reason"] == "length"
    left_out = () if model == "deepseek_v3" else ("prompt_logprobs", "embedding")
    assert [name for name in OUTPUTS if name not in answer] == list(left_out)


@pytest.mark.parametrize("model", MODELS)
def test_generate_stream_gives_the_same_text_in_deltas(triton: TritonServer, model: str) -> None:
    body = {"text_input": PROMPT, "max_tokens": 20, **GREEDY}
    status, raw = triton.post(f"v2/models/{model}/generate_stream", {**body, "stream": True})
    events = [json.loads(line.removeprefix("data: ")) for line in raw.decode().splitlines() if line]
    assert status == 200
    assert len(events) > 1
    assert "".join(event["text_output"] for event in events) == triton.generate(body, model)["text_output"]
    assert [event["finish_reason"] for event in events] == [""] * (len(events) - 1) + ["length"]
    assert sum(event["num_output_tokens"] for event in events) == 20


@pytest.mark.parametrize("model", MODELS)
def test_final_rides_on_the_last_content_response(triton: TritonServer, model: str) -> None:
    with Stream(triton.grpc) as stream:
        answer = stream.ask(
            {"text_input": PROMPT, "max_tokens": 8, "stream": True, **GREEDY}, model, enable_empty_final_response=True
        )
    assert answer.error == ""
    assert answer.responses[-1].values["num_output_tokens"] >= 1
    assert answer.responses[-1].values["finish_reason"] == "length"
    assert len(answer.ids) == 8


def test_ids_in_and_ids_out_are_the_same_generation(triton: TritonServer, text: Text) -> None:
    by_text = triton.generate({"text_input": PROMPT, "max_tokens": 9, **GREEDY})
    by_ids = triton.generate({"input_ids": text.encode(PROMPT), "max_tokens": 9, **GREEDY})
    assert by_ids["output_ids"] == by_text["output_ids"]


def test_the_two_tokenizer_models_turn_text_into_ids_and_back(triton: TritonServer, text: Text) -> None:
    ids = triton.generate({"text_input": PROMPT + " é\U0001f600"}, "preprocessing")["input_ids"]
    assert ids == text.encode(PROMPT + " é\U0001f600")
    assert triton.generate({"output_ids": ids}, "postprocessing")["text_output"] == PROMPT + " é\U0001f600"


@pytest.mark.parametrize("model", MODELS)
def test_a_stop_string_cuts_the_text_before_it(triton: TritonServer, model: str) -> None:
    whole = str(triton.generate({"text_input": PROMPT, "max_tokens": 30, **GREEDY}, model)["text_output"])
    stop = whole[len(whole) // 2 :][:3]
    body = {"text_input": PROMPT, "max_tokens": 30, "stop_words": [stop, "never to be seen"], **GREEDY}
    answer = triton.generate(body, model)
    assert answer["text_output"] == whole[: whole.index(stop)]
    assert answer["finish_reason"] == "stop"
    with Stream(triton.grpc) as stream:
        streamed = stream.ask({**body, "stream": True}, model)
    assert (streamed.text, streamed.ids) == (answer["text_output"], answer["output_ids"])


def test_the_prompt_stands_in_front_when_asked_for(triton: TritonServer) -> None:
    body = {"text_input": PROMPT, "max_tokens": 4, **GREEDY}
    plain = triton.generate(body)
    both = triton.generate({**body, "exclude_input_in_output": False})
    assert both["text_output"] == PROMPT + str(plain["text_output"])


def test_logprobs_are_finite_and_sum_up(triton: TritonServer) -> None:
    answer = triton.generate(
        {
            "text_input": PROMPT,
            "max_tokens": 5,
            "top_logprobs": 3,
            "return_log_probs": True,
            "prompt_logprobs": 1,
            **GREEDY,
        }
    )
    entries = json.loads(str(answer["logprobs"]))
    assert [entry["token_id"] for entry in entries] == answer["output_ids"]
    assert all(len(entry["top_logprobs"]) == 3 for entry in entries)
    assert all(entry["top_logprobs"][0]["token_id"] == entry["token_id"] for entry in entries)  # greedy: the best one
    assert all(math.isfinite(entry["logprob"]) and entry["logprob"] <= 0 for entry in entries)
    assert answer["cum_log_probs"] == pytest.approx(sum(entry["logprob"] for entry in entries), abs=1e-4)
    assert len(json.loads(str(answer["prompt_logprobs"]))) == answer["num_input_tokens"]


def test_an_embedding_has_the_hidden_size_and_no_token(triton: TritonServer) -> None:
    with Stream(triton.grpc) as stream:
        answer = stream.ask({"text_input": PROMPT}, outputs=["embedding", "num_input_tokens"])
    (response,) = answer.responses
    assert len(response.values["embedding"]) == 64
    assert all(math.isfinite(value) for value in response.values["embedding"])
    assert any(response.values["embedding"])


def test_a_seeded_request_is_reproducible(triton: TritonServer) -> None:
    body = {"text_input": PROMPT, "max_tokens": 16, "temperature": 1.5, "ignore_eos": True}
    first, again, other = (triton.generate({**body, "seed": seed})["output_ids"] for seed in (7, 7, 8))
    assert first == again != other


def test_a_deadline_ends_a_request_with_a_clear_error(triton: TritonServer) -> None:
    body = {"text_input": PROMPT, "max_tokens": 900, "deadline_ms": 60, **GREEDY}
    status, raw = triton.post("v2/models/deepseek_v3/generate", body)
    assert status >= 400  # this server's /generate makes every model error a 400
    assert "deadline" in json.loads(raw)["error"]
    with Stream(triton.grpc) as stream:
        answer = stream.ask({"text_input": PROMPT, "max_tokens": 900, "stream": True, **GREEDY}, timeout=60_000)
    assert "deadline" in answer.error


def test_stop_ends_the_live_requests_with_the_same_id(triton: TritonServer) -> None:
    with Stream(triton.grpc) as running, Stream(triton.grpc) as control:
        running.send({"text_input": PROMPT, "max_tokens": 900, "stream": True, **GREEDY}, request_id="mine")
        running.read()
        stopped = control.ask({"stop": True}, request_id="mine")
        assert stopped.error == ""
        assert len(stopped.responses) == 1
        answer = running.read_all()
    assert "cancelled" in answer.error.lower()
    assert len(answer.ids) < 900


def test_health_and_metadata(triton: TritonServer) -> None:
    assert triton.get("v2/health/ready") == b""
    for model in (*MODELS, "preprocessing", "postprocessing"):
        assert triton.get(f"v2/models/{model}/ready") == b""
    metadata = json.loads(triton.get("v2/models/deepseek_v3"))
    assert {one["name"] for one in metadata["outputs"]} == set(OUTPUTS)


def test_metrics_count_what_was_served(triton: TritonServer, text: Text) -> None:
    names = {
        "nmoe_prompt_tokens_total": 2 * len(text.encode(PROMPT)),
        "nmoe_generation_tokens_total": 2 * 12,
        "nmoe_time_to_first_token_seconds_count": 2,
        "nmoe_request_latency_seconds_count": 2,
        "nmoe_inter_token_intervals_total": 11,  # of the stream; the other request came as one response
        "nmoe_request_errors_total{invalid}": 1,
        "nmoe_requests_finished_total{length}": 2,
    }
    before = snapshot_at_rest(triton, list(names))
    body = {"text_input": PROMPT, "max_tokens": 12, **GREEDY}
    triton.generate(body)
    with Stream(triton.grpc) as stream:
        assert len(stream.ask({**body, "stream": True}).responses) > 1
    assert triton.post("v2/models/deepseek_v3/generate", {**body, "max_tokens": -1})[0] == 400
    state = {"nmoe_engine_alive": 1.0, "nmoe_kv_cache_utilization_percent": 0.0}
    settled(triton, {name: before[name] + count for name, count in names.items()} | state)
