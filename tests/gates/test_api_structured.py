"""Gate: structured outputs and tools by the official SDK. The model is random: grammars make answers fit."""

from __future__ import annotations

import enum
import json
import re
from typing import Any

import jsonschema
import pytest
from openai import BadRequestError, OpenAI
from pydantic import BaseModel, Field
from pydantic_core import from_json

from tests.api.live import MODEL
from tests.gates.test_api_chat import USER, WEATHER, chat, chunks_of, merged

SEEDS = range(3)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
STRICT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 0}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "add"}}
DRAWN: dict[str, Any] = {"temperature": 1.0, "max_tokens": 500}


class Colour(enum.Enum):
    red = "red"
    blue = "blue"


class Paint(BaseModel):
    colour: Colour
    litres: int = Field(ge=0, le=50)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_answer_fits_its_json_schema(client: OpenAI, seed: int) -> None:
    answer = chat(client, response_format=STRICT, seed=seed, **DRAWN)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content is not None
    jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)


@pytest.mark.parametrize("seed", SEEDS)
def test_json_object_gives_an_object_or_the_beginning_of_one(client: OpenAI, seed: int) -> None:
    closing = {str(token): 4 for token in range(20, 120)}  # single characters, the brackets among them: it gets done
    answer = chat(client, response_format={"type": "json_object"}, seed=seed, logit_bias=closing, **DRAWN)
    is_whole = answer.choices[0].finish_reason == "stop"
    written = (answer.choices[0].message.content or "").rstrip("\ufffd")
    assert isinstance(from_json(written, allow_partial=False if is_whole else "trailing-strings"), dict)


def test_parse_returns_a_pydantic_model(client: OpenAI) -> None:
    messages: Any = USER
    answer = client.chat.completions.parse(
        model=MODEL, messages=messages, response_format=Paint, temperature=1.0, seed=3, max_tokens=200
    )
    assert isinstance(answer.choices[0].message.parsed, Paint)


@pytest.mark.parametrize(
    ("wish", "pattern"),
    [
        ({"regex": r"[a-f]{3}-\d{2}"}, r"[a-f]{3}-\d{2}"),
        ({"choice": ["north", "south/east", "w.s.t"]}, r"north|south/east|w\.s\.t"),
        ({"grammar": 'start: "x" ("," NUMBER){2}\nNUMBER: /[0-9]/'}, r"x,\d,\d"),
        ({"json": {"type": "integer", "minimum": 10, "maximum": 99}}, r"\s*\d\d\s*"),
    ],
    ids=["regex", "choice", "grammar", "json"],
)
def test_structured_outputs_hold_for_chat_and_completions(client: OpenAI, wish: dict[str, Any], pattern: str) -> None:
    extra = {"structured_outputs": wish}
    for seed in SEEDS:
        answer = chat(client, extra_body=extra, seed=seed, **DRAWN)
        assert re.fullmatch(pattern, answer.choices[0].message.content or "")
        plain = client.completions.create(model=MODEL, prompt="Once", extra_body=extra, seed=seed, **DRAWN)
        assert re.fullmatch(pattern, plain.choices[0].text)
        assert answer.choices[0].finish_reason == plain.choices[0].finish_reason == "stop"


def test_reasoning_stands_in_front_of_a_schema(client: OpenAI, api_checkpoint: Any) -> None:
    added = json.loads((api_checkpoint / "tokenizer.json").read_text())["added_tokens"]
    think_end = next(token["id"] for token in added if token["content"] == "</think>")
    answer = chat(
        client, response_format=STRICT, reasoning_effort="high", seed=2, logit_bias={str(think_end): 12}, **DRAWN
    )
    message = answer.choices[0].message
    jsonschema.validate(json.loads(message.content or ""), SCHEMA)
    assert answer.usage is not None and answer.usage.completion_tokens_details is not None
    assert 1 <= (answer.usage.completion_tokens_details.reasoning_tokens or 0) < answer.usage.completion_tokens


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}},
            "response_format",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"extra_body": {"structured_outputs": {"regex": "(("}}}, "structured_outputs"),
        ({"extra_body": {"structured_outputs": {"grammar": "start: ???"}}}, "structured_outputs"),
        ({"extra_body": {"structured_outputs": {"regex": "a", "choice": ["b"]}}}, "structured_outputs"),
        ({"response_format": STRICT, "extra_body": {"structured_outputs": {"regex": "a"}}}, "structured_outputs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": NAMED}, "tool_choice"),
        (
            {
                "tools": [WEATHER],
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}},
            },
            "tool_choice",
        ),
    ],
    ids=["schema", "no schema", "regex", "grammar", "two wishes", "two ways", "no tools", "unknown", "not allowed"],
)
def test_wishes_that_cannot_be_met_are_400_and_name_the_parameter(
    client: OpenAI, fields: dict[str, Any], param: str
) -> None:
    for stream in (False, True):
        with pytest.raises(BadRequestError) as caught:
            chat(client, stream=stream, **fields)
        assert (caught.value.param or "").startswith(param), caught.value.message


def check_calls(calls: Any, names: set[str]) -> None:
    """Every call is whole, of a known tool, with arguments that fit its parameters."""
    assert calls
    tools = {tool["function"]["name"]: tool["function"]["parameters"] for tool in (WEATHER, ADD)}
    for call in calls:
        assert call.type == "function" and call.id.startswith("call_") and call.function.name in names
        jsonschema.validate(json.loads(call.function.arguments), tools[call.function.name])
    assert len({call.id for call in calls}) == len(calls)


@pytest.mark.parametrize("seed", SEEDS)
def test_required_and_named_choices_give_valid_calls(client: OpenAI, seed: int) -> None:
    tools = [WEATHER, ADD]
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}
    cases: list[tuple[dict[str, Any], set[str]]] = [
        ({"tool_choice": allowed, "parallel_tool_calls": False}, {"add"}),
        ({"tool_choice": "required", "parallel_tool_calls": False}, {"get_weather", "add"}),
        ({"tool_choice": NAMED, "parallel_tool_calls": False}, {"add"}),
        ({"tool_choice": "required"}, {"get_weather", "add"}),
    ]
    for fields, names in cases:
        answer = chat(client, tools=tools, seed=seed, **{**DRAWN, **fields})
        message = answer.choices[0].message
        check_calls(message.tool_calls, names)
        assert message.tool_calls is not None
        assert fields.get("parallel_tool_calls", True) or len(message.tool_calls) == 1
        if answer.choices[0].finish_reason != "length":
            assert answer.choices[0].finish_reason == "tool_calls" and not message.content


def test_arguments_stream_in_pieces_with_the_name_first(client: OpenAI) -> None:
    fields: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False, "seed": 4}
    chunks = chunks_of(client, **{**DRAWN, **fields})
    got = merged(chunks, 0)
    assert got["reasons"] == ["tool_calls"] and got["content"] == ""
    (call,) = got["calls"].values()
    assert call["name"] == "get_weather" and call["id"].startswith("call_") and call["type"] == "function"
    assert len([piece for piece in call["arguments"] if piece]) > 3
    jsonschema.validate(json.loads("".join(call["arguments"])), WEATHER["function"]["parameters"])
