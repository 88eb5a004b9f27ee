"""`deepseek_v3_vllm` as the clients of Triton's vLLM backend see it, and what an ensemble cannot do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from perf.scripted import benchmark_table, write_repository
from tests.server.client import Answer, Stream
from tests.server.reference import Reference
from tests.triton_server import TritonServer, write_config
from tests.waiting import wait_until

MODEL = "deepseek_v3_vllm"
PROMPT = "In this example,"
GREEDY: dict[str, object] = {"temperature": "0", "top_p": "1"}
RETURNS = ("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens")
# triton-inference-server/vllm_backend, model.py
KINDS = {
    "text_output": ("BYTES", [1]),
    "finish_reason": ("BYTES", [1]),
    "cumulative_logprob": ("FP32", [1]),
    "logprobs": ("BYTES", [1]),
    "num_input_tokens": ("UINT32", [1]),
    "num_output_tokens": ("UINT32", [1]),
}


def tensors(prompt: str, sampling: dict[str, object] | None = None, **flags: bool) -> dict[str, object]:
    """Rank 1."""
    values: dict[str, object] = {"text_input": np.array([prompt.encode()], np.object_)}
    if sampling is not None:
        values["sampling_parameters"] = np.array([json.dumps(sampling).encode()], np.object_)
    return values | {name: np.array([value]) for name, value in flags.items()}


def ask(triton: TritonServer, values: dict[str, object], **options: object) -> Answer:
    with Stream(triton.grpc) as stream:
        return stream.ask(values, MODEL, **options)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("logprobs", [None, 0, 2])
def test_all_outputs_have_the_types_ranks_and_contents_of_the_vllm_backend(
    triton: TritonServer, reference: Reference, stream: bool, logprobs: int | None
) -> None:
    sampling = {**GREEDY, "max_tokens": 12, **({} if logprobs is None else {"logprobs": logprobs})}
    flags = {f"return_{name}": True for name in RETURNS}
    answer = ask(triton, tensors(PROMPT, sampling, stream=stream, **flags))
    expected = reference.greedy(PROMPT, 12)
    assert answer.error == ""
    assert (len(answer.responses) > 1) is stream
    assert answer.text == ("" if stream else PROMPT) + expected.text
    responses = [response.values for response in answer.responses]
    assert all(response.kinds == KINDS for response in answer.responses)
    assert [one["finish_reason"] for one in responses] == ["None"] * (len(responses) - 1) + ["length"]
    assert {one["num_input_tokens"] for one in responses} == {expected.num_input_tokens}
    assert sum(one["num_output_tokens"] for one in responses) == len(expected.ids)
    entries = [json.loads(one["logprobs"]) for one in responses]
    if logprobs is None:
        assert entries == [None] * len(responses)
        return
    assert [len(part) for part in entries] == [one["num_output_tokens"] for one in responses]
    tokens = [token for part in entries for token in part]
    assert [next(iter(token)) for token in tokens] == [str(token_id) for token_id in expected.ids]
    assert all(len(token) == max(1, logprobs) for token in tokens)
    assert all([one["rank"] for one in token.values()] == list(range(1, len(token) + 1)) for token in tokens)
    total = sum(next(iter(token.values()))["logprob"] for token in tokens)
    assert responses[-1]["cumulative_logprob"] == pytest.approx(total, abs=1e-3)


def test_what_was_not_asked_for_is_absent(triton: TritonServer) -> None:
    for flags in ({}, {f"return_{name}": False for name in RETURNS}):
        answer = ask(triton, tensors(PROMPT, {"max_tokens": 3}, stream=True, **flags))
        assert all(set(response.values) == {"text_output", "cumulative_logprob"} for response in answer.responses)
        assert all(response.values["cumulative_logprob"] == 0.0 for response in answer.responses)


def test_generate_takes_sampling_parameters_as_request_parameters(triton: TritonServer, reference: Reference) -> None:
    """The command of the vLLM backend's tutorial; top-level keys do the same."""
    expected = reference.greedy(PROMPT, 16)
    nested = {"stream": False, "temperature": 0, "exclude_input_in_output": True}
    assert triton.generate({"text_input": PROMPT, "parameters": nested}, MODEL)["text_output"] == expected.text
    assert triton.generate({"text_input": PROMPT, **nested}, MODEL)["text_output"] == expected.text
    assert triton.generate({"text_input": PROMPT, "temperature": 0}, MODEL)["text_output"] == PROMPT + expected.text


def test_generate_stream_gives_the_same_text_in_deltas(triton: TritonServer, reference: Reference) -> None:
    body = {"text_input": PROMPT, "stream": True, "temperature": 0, "max_tokens": 20}
    status, raw = triton.post(f"v2/models/{MODEL}/generate_stream", body)
    events = [json.loads(line.removeprefix("data: ")) for line in raw.decode().splitlines() if line]
    assert status == 200
    assert len(events) > 1
    assert "".join(event["text_output"] for event in events) == reference.greedy(PROMPT, 20).text


def test_request_parameters_over_grpc_and_the_tensor_may_say_the_same(
    triton: TritonServer, reference: Reference
) -> None:
    """As NVIDIA's own client does, which sends everything twice."""
    sampling = {**GREEDY, "max_tokens": 6}
    for values in (tensors(PROMPT, stream=True), tensors(PROMPT, sampling, stream=True)):
        assert ask(triton, values, parameters=sampling).text == reference.greedy(PROMPT, 6).text


