"""Bodies that are not as a careful client writes them: huge and wrong, deep, echoed, full of nulls and defaults."""

from __future__ import annotations

import asyncio
import typing
from typing import Any

import httpx2
import orjson
import pytest
from openai import pydantic_function_tool
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from pydantic import BaseModel, ValidationError

from nmoe_backend.api.responses_schemas import ResponsesRequest
from nmoe_backend.api.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from nmoe_backend.api.service import Service
from nmoe_backend.api.validation import explain
from tests.api import in_process
from tests.api.fake_engine import FakeEngine, deltas

USER: list[Any] = [{"role": "user", "content": "hi"}]
MANY = 20_000
CHAT = {"model": in_process.MODEL, "messages": USER}
PLAIN = {"model": in_process.MODEL, "prompt": "hi"}
BASES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": PLAIN,
    "/v1/responses": {"model": in_process.MODEL, "input": "hi"},
    "/v1/embeddings": {"model": in_process.MODEL, "input": "hi"},
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    """V3.1's template; embeddings on."""
    return in_process.make_service(tmp_path_factory.mktemp("service"), f"embeddings = true\n{in_process.V31}")


def post(service: Service, path: str, *bodies: Any, text: str = "Hello") -> list[tuple[int, Any]]:
    """(status, answer) of each body, as bytes or to be written as JSON; `text` is what the model says."""
    script = deltas(text)
    script[-1].embedding = b"\0\0\0\0" * 8
    app = in_process.application(service, FakeEngine(script))

    async def ask() -> list[tuple[int, Any]]:
        answers = []
        transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://front.end") as http:
            for body in bodies:
                content = body if isinstance(body, bytes) else orjson.dumps(body)
                answer = await http.post(path, content=content, headers={"content-type": "application/json"})
                answers.append((answer.status_code, answer.json()))
        return answers

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (CompletionRequest, {**PLAIN, "prompt": [-1] * MANY}),
        (CompletionRequest, {**PLAIN, "prompt": [[-1]] * MANY}),
        (CompletionRequest, {**PLAIN, "prompt": [[-1] * MANY]}),
        (CompletionRequest, {**PLAIN, "stop_token_ids": [-1] * MANY}),
        (CompletionRequest, {**PLAIN, "bad_words": [1] * MANY}),
        (ChatRequest, {**CHAT, "messages": [{}] * MANY}),
        (ChatRequest, {**CHAT, "messages": [{"role": "user", "content": [{}] * MANY}]}),
        (ChatRequest, {**CHAT, "messages": [{**USER[0], "tool_calls": [{}] * MANY}]}),
        (ChatRequest, {**CHAT, "tools": [{}] * MANY}),
        (ChatRequest, {**CHAT, "stop": [1] * MANY}),
        (ChatRequest, {**CHAT, "modalities": ["x"] * MANY}),
        (ChatRequest, {**CHAT, **{f"key-{index}": 1 for index in range(MANY)}}),
        (ChatRequest, {**CHAT, "thinking": {f"key-{index}": 1 for index in range(MANY)}}),
        (ChatRequest, {**CHAT, "logit_bias": {str(index): 1000 for index in range(MANY)}}),
        (ChatRequest, {**CHAT, "metadata": {str(index): 1 for index in range(MANY)}}),
        (ChatRequest, {**CHAT, "structured_outputs": {"choice": [1] * MANY}}),
        (EmbeddingRequest, {"model": "m", "input": [-1] * MANY}),
        (TokenizeRequest, {"messages": [{}] * MANY}),
        (DetokenizeRequest, {"tokens": [-1] * MANY}),
        (ResponsesRequest, {"model": "m", "input": [{}] * MANY}),
        (ResponsesRequest, {"model": "m", "input": [{"role": "user", "content": [{}] * MANY}]}),
        (ResponsesRequest, {"model": "m", "input": "x", "include": ["x"] * MANY}),
        (ResponsesRequest, {"model": "m", "input": "x", "tools": [{}] * MANY}),
        (ResponsesRequest, {"model": "m", "input": "x", "context_management": [1] * MANY}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_however_many_things_are_wrong_few_complaints_are_made(model: type[BaseModel], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    assert caught.value.error_count() <= 6
    assert len(explain(caught.value.errors(), model.model_fields).message) < 400


def test_a_huge_value_or_name_is_not_sent_back(service: Service) -> None:
    huge = "x" * 100_000
    bodies = [{**CHAT, **fields} for fields in ({huge: 1}, {"temperature": huge}, {"temperature": [1] * MANY})]
    bodies += [{**CHAT, "model": huge}, {**CHAT, "tool_choice": {"type": "function", "function": {"name": huge}}}]
    bodies += [{**CHAT, "logit_bias": {huge: 1}}, {**CHAT, "model": f"{in_process.MODEL}:a", "adapter": huge}]
    for status, answer in post(service, "/v1/chat/completions", *bodies):
        assert status in (400, 404) and len(orjson.dumps(answer)) < 1000, answer["error"]["message"][:100]
    ((status, answer),) = post(service, "/v1/responses", {**BASES["/v1/responses"], "previous_response_id": huge})
    assert status == 400 and len(orjson.dumps(answer)) < 1000


def test_an_integer_may_be_written_as_a_float_as_far_as_floats_are_exact(service: Service) -> None:
    """What no JSON of ours could say again must not get in: these bodies come back in the answer."""
    base = orjson.dumps(BASES["/v1/responses"])[:-1]
    for written, status in (
        (b"1e2", 200),
        (b"9007199254740992.0", 200),
        (b"1e19", 400),
        (b"1e300", 400),
        (b"0.5", 400),
    ):
        ((got, answer),) = post(service, "/v1/responses", base + b',"max_tool_calls":' + written + b"}")
        assert got == status, (written, answer)
        assert answer["max_tool_calls"] == float(written) if status == 200 else answer["error"]["param"]


@pytest.mark.parametrize("depth", [150, 190, 201, 253, 300, 900, 1010])
def test_deep_bodies_are_served_or_refused_and_never_a_failure(service: Service, depth: int) -> None:
    nested = b'{"a":' * depth + b"1" + b"}" * depth
    chat, text = orjson.dumps(CHAT)[:-1], orjson.dumps(BASES["/v1/responses"])[:-1]
    function = b'"name":"f","parameters":' + nested
    cases = [
        ("/v1/chat/completions", chat + b',"tools":[{"type":"function","function":{' + function + b"}}]}"),
        ("/v1/chat/completions", chat + b',"chat_template_kwargs":' + nested + b"}"),
        ("/v1/chat/completions", chat + b',"user":' + nested + b"}"),
        ("/v1/completions", orjson.dumps(PLAIN)[:-1] + b',"structured_outputs":{"json":' + nested + b"}}"),
        ("/v1/responses", text + b',"tools":[{"type":"function",' + function + b"}]}"),
        ("/v1/responses", text + b',"text":{"format":{"type":"json_schema","name":"x","schema":' + nested + b"}}}"),
    ]
    for path, body in cases:
        ((status, answer),) = post(service, path, body)
        assert status == 400 if depth > 200 else status in (200, 400), (path, status)
        if depth > 200:
            assert "nested too deeply, need at most 200 levels" in answer["error"]["message"]


class GetWeather(BaseModel):
    """The weather."""

    city: str


BEGIN, SEPARATOR, END = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
)
CALL = f'</think>{BEGIN}GetWeather{SEPARATOR}{{"city": "Paris"}}{END}'


@pytest.mark.parametrize("streamed", [False, True])
def test_messages_of_the_sdk_s_helpers_come_back(service: Service, streamed: bool) -> None:
    engine = FakeEngine(deltas(CALL), deltas("Fine."))
    tools = [pydantic_function_tool(GetWeather)]

    async def talk() -> Any:
        async with in_process.client(in_process.application(service, engine)) as client:
            asked: dict[str, Any] = {"model": in_process.MODEL, "messages": USER, "tools": tools}
            if streamed:
                async with client.chat.completions.stream(**asked) as stream:
                    first = await stream.get_final_completion()
            else:
                first = await client.chat.completions.parse(**asked)
            said = first.choices[0].message
            assert said.tool_calls and said.tool_calls[0].function.parsed_arguments == GetWeather(city="Paris")
            result = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "rain"}
            for echo in (said, said.model_dump()):
                messages: Any = [*USER, echo, result]
                answer = await client.chat.completions.create(model=in_process.MODEL, messages=messages, tools=tools)
                assert answer.choices[0].message.content == "Fine."

    asyncio.run(talk())


