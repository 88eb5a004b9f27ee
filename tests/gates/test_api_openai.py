"""Gate: OpenAI's own SDK, sync and async, over a live server: models, embeddings, responses, text, and many streams.

Completions, chat, structured outputs, refusals, ends and settings have files of their own: test_api_*.py.
"""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from openai import AsyncOpenAI, NotFoundError, OpenAI

from tests.api.live import MODEL, async_client, get_json, post_json
from tests.api.reference import Reference
from tests.front_end import FrontEnd
from tests.gates.test_api_chat import USER, WEATHER
from tests.triton_server import TritonServer
from tests.waiting import wait_until

NUM_STREAMS = 64


def test_models_are_listed_and_found(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "nmoe")
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(NotFoundError) as caught:
        client.models.retrieve("gpt-4/o")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("model", "extra", "param"),
    [("other", {}, "model"), (f"{MODEL}:mine", {}, "adapter"), (MODEL, {"adapter": "mine"}, "adapter")],
    ids=["model", "base:adapter", "adapter"],
)
def test_unknown_models_and_adapters_are_404(client: OpenAI, model: str, extra: dict[str, str], param: str) -> None:
    messages: Any = USER
    with pytest.raises(NotFoundError) as chat:
        client.chat.completions.create(model=model, messages=messages, extra_body=extra)
    with pytest.raises(NotFoundError) as completion:
        client.completions.create(model=model, prompt="x", extra_body=extra, stream=True)
    for caught in (chat, completion):
        assert caught.value.param == param
        assert repr("mine" if param == "adapter" else model) in caught.value.message


def test_embeddings_are_transformers_mean_hidden_states(client: OpenAI, reference_model: Reference) -> None:
    texts = ["The weather is cold.", "你好，世界。", "x"]
    expected = [reference_model.embedding(reference_model.ids(text)) for text in texts]
    answer = client.embeddings.create(model=MODEL, input=texts)  # the SDK asks for base64 and decodes it
    for got, want in zip(answer.data, expected, strict=True):
        torch.testing.assert_close(torch.tensor(got.embedding), want, rtol=1e-4, atol=1e-4)
    assert [one.index for one in answer.data] == [0, 1, 2]
    total = sum(len(reference_model.ids(text)) for text in texts)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (total, total)
    floats = client.embeddings.create(model=MODEL, input=reference_model.ids(texts[0]), encoding_format="float")
    assert floats.data[0].embedding == pytest.approx(answer.data[0].embedding, abs=1e-5)
    raw = client.embeddings.with_raw_response.create(model=MODEL, input=texts[0], encoding_format="base64")
    packed = raw.http_response.json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(packed), "<f4").tolist() == pytest.approx(answer.data[0].embedding, abs=1e-5)


def test_tokenize_and_detokenize_agree_with_the_tokenizer(api: FrontEnd, reference_model: Reference) -> None:
    def tokens(body: dict[str, Any]) -> list[int]:
        status, answer = post_json(api, "/tokenize", body)
        assert status == 200 and answer["count"] == len(answer["tokens"]) and answer["max_model_len"] == 1024
        ids: list[int] = answer["tokens"]
        return ids

    text = "The quick brown fox, 今天天气很好。"
    assert tokens({"prompt": text}) == reference_model.ids(text)
    assert tokens({"prompt": text, "add_special_tokens": False, "model": MODEL}) == reference_model.ids(text)[1:]
    assert tokens({"messages": USER, "tools": [WEATHER]}) == reference_model.chat_ids(USER, tools=[WEATHER])
    assert tokens({"messages": USER, "chat_template_kwargs": {"thinking": True}}) == reference_model.chat_ids(
        USER, thinking=True
    )
    status, answer = post_json(api, "/detokenize", {"tokens": reference_model.ids(text)})
    assert (status, answer) == (200, {"prompt": text})