def test_the_same_seed_and_parameters_give_the_tokens_of_the_engine_model(triton: TritonServer) -> None:
    body = {"temperature": 1.25, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.25, "seed": 11}
    body |= {"max_tokens": 20, "presence_penalty": 0.5, "frequency_penalty": 0.25, "ignore_eos": True}
    direct = triton.generate({"text_input": PROMPT, **body})
    assert ask(triton, tensors(PROMPT, body, exclude_input_in_output=True)).text == direct["text_output"]


@pytest.mark.parametrize("key", ["guided_decoding", "structured_outputs"])
@pytest.mark.parametrize(
    ("guide", "shape"),
    [
        ({"choice": ["the first", "the second"]}, "the (first|second)"),
        ({"regex": "[0-9]{3}-[a-z]{2}"}, "[0-9]{3}-[a-z]{2}"),
        ({"json": {"enum": ["a", 1]}}, '"a"|1'),
        ({"grammar": 'root ::= "x" | "yy"'}, "x|yy"),
    ],
)
def test_a_guide_in_either_of_vllms_names_holds(
    triton: TritonServer, key: str, guide: dict[str, object], shape: str
) -> None:
    """As an object, and as the string that Triton's OpenAI front end makes of it, with the unset fields null."""
    unset: dict[str, object] = {"json_object": None, "backend": None, "disable_fallback": False}
    for form in (guide, json.dumps({**guide, **unset})):
        sampling = {"temperature": 1.0, "seed": 5, "max_tokens": 64, key: form}
        answer = ask(triton, tensors(PROMPT, sampling, exclude_input_in_output=True, return_finish_reason=True))
        assert answer.error == ""
        assert re.fullmatch(shape, answer.text), answer.text
        assert answer.responses[-1].values["finish_reason"] == "stop"


def test_prompt_logprobs_come_with_the_first_response(triton: TritonServer, reference: Reference) -> None:
    answer = ask(triton, tensors(PROMPT, {**GREEDY, "max_tokens": 4, "prompt_logprobs": 1}, stream=True))
    first, *rest = (json.loads(response.values["prompt_logprobs"]) for response in answer.responses)
    assert len(first) == reference.greedy(PROMPT, 1).num_input_tokens
    assert first[0] is None and rest == [None] * len(rest)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"text_input": PROMPT, "temprature": 0}, "Did you mean 'temperature'"),
        ({"text_input": PROMPT, "sampling_parameters": "{"}, "sampling_parameters: got '{', need a JSON object"),
        ({"text_input": PROMPT, "sampling_parameters": '{"n": 2}'}, "n: got 2, need 1"),
        (
            {"text_input": PROMPT, "stream": True, "exclude_input_in_output": False},
            "exclude_input_in_output: got false",
        ),
        ({"stream": False}, "text_input is required"),
        ({"text_input": PROMPT, "lora_name": "nobody"}, "nobody"),
    ],
)
def test_what_cannot_be_served_is_an_error_and_says_why(
    triton: TritonServer, body: dict[str, object], message: str
) -> None:
    status, raw = triton.post(f"v2/models/{MODEL}/generate", body)
    assert status >= 400
    assert message in json.loads(raw)["error"]


def test_the_engine_model_refuses_these_names_without_the_face(triton: TritonServer) -> None:
    status, raw = triton.post(
        "v2/models/deepseek_v3/generate", {"text_input": PROMPT, "sampling_parameters": '{"max_tokens": 3}'}
    )
    assert status == 400
    assert "Call deepseek_v3_vllm" in json.loads(raw)["error"]


# --- what an ensemble cannot do


@pytest.fixture
def bounded(model_path: Path, tmp_path: Path) -> Iterator[TritonServer]:
    """Scripted ranks: a token takes 20 ms, however busy the machine is."""
    config = write_config(tmp_path / "bounded.toml", model_path, gpus=[0], max_orphan_s=2.0)
    config.write_text(config.read_text() + benchmark_table({"step_ms": 20.0}))
    with TritonServer(config, write_repository(tmp_path)) as server:
        yield server


def test_what_an_ensemble_keeps_from_being_cancelled_ends_at_max_orphan_s(bounded: TritonServer) -> None:
    plain: dict[str, object] = {"text_input": PROMPT, "stream": True, "ignore_eos": True, "max_tokens": 900}
    face = tensors(PROMPT, {"ignore_eos": True, "max_tokens": 900}, stream=True)
    with Stream(bounded.grpc) as cancellable:
        cancellable.send({**plain, "max_tokens": 150})  # 3 s
        for model, values in (("ensemble", plain), (MODEL, face)):
            stream = Stream(bounded.grpc).__enter__()
            stream.send(values, model)
            assert not isinstance(stream.read(), str)
            stream.disconnect()
        wait_until(
            lambda: bounded.metric("nmoe_request_errors_total", kind="deadline") == 2,
            "both have met their deadline",
            10.0,
        )
        answer = cancellable.read_all()
    assert answer.error == "" and len(answer.ids) == 150
    wait_until(lambda: bounded.metric("nmoe_requests_running") == 0, "nothing runs", 5.0)
    assert bounded.metric("nmoe_generation_tokens_total") < 2 * 900
