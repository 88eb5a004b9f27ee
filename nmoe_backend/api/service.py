"""What the endpoints of one worker process share: the model's text, its formats and limits, the way to the engine."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from fastapi import Request

from nmoe_backend.api import http
from nmoe_backend.api.engine_client import EngineClient
from nmoe_backend.api.errors import ApiError, bad_request, of_request_error
from nmoe_backend.api.guides import Guide, Offer, compose
from nmoe_backend.api.parsers import OutputParser, detect_formats, make_parser
from nmoe_backend.api.parsers.dsml import DSML
from nmoe_backend.api.parsers.reasoning import THINK, THINK_END, reasoning_at
from nmoe_backend.api.prompts import Prompt, Prompts
from nmoe_backend.api.validation import shown
from nmoe_backend.config import ServeConfig
from nmoe_backend.openai_config import OpenAIConfig
from nmoe_backend.text import Text
from nmoe_backend.types import ConfigError, RequestError

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """One HTTP request, as far as an endpoint needs to know it."""

    request: Request
    request_id: str

    async def unless_gone(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """The result of `work`; cancelled when the client disconnects."""
        return await http.unless_gone(self.request.receive, work)


class Service:
    """One model behind one engine. For one event loop; `close` ends its connections."""

    def __init__(self, config: ServeConfig, text: Text, engine: EngineClient) -> None:
        self.config, self.text, self.engine = config, text, engine
        self.settings: OpenAIConfig = config.openai
        self.prompts = Prompts(text, config.max_seq_len)
        self._tool_format, self._reasoning_format = _formats(config.openai, text)
        begin_id, end_id = _token_id(text, THINK), _token_id(text, THINK_END)
        self._markers = None  # ids of <think> and </think>: where they are tokens, reasoning can be counted
        if self._reasoning_format is not None and begin_id is not None and end_id is not None:
            self._markers = (begin_id, end_id)
        self._dsml_token_id = _token_id(text, DSML)

    @property
    def reasoning_outputs(self) -> tuple[str, ...]:
        """Outputs that are needed to count the tokens of reasoning."""
        return () if self._markers is None else ("output_ids",)

    def adapter_of(self, model: str, adapter: str | None) -> dict[str, str]:
        """The tensor that names an adapter: `adapter`, or what follows the colon of `model`. ApiError 404 or 400."""
        base, colon, named = model.partition(":")
        if model != self.config.model_name and (base != self.config.model_name or not (colon and named)):
            raise self.unknown_model(model)
        if model != self.config.model_name and adapter and adapter != named:
            raise bad_request(
                f"adapter: got {shown(adapter)}, but model names {shown(named)}. Send one of them.", "adapter"
            )
        name = adapter or (named if model != self.config.model_name else "")
        return {"adapter": name} if name else {}

    def unknown_model(self, model: str) -> ApiError:
        """404, as OpenAI words it."""
        return ApiError(
            404,
            f"the model {shown(model)} does not exist here. Use {self.config.model_name!r}.",
            param="model",
            code="model_not_found",
        )

    def timeout_s(self, asked: float | None) -> float:
        """What a request may take."""
        return min(asked or self.settings.request_timeout_s, self.settings.request_timeout_s)

    def parser(self, prompt: Prompt, *, has_tools: bool) -> OutputParser:
        """Reads one choice's text."""
        return make_parser(
            tool_format=self._tool_format if has_tools else None,
            reasoning_format=self._reasoning_format,
            prompt=prompt.text,
        )

    def reasoning_counter(self, prompt: Prompt) -> ReasoningCounter:
        """Counts one choice's tokens of reasoning."""
        if self._markers is None:
            return ReasoningCounter("closed", (-1, -1), self.text)
        return ReasoningCounter(reasoning_at(prompt.text), self._markers, self.text)

    def guide(self, prompt: Prompt, response_guide: Guide | None, offer: Offer) -> Guide | None:
        """What constrains the text, if anything does. ApiError 400 where the wishes cannot be met."""
        reasoning = reasoning_at(prompt.text) if self._reasoning_format is not None else "closed"
        try:
            return compose(
                response_guide=response_guide,
                offer=offer,
                tool_format=self._tool_format,
                starts_in_reasoning=reasoning == "open",
                may_reason=reasoning != "closed",
                dsml_token_id=self._dsml_token_id,
            )
        except RequestError as error:
            raise of_request_error(error) from error

    async def close(self) -> None:
        """End the connections."""
        await self.engine.close()


class ReasoningCounter:
    """Counts the tokens of one choice up to and with the one that ends its reasoning."""

    def __init__(self, state: Literal["open", "closed", "possible"], markers: tuple[int, int], text: Text) -> None:
        self._state, self._text = state, text
        self._begin_id, self._end_id = markers
        self._space = 0  # tokens of white space, which may stand in front of <think>

    def count(self, ids: Sequence[int]) -> int:
        """How many of these are reasoning."""
        count = 0
        for token_id in ids:
            if self._state == "closed":
                break
            if self._state == "open":
                count += 1
                if token_id == self._end_id:
                    self._state = "closed"
            elif token_id == self._begin_id:
                self._state = "open"
                count += self._space + 1
            elif self._text.token_bytes(token_id).isspace():
                self._space += 1
            else:
                self._state = "closed"
        return count


def _token_id(text: Text, marker: str) -> int | None:
    """The id of a marker that is one token."""
    ids = text.encode_plain(marker)
    return ids[0] if len(ids) == 1 else None


def _formats(settings: OpenAIConfig, text: Text) -> tuple[str | None, str | None]:
    """(tool format, reasoning format): as configured, where `auto` asks the chat template."""
    found = detect_formats(text.chat_template_source)
    configured = (settings.tool_format, settings.reasoning_format)
    tool_format, reasoning_format = (
        detected if name == "auto" else None if name == "none" else name
        for name, detected in zip(configured, found, strict=True)
    )
    return tool_format, reasoning_format


def make_service(config: ServeConfig, triton: str) -> Service:
    """For `HOST:PORT` of Triton's gRPC. To be called in the event loop that will use it. ConfigError."""
    text = Text(config.model_path, chat_template=config.openai.chat_template)
    if not triton.rpartition(":")[2].isdigit():
        raise ConfigError(f"got {triton!r} for Triton's address, need HOST:PORT of its gRPC port, such as host:8001.")
    return Service(config, text, EngineClient(triton))
