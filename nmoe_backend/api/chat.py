"""POST /v1/chat/completions: streamed and whole answers from the same deltas."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import orjson

from nmoe_backend.api.engine_client import TEXT_OUTPUTS, Delta
from nmoe_backend.api.errors import ApiError, bad_request, of_request_error, renamed
from nmoe_backend.api.generation import Deltas, Job, Usage, check_choices
from nmoe_backend.api.guides import Guide, Offer, ToolChoice, offer
from nmoe_backend.api.http import DONE, EventStream, Json, event
from nmoe_backend.api.parsers import OutputParser
from nmoe_backend.api.parsers.events import (
    Content,
    Reasoning,
    ToolCallArguments,
    ToolCallBegin,
    ToolCallBroken,
    ToolCallEnd,
)
from nmoe_backend.api.prompts import Prompt, functions
from nmoe_backend.api.sampling import GUIDE_INPUT, guide_field, response_guide, sampling_inputs, seeds
from nmoe_backend.api.schemas import AllowedToolChoice, ChatRequest, NamedToolChoice
from nmoe_backend.api.service import Caller, ReasoningCounter, Service
from nmoe_backend.api.validation import shown
from nmoe_backend.types import RequestError


class Choice:
    """One choice as it grows. `feed` returns what to stream; `message` is the same, put together."""

    def __init__(self, parser: OutputParser) -> None:
        self._parser = parser
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, dict[str, Any]] = {}
        self._finished_calls = 0
        self.logprobs: list[Any] = []
        self.finish_reason: str | None = None

    def feed(self, delta: Delta) -> list[dict[str, Any]]:
        """Deltas of OpenAI's form for what one response of the engine adds."""
        events = self._parser.feed(delta.text_output) if delta.text_output else []
        if delta.finish_reason:
            events += self._parser.finish()
        parts = [part for part in map(self._part, events) if part is not None]
        if delta.finish_reason:
            has_calls = self._finished_calls and delta.finish_reason == "stop"
            self.finish_reason = "tool_calls" if has_calls else delta.finish_reason
        return parts

    def message(self) -> dict[str, Any]:
        """The assistant's message. A call that never became whole stands in the content, as the model wrote it."""
        calls = list(self._calls.values())
        message: dict[str, Any] = {
            "role": "assistant",
            "content": "".join(self._content) or (None if calls else ""),
            "refusal": None,
        }
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if calls:
            message["tool_calls"] = calls
        return message

    def _part(self, one: object) -> dict[str, Any] | None:
        match one:
            case Content(text):
                self._content.append(text)
                return {"content": text}
            case Reasoning(text):
                self._reasoning.append(text)
                return {"reasoning_content": text}
            case ToolCallBegin(index, name):
                call = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
                self._calls[index] = {**call, "function": {"name": name, "arguments": ""}}
                return {"tool_calls": [{"index": index, **call, "function": {"name": name, "arguments": ""}}]}
            case ToolCallArguments(index, text):
                self._calls[index]["function"]["arguments"] += text
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
            case ToolCallEnd():
                self._finished_calls += 1
            case ToolCallBroken(index):
                del self._calls[index]
        return None


async def create(service: Service, caller: Caller, body: ChatRequest) -> EventStream | Json:
    """The answer to a checked body."""
    deltas, parsers, counters = await begin(service, caller, body)
    answer = _Answer(body, parsers, counters)
    if body.stream:
        return EventStream(answer.events(deltas), deltas.aclose, deltas.timeout_s)
    return Json(await caller.unless_gone(answer.whole(deltas)))


async def begin(
    service: Service, caller: Caller, body: ChatRequest
) -> tuple[Deltas, list[OutputParser], list[ReasoningCounter]]:
    """What the engine answers, its first response waited for, and who reads it: one of each a choice."""
    adapter = service.adapter_of(body.model, body.adapter)
    check_choices(body.n, service.settings.max_choices)
    tools = _offer(body)
    prompt = await service.prompts.of_chat(body, tools.tools)
    parsers = [service.parser(prompt, has_tools=bool(tools.tools)) for _ in range(body.n)]
    counters = [service.reasoning_counter(prompt) for _ in parsers]
    guide = service.guide(prompt, response_guide(body.response_format, body.structured_outputs), tools)
    job = _job(service, caller, body, prompt, guide, adapter)
    try:
        deltas = await caller.unless_gone(Deltas.start(service.engine, job))
    except ApiError as error:
        raise renamed(error, GUIDE_INPUT, guide_field(body, tools.is_forced)) from error
    return deltas, parsers, counters


def logprob_entries(delta: Delta) -> list[dict[str, Any]]:
    """The tokens of one response, as OpenAI lists them: without their ids."""
    entries = orjson.loads(delta.logprobs) if delta.logprobs else []
    return [
        {**_without_id(entry), "top_logprobs": [_without_id(one) for one in entry["top_logprobs"]]} for entry in entries
    ]