def test_what_frameworks_add_to_messages_and_items_changes_nothing(service: Service) -> None:
    part = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}", "parsed_arguments": {}}}
    extra = {
        "provider_specific_fields": {"refusal": None},
        "images": [],
        "thinking_blocks": [{}],
        "reasoning_details": [],
    }
    said = {"role": "assistant", "content": None, "id": "m", "parsed": {}, "tool_calls": [{**call, "kind": 1}], **extra}
    messages = [
        {"role": "user", "content": [part]},
        said,
        {"role": "tool", "tool_call_id": "c", "content": "x", "id": 1},
    ]
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "hi", "cache_control": {}}], "origin": "ide"},
        {"type": "reasoning", "summary": [], "id": "r", "format": "x"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "parsed_arguments": {}},
        {"type": "function_call_output", "call_id": "c", "output": "x", "created_by": "me"},
    ]
    assert [status for status, _ in post(service, "/v1/chat/completions", {**CHAT, "messages": messages})] == [200]
    assert [status for status, _ in post(service, "/v1/responses", {**BASES["/v1/responses"], "input": items})] == [200]
    ((status, answer),) = post(service, "/v1/chat/completions", {**CHAT, "provider_specific_fields": {}})
    assert (status, answer["error"]["param"]) == (400, "provider_specific_fields"), "a wish is not ignored"


