"""What the OpenAPI document says of answers: their schemas and statuses, streams, and that a key may be asked for.

For the document only: answers are put together as dicts, and a test compares them with these schemas.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel

FinishReason = Literal["stop", "length", "tool_calls"]
Responses = dict[int | str, dict[str, Any]]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """OpenAI's error object."""

    error: ErrorDetail


class CachedTokens(BaseModel):
    cached_tokens: int


class ReasoningTokens(BaseModel):
    reasoning_tokens: int


class UsageAnswer(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens


class CalledFunction(BaseModel):
    name: str
    arguments: str


class CallAnswer(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str = ""
    tool_calls: list[CallAnswer] = []


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenWithOthers(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenWithOthers]
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatAnswer(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageAnswer


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class CompletionAnswer(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageAnswer


class ResponseAnswer(BaseModel):
    """OpenAI's response object; items of `output` are messages, function calls and reasoning."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["completed", "incomplete"]
    output: list[dict[str, Any]]
    usage: dict[str, Any]


class EmbeddingAnswer(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str  # str: base64 of little-endian fp32


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(BaseModel):
    object: Literal["list"]
    data: list[EmbeddingAnswer]
    model: str
    usage: EmbeddingUsage


class TokensAnswer(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]


class TextAnswer(BaseModel):
    prompt: str


class ModelAnswer(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelsAnswer(BaseModel):
    object: Literal["list"]
    data: list[ModelAnswer]


class LimitsAnswer(BaseModel):
    model: str
    max_model_len: int
    max_running_requests: int
    max_queue_size: int
    max_choices: int
    max_inputs: int
    max_stop_strings: int
    max_top_logprobs: int
    max_request_bytes: int
    request_timeout_s: float


class StatusAnswer(BaseModel):
    status: Literal["ok", "ready"]


_ERRORS: Mapping[int, str] = MappingProxyType(
    {
        400: "the request must be changed: the error names the parameter",
        401: "the API key is missing or wrong",
        404: "no such model or adapter, or not served here",
        408: "the body did not arrive in time",
        413: "the body is too large",
        429: "the queue is full: try again after Retry-After",
        503: "the engine is not ready or failed: try again after Retry-After",
        504: "the request's time is over",
    }
)
# one event; `data` is JSON, or [DONE] at the end of chat and completions
_EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
GENERATES = (400, 401, 404, 408, 413, 429, 503, 504)
READS_TEXT = (400, 401, 404, 408, 413)


def answers(model: type[BaseModel], errors: tuple[int, ...] = (), *, streams: bool = False) -> Responses:
    """What an endpoint may answer, for its decorator."""
    content = {"content": {"text/event-stream": {"schema": _EVENT}}} if streams else {}
    whole: Responses = {200: {"model": model, **content, "description": "with stream: events" if streams else "OK"}}
    return whole | {status: {"model": ErrorAnswer, "description": _ERRORS[status]} for status in errors}


def operation_id(route: APIRoute) -> str:
    """The endpoint's own name: short names in clients that are made from the document."""
    return route.name


def describe(app: FastAPI) -> None:
    """Take what FastAPI says of its own errors out of the document (ours are 400), and put keys in. Made on demand."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
            for path in made["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            components = made["components"]
            for name in ("HTTPValidationError", "ValidationError"):
                components["schemas"].pop(name, None)
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            made["security"] = [{}, {"key": []}]
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