def _without_id(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in ("token", "logprob", "bytes")}


def _job(
    service: Service, caller: Caller, body: ChatRequest, prompt: Prompt, guide: Guide | None, adapter: dict[str, str]
) -> Job:
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise bad_request("max_tokens: got another max_completion_tokens. Send one of them.", "max_tokens")
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs: needs logprobs = true. Add it, or leave top_logprobs out.", "top_logprobs")
    length_field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    max_tokens = getattr(body, length_field)
    service.prompts.check_room(prompt, max_tokens, length_field)
    inputs = {
        **sampling_inputs(body, max_tokens=max_tokens, guide=guide),
        **adapter,
        "input_ids": prompt.ids,
    }
    outputs = [*TEXT_OUTPUTS, *service.reasoning_outputs]
    if body.logprobs:
        inputs |= {"return_log_probs": True, "top_logprobs": body.top_logprobs or 0}
        outputs.append("logprobs")
    return Job(
        request_id=caller.request_id,
        inputs=[{**inputs, **seed} for seed in seeds(body, body.n)],
        outputs=outputs,
        timeout_s=service.timeout_s(body.timeout),
        at_once=service.settings.max_choices,
    )


def _offer(body: ChatRequest) -> Offer:
    wish, tools = body.tool_choice, functions(body.tools)
    choice: ToolChoice | None
    match wish:
        case NamedToolChoice():
            choice = {"name": wish.function.name}
        case AllowedToolChoice():
            choice = wish.allowed_tools.mode
            tools = _allowed(tools, {tool.function.name for tool in wish.allowed_tools.tools})
        case _:
            choice = wish
    try:
        return offer(tools, choice, body.parallel_tool_calls is not False)
    except RequestError as error:
        raise of_request_error(error) from error


def _allowed(tools: list[dict[str, object]], names: set[str]) -> list[dict[str, object]]:
    """Those of these names. ApiError 400 for a name that no tool has."""
    unknown = names - {str(tool["name"]) for tool in tools}
    if unknown:
        raise bad_request(f"tool_choice: got {shown(min(unknown))} in tools, need names of tools.", "tool_choice")
    return [tool for tool in tools if tool["name"] in names]


class _Answer:
    """Puts one request's answer together."""

    def __init__(
        self, body: ChatRequest, parsers: Sequence[OutputParser], counters: Sequence[ReasoningCounter]
    ) -> None:
        self._body = body
        self._choices = [Choice(parser) for parser in parsers]
        self._usage = Usage()
        self._reasoning = counters
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body.model,
        }

    async def whole(self, deltas: Deltas) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        try:
            async for index, delta in deltas:
                self._feed(index, delta)
        finally:
            await deltas.aclose()
        choices = [
            {
                "index": index,
                "message": choice.message(),
                "logprobs": {"content": choice.logprobs, "refusal": None} if self._body.logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self._choices)
        ]
        return {**self._head, "choices": choices, "usage": self._usage.as_json()}

    async def events(self, deltas: Deltas) -> AsyncIterator[bytes]:
        """The chunks of a streamed answer; those of one response of the engine leave together."""
        head = {**self._head, "object": "chat.completion.chunk"}
        options = self._body.stream_options

        def chunk(index: int, delta: dict[str, Any], logprobs: object = None, reason: str | None = None) -> bytes:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return event({**head, "choices": [choice], **self._usage.in_chunk(options)})

        # of all choices, in order, whichever speaks first: the SDK's helper counts on that
        role = {"role": "assistant", "content": "", "refusal": None}
        out = [chunk(index, role) for index in range(len(self._choices))]
        num_running = len(self._choices)
        async for index, delta in deltas:
            parts, entries = self._feed(index, delta)
            if entries and not parts:
                parts = [{"content": ""}]  # the text is held back; the logprobs are not
            for part in parts:
                out.append(chunk(index, part, {"content": entries, "refusal": None} if entries else None))
                entries = []
            if delta.finish_reason:
                out.append(chunk(index, {}, None, self._choices[index].finish_reason))
                num_running -= 1
            if out and num_running:  # the last one's end leaves with what follows it
                yield b"".join(out)
                out = []
        end = self._usage.at_end(options)
        if end is not None:
            out.append(event({**head, **end}))
        yield b"".join((*out, DONE))

    def _feed(self, index: int, delta: Delta) -> tuple[list[dict[str, Any]], list[Any]]:
        """(deltas, logprobs entries) of one response."""
        self._usage.add(0, delta)
        self._usage.reasoning += self._reasoning[index].count(delta.output_ids)
        choice = self._choices[index]
        entries = logprob_entries(delta)
        choice.logprobs += entries
        return choice.feed(delta), entries
