"""POST /v1/completions: prompts of text or ids, one or many, each with n choices out of best_of."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import orjson

from nmoe_backend.api.engine_client import TEXT_OUTPUTS, Delta
from nmoe_backend.api.errors import ApiError, bad_request, renamed
from nmoe_backend.api.generation import Deltas, Job, Usage, check_batch, check_choices
from nmoe_backend.api.http import DONE, EventStream, Json, event
from nmoe_backend.api.prompts import Prompt, as_many
from nmoe_backend.api.sampling import GUIDE_INPUT, guide_field, response_guide, sampling_inputs, seeds
from nmoe_backend.api.schemas import CompletionRequest
from nmoe_backend.api.service import Caller, Service
from nmoe_backend.text import REPLACEMENT, IncrementalDetokenizer, Text


async def create(service: Service, caller: Caller, body: CompletionRequest) -> EventStream | Json:
    """The answer to a checked body."""
    _check(body)
    adapter = service.adapter_of(body.model, body.adapter)
    best_of = body.best_of or body.n
    check_choices(best_of, service.settings.max_choices, "n" if body.best_of is None else "best_of")
    given = as_many(body.prompt)
    check_batch(len(given), best_of, "prompt")
    prompts = await service.prompts.of_many(given, "prompt")
    job = _job(service, caller, body, prompts, adapter)
    try:
        deltas = await caller.unless_gone(Deltas.start(service.engine, job))
    except ApiError as error:
        raise renamed(error, GUIDE_INPUT, guide_field(body)) from error
    answer = _Answer(body, prompts, service.text)
    if body.stream:
        return EventStream(answer.events(deltas), deltas.aclose, deltas.timeout_s)
    return Json(await caller.unless_gone(answer.whole(deltas)))


def _check(body: CompletionRequest) -> None:
    if body.suffix:
        raise bad_request(
            "suffix: is not served: the model was not trained to insert text. Leave it out, or put the text into the "
            "prompt.",
            "suffix",
        )
    best_of = body.n if body.best_of is None else body.best_of
    if best_of < body.n:
        raise bad_request(f"best_of: got {best_of}, need at least n = {body.n}. Raise it.", "best_of")
    if body.stream and best_of > body.n:
        raise bad_request(
            "best_of: cannot be streamed: the best are known at the end. Drop stream or best_of.", "best_of"
        )
    if body.max_tokens == 0 and not body.echo:
        raise bad_request("max_tokens: got 0 without echo, so there is nothing to answer. Raise it.", "max_tokens")


def _job(
    service: Service, caller: Caller, body: CompletionRequest, prompts: Sequence[Prompt], adapter: dict[str, str]
) -> Job:
    for prompt in prompts:
        service.prompts.check_room(prompt, body.max_tokens, "max_tokens")
    guide = response_guide(body.response_format, body.structured_outputs)
    inputs = {**sampling_inputs(body, max_tokens=body.max_tokens, guide=guide), **adapter}
    outputs = list(TEXT_OUTPUTS)
    best_of = body.best_of or body.n
    if body.logprobs is not None or best_of > body.n:
        inputs |= {"return_log_probs": True, "top_logprobs": body.logprobs or 0}
        outputs.append("logprobs")
    if body.logprobs is not None and body.echo:
        inputs["prompt_logprobs"] = max(1, body.logprobs)
        outputs.append("prompt_logprobs")
    return Job(
        request_id=caller.request_id,
        inputs=[{**inputs, **seed, "input_ids": one.ids} for one in prompts for seed in seeds(body, best_of)],
        outputs=outputs,
        timeout_s=service.timeout_s(body.timeout),
        at_once=service.settings.max_choices,
    )


class _Choice:
    """One continuation of one prompt."""

    def __init__(self, body: CompletionRequest, prompt: Prompt, tokens: Text) -> None:
        self._body, self._prompt, self._tokens = body, prompt, tokens
        self._text: list[str] = []
        self._detokenizer = IncrementalDetokenizer(tokens)  # special tokens stand in the list, but not in the text
        self._length = 0  # characters of text so far
        self._begun = False
        self._logprobs: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        self._sum, self._count = 0.0, 0
        self.finish_reason: str | None = None

    def feed(self, delta: Delta) -> tuple[str, dict[str, list[Any]] | None]:
        """(text, logprobs) that one response adds, the echoed prompt in front of the first."""
        text, logprobs = delta.text_output, None
        entries = orjson.loads(delta.logprobs) if delta.logprobs else []
        self._sum += sum(entry["logprob"] for entry in entries)
        self._count += len(entries)
        if self._body.logprobs is not None:
            prompt_entries = orjson.loads(delta.prompt_logprobs) if delta.prompt_logprobs else []
            logprobs = self._columns([*self._echoed(prompt_entries), *entries])
            for name, column in logprobs.items():
                self._logprobs[name] += column
        if self._body.echo and not self._begun:
            text = self._prompt.text + text
        self._begun = True
        self._text.append(text)
        self.finish_reason = delta.finish_reason or None
        return text, logprobs

    def as_json(self, index: int) -> dict[str, Any]:
        """The whole choice."""
        return {
            "index": index,
            "text": "".join(self._text),
            "logprobs": self._logprobs if self._body.logprobs is not None else None,
            "finish_reason": self.finish_reason,
        }

    @property
    def score(self) -> float:
        """The mean log-probability of its tokens: what best_of compares."""
        return self._sum / max(1, self._count)

    def _echoed(self, entries: list[Any]) -> list[Any]:
        """Prompt tokens; the first (null) has no logprob: nothing stands before it."""
        first = self._prompt.ids[0]
        token = self._tokens.raw_token_bytes(first).decode("utf-8", "replace")
        unknown = {"token_id": first, "token": token, "logprob": None, "top_logprobs": None}
        return [unknown if entry is None else entry for entry in entries]

    def _columns(self, entries: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
        offsets = []
        for entry in entries:
            held, _ = self._detokenizer.state()
            text = self._detokenizer.feed([entry["token_id"]])
            # an incomplete character that this token does not continue stands in front of it
            offsets.append(self._length + bool(held and text.startswith(REPLACEMENT)))
            self._length += len(text)
        most = self._body.logprobs or 0
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [_top(entry, most) for entry in entries],
            "text_offset": offsets,
        }


class _Answer:
    """Puts one request's answer together. Generation g continues prompt g // best_of."""

    def __init__(self, body: CompletionRequest, prompts: Sequence[Prompt], tokens: Text) -> None:
        self._body = body
        self._best_of = body.best_of or body.n
        self._choices = [_Choice(body, prompt, tokens) for prompt in prompts for _ in range(self._best_of)]
        self._usage = Usage()
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
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
        best: list[_Choice] = []
        for first in range(0, len(self._choices), self._best_of):
            of_prompt = self._choices[first : first + self._best_of]
            if self._best_of > self._body.n:
                of_prompt.sort(key=lambda choice: -choice.score)
            best += of_prompt[: self._body.n]
        choices = [choice.as_json(index) for index, choice in enumerate(best)]
        return {**self._head, "choices": choices, "usage": self._usage.as_json()}

    async def events(self, deltas: Deltas) -> AsyncIterator[bytes]:
        """The chunks of a streamed answer."""
        options = self._body.stream_options
        num_running, out = len(self._choices), b""
        async for index, delta in deltas:
            text, logprobs = self._feed(index, delta)
            reason = self._choices[index].finish_reason
            num_running -= reason is not None
            if text or reason or (logprobs and logprobs["tokens"]):
                choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
                out = event({**self._head, "choices": [choice], **self._usage.in_chunk(options)})
            if out and num_running:  # the last one's end leaves with what follows it
                yield out
                out = b""
        end = self._usage.at_end(options)
        yield out + (b"" if end is None else event({**self._head, **end})) + DONE

    def _feed(self, index: int, delta: Delta) -> tuple[str, dict[str, list[Any]] | None]:
        self._usage.add(index // self._best_of, delta)
        return self._choices[index].feed(delta)


def _top(entry: dict[str, Any], most: int) -> dict[str, float] | None:
    """The likeliest tokens and the chosen one, as OpenAI returns them."""
    if entry["logprob"] is None:
        return None
    top = {one["token"]: one["logprob"] for one in entry["top_logprobs"][:most]}
    return top | {entry["token"]: entry["logprob"]}
