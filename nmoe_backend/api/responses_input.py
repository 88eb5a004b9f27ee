"""From a body of POST /v1/responses to the chat request that means the same, and its complaints back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from nmoe_backend.api.errors import ApiError, bad_request, renamed
from nmoe_backend.api.responses_schemas import (
    LOGPROBS,
    REFUSED,
    AllowedTools,
    FunctionCallItem,
    FunctionCallOutputItem,
    FunctionChoice,
    Item,
    MessageItem,
    Part,
    ReasoningItem,
    ResponsesRequest,
    SchemaFormat,
    ToolChoice,
)
from nmoe_backend.api.schemas import (
    AllowedFunctions,
    AllowedToolChoice,
    ChatRequest,
    FunctionCall,
    FunctionTool,
    Generation,
    JsonSchema,
    Message,
    NamedFunction,
    NamedToolChoice,
    ResponseFormat,
    TextPart,
    Tool,
    ToolCall,
)
from nmoe_backend.api.validation import shown

_SAME = (*(name for name in Generation.model_fields if name != "stream"), "parallel_tool_calls")
# what a chat request calls it -> what this one does
_NAMES: Mapping[str, str] = MappingProxyType(
    {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format"}
)


def as_chat(body: ResponsesRequest) -> ChatRequest:
    """The same wishes in a chat request's words. ApiError 400 for what is not served."""
    _refuse(body)
    fields: dict[str, Any] = {name: getattr(body, name) for name in _SAME if name in body.model_fields_set}
    fields["tool_choice"] = _tool_choice(body.tool_choice)
    if body.tools:
        fields["tools"] = [
            Tool(type="function", function=FunctionTool(**tool.model_dump(exclude={"type"}))) for tool in body.tools
        ]
    if body.max_output_tokens is not None:
        fields["max_completion_tokens"] = body.max_output_tokens
    if LOGPROBS in (body.include or ()):
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    if body.reasoning is not None:
        fields["reasoning_effort"] = body.reasoning.effort
    return ChatRequest(messages=_messages(body), response_format=_format(body), **fields)


def in_our_terms(error: ApiError) -> ApiError:
    """A complaint about the chat request, about the body that was sent."""
    name = _NAMES.get(error.param or "")
    return error if name is None else renamed(error, error.param or "", name)


def _refuse(body: ResponsesRequest) -> None:
    for name, reason in REFUSED.items():
        value = getattr(body, name)
        if value and value != "disabled":
            raise bad_request(f"{name}: got {shown(value)}, but {reason}", name, "unsupported_parameter")
    if body.top_logprobs and LOGPROBS not in (body.include or ()):
        raise bad_request(
            f'top_logprobs: needs include = ["{LOGPROBS}"]. Add it, or leave top_logprobs out.', "top_logprobs"
        )


def _messages(body: ResponsesRequest) -> list[Message]:
    """The instructions, then the items; what the assistant says, thinks and calls in a row is one message."""
    messages = [] if body.instructions is None else [Message(role="system", content=body.instructions)]
    if isinstance(body.input, str):
        return [*messages, Message(role="user", content=body.input)]
    for item in body.input:
        match item:
            case MessageItem(role="user" | "system" | "developer" as role):
                messages.append(Message(role=role, content=_text(item.content)))
            case FunctionCallOutputItem():
                messages.append(Message(role="tool", content=_text(item.output), tool_call_id=item.call_id))
            case _:
                if not messages or messages[-1].role != "assistant":
                    messages.append(Message(role="assistant"))
                _add(messages[-1], item)
    return messages


def _add(turn: Message, item: Item) -> None:
    """One more item of the assistant's turn."""
    match item:
        case MessageItem():
            assert not isinstance(turn.content, list), "a turn is put together from strings"
            turn.content = (turn.content or "") + _text(item.content)
        case FunctionCallItem():
            function = FunctionCall(name=item.name, arguments=item.arguments)
            turn.tool_calls = [*(turn.tool_calls or []), ToolCall(id=item.call_id, function=function)]
        case ReasoningItem():
            thought = "".join(part.text for part in item.content or ())
            turn.reasoning_content = (turn.reasoning_content or "") + thought or None


def _text(content: str | Sequence[Part]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)


def _tool_choice(choice: ToolChoice | None) -> str | NamedToolChoice | AllowedToolChoice | None:
    match choice:
        case FunctionChoice():
            return _named(choice)
        case AllowedTools():
            allowed = AllowedFunctions(mode=choice.mode, tools=[_named(tool) for tool in choice.tools])
            return AllowedToolChoice(type="allowed_tools", allowed_tools=allowed)
        case _:
            return choice


def _named(choice: FunctionChoice) -> NamedToolChoice:
    return NamedToolChoice(type="function", function=NamedFunction(name=choice.name))


def _format(body: ResponsesRequest) -> ResponseFormat | None:
    wanted = body.text.format if body.text is not None else None
    if wanted is None:
        return None
    if not isinstance(wanted, SchemaFormat):
        return ResponseFormat(type=wanted.type)
    schema = JsonSchema(**wanted.model_dump(exclude={"type"}, by_alias=True))
    return ResponseFormat(type="json_schema", json_schema=schema)