@pytest.mark.parametrize(
    ("params", "path"),
    [
        *zip(
            (
                chat_create_params.CompletionCreateParamsBase,
                completion_create_params.CompletionCreateParamsBase,
                response_create_params.ResponseCreateParamsBase,
                embedding_create_params.EmbeddingCreateParams,
            ),
            BASES,
            strict=True,
        )
    ],
    ids=BASES,
)
def test_null_is_as_left_out_in_every_field_of_openai_s(service: Service, params: Any, path: str) -> None:
    names = sorted({*typing.get_type_hints(params), "guided_json", "extra_thing"} - BASES[path].keys())
    assert len(names) > 3
    answers = post(service, path, *({**BASES[path], name: None} for name in names))
    refused = {name: answer for name, (status, answer) in zip(names, answers, strict=True) if status != 200}
    assert not refused


HARMLESS: list[dict[str, Any]] = [
    {"skip_special_tokens": True},
    {"spaces_between_special_tokens": True},
    {"include_stop_str_in_output": False},
    {"length_penalty": 1.0},
    {"use_beam_search": False},
    {"return_token_ids": False},
    {"prompt_logprobs": 0},
    {"request_id": "r"},
    {"cache_salt": "s"},
    {"extra_body": {}},
    {"max_tokens": 100.0, "n": 1.0, "top_k": 5.0, "seed": -1},
    {"top_p": 0},
    {"best_of": 1},
    {"echo": False},
]
HARMLESS_IN_CHAT: list[dict[str, Any]] = [
    {"add_generation_prompt": True},
    {"continue_final_message": False},
    {"functions": []},
    {"function_call": "none"},
    {"include_reasoning": True, "separate_reasoning": True},
    {"verbosity": "low"},
    {"prompt_cache_options": {"mode": "x"}},
    {"logprobs": False, "top_logprobs": 0},
    {"max_tokens": 9, "max_completion_tokens": 9},
]


def test_values_that_ask_for_nothing_are_taken_and_others_refused(service: Service) -> None:
    for path, bodies in (("/v1/completions", HARMLESS), ("/v1/chat/completions", [*HARMLESS, *HARMLESS_IN_CHAT])):
        answers = post(service, path, *({**BASES[path], **fields} for fields in bodies))
        refused = [answer for status, answer in answers if status != 200]
        assert not refused
    wishes: list[dict[str, Any]] = [
        {"skip_special_tokens": False},
        {"echo": True},
        {"best_of": 2},
        {"best_of": True},
        {"length_penalty": 2},
        {"function_call": "auto"},
        {"functions": [{}]},
        {"extra_body": {"a": 1}},
        {"max_tokens": 8, "max_completion_tokens": 9},
        {"max_tokens": 8.5},
        {"logprobs": 1.0},
        {"logprobs": False, "top_logprobs": 1},
    ]
    answers = post(service, "/v1/chat/completions", *({**CHAT, **fields} for fields in wishes))
    for fields, (status, answer) in zip(wishes, answers, strict=True):
        assert status == 400 and answer["error"]["param"] in fields


def test_completions_take_a_response_format(service: Service) -> None:
    engine = FakeEngine(deltas("{}"))

    async def ask() -> Any:
        async with in_process.client(in_process.application(service, engine)) as client:
            form = {"response_format": {"type": "json_object"}}
            return await client.completions.create(model=in_process.MODEL, prompt="x", extra_body=form)

    asyncio.run(ask())
    assert engine.calls[0].inputs["guided_decoding_guide_type"] == "json"