def test_limits_health_and_the_page(api: FrontEnd) -> None:
    limits = get_json(api, "/v1/limits")
    assert (limits["model"], limits["max_model_len"], limits["max_queue_size"]) == (MODEL, 1024, 512)
    assert limits["max_running_requests"] == 128, "64 on each of two ranks"
    assert limits["max_inputs"] == 2048, "test_api_refusals sends one more"
    assert get_json(api, "/health") == {"status": "ok"}
    assert get_json(api, "/ready") == {"status": "ready"}
    paths = get_json(api, "/openapi.json")["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/tokenize"} <= set(paths)


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_is_the_same_text_as_the_chat(client: OpenAI, reference_model: Reference, stream: bool) -> None:
    ids = reference_model.greedy(reference_model.chat_ids(USER), 24)
    values: dict[str, Any] = {"model": MODEL, "input": USER[0]["content"], "temperature": 0.0, "max_output_tokens": 24}
    if stream:
        events = list(client.responses.create(stream=True, **values))
        assert events[0].type == "response.created"
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert "".join(deltas) == reference_model.text(ids)
        last = events[-1]
        assert last.type == "response.incomplete"
        answer = last.response
    else:
        answer = client.responses.create(**values)
    assert answer.output_text == reference_model.text(ids)
    assert answer.status == "incomplete" and answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len(reference_model.chat_ids(USER)), 24)


async def read(client: AsyncOpenAI, prompt: str, leave_after: int) -> tuple[str, str | None, int]:
    """(text, finish reason, tokens by usage) of a stream that is left after so many chunks."""
    stream = await client.completions.create(
        model=MODEL,
        prompt=prompt,
        temperature=0.0,
        max_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, reason, count = "", None, 0
    async with stream:
        async for chunk in stream:
            if chunk.usage is not None:
                count = chunk.usage.completion_tokens
            if chunk.choices:
                text += chunk.choices[0].text
                reason = chunk.choices[0].finish_reason or reason
            leave_after -= 1
            if leave_after == 0:
                break
    return text, reason, count


@pytest.mark.parametrize("leavers", [0, 32], ids=["all stay", "every other one leaves"])
def test_64_concurrent_streams_are_each_right(
    api: FrontEnd, api_triton: TritonServer, reference_model: Reference, leavers: int
) -> None:
    prompts = [f"{index} days and {index * index} nights" for index in range(16)]
    all_ids = [reference_model.greedy(reference_model.ids(prompt), 32) for prompt in prompts]
    leaves = [index % 2 == 1 and index < 2 * leavers for index in range(NUM_STREAMS)]

    async def all_of_them() -> list[tuple[str, str | None, int]]:
        async with async_client(api) as client:
            reads = (read(client, prompts[index % 16], 2 if leaves[index] else 0) for index in range(NUM_STREAMS))
            return await asyncio.gather(*reads)

    answers = asyncio.run(all_of_them())
    for index, (text, reason, count) in enumerate(answers):
        ids = all_ids[index % 16]
        expected = reference_model.text(ids)
        if leaves[index]:
            assert expected.startswith(text)
        else:
            ended = "stop" if ids[-1] == reference_model.eos_id else "length"
            assert (text, reason, count) == (expected, ended, len(ids))
    wait_until(lambda: api_triton.metric("nmoe_requests_running") == 0.0, "nothing runs", 10)
    wait_until(lambda: api_triton.metric("nmoe_kv_cache_utilization_percent") == 0.0, "all pages are free", 10)


def test_events_are_server_sent_events(api: FrontEnd) -> None:
    body = {"model": MODEL, "messages": USER, "max_tokens": 3, "stream": True}
    with httpx.stream("POST", f"{api.url}/v1/chat/completions", json=body, timeout=30, trust_env=False) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store" and "content-length" not in answer.headers
        text = b"".join(answer.iter_raw()).decode()
    *events, last, rest = text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk" for event in events)


def test_async_chat_and_sync_chat_agree(api: FrontEnd, client: OpenAI) -> None:
    values: dict[str, Any] = {"model": MODEL, "messages": USER, "temperature": 1.0, "seed": 3, "max_tokens": 20, "n": 2}

    async def ask() -> Any:
        async with async_client(api) as one:
            return await one.chat.completions.create(**values)

    there, here = asyncio.run(ask()), client.chat.completions.create(**values)
    assert [choice.message.content for choice in there.choices] == [choice.message.content for choice in here.choices]
    assert there.usage == here.usage
