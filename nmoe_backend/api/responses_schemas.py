"""The body of POST /v1/responses, as pydantic models. Nothing is stored: what would need a store is refused."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Tag
from pydantic_core import PydanticCustomError

from nmoe_backend.api.schemas import (
    Body,
    Echoed,
    FunctionTool,
    Generation,
    Inert,
    Items,
    JsonObject,
    JsonSchema,
    List,
    ReasoningEffort,
    RefusalPart,
    TextPart,
    by_type,
)
from nmoe_backend.types import MAX_TOP_LOGPROBS

LOGPROBS = "message.output_text.logprobs"
_STATELESS = "nothing is stored here. Send the whole conversation in input."
# Fields that would change the answer and are not served; what is empty, false or "disabled" asks for nothing.
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "previous_response_id": _STATELESS,
        "conversation": _STATELESS,
        "prompt": "prompt templates are not stored here. Send instructions and input.",
        "background": "a response ends with its connection. Use stream, or a longer timeout.",
        "truncation": "nothing is cut off silently. Leave it out, and shorten an input that is too long.",
        "context_management": "nothing is compacted here. Shorten the input.",
        "moderation": "nothing is moderated here. Leave it out.",
    }
)
Status = Literal["in_progress", "completed", "incomplete"]


class ItemText(TextPart):
    """Text in an item; what an answer says beside it may come back and changes nothing."""

    logprobs: List[Any] | None = None
    prompt_cache_breakpoint: JsonObject | None = None


Part = Annotated[
    Annotated[ItemText, Tag("Text")] | Annotated[RefusalPart, Tag("Refusal")],
    by_type(
        "a part of type input_text, output_text or refusal: this model reads and writes text",
        {"text": "Text", "input_text": "Text", "output_text": "Text", "refusal": "Refusal"},
    ),
]


class _Item(Echoed):
    id: str | None = None
    status: Status | None = None


class MessageItem(_Item):
    """A message of any turn, an answer's own form included."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: str | List[Part]
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCallItem(_Item):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    namespace: None = None
    caller: None = None


class FunctionCallOutputItem(_Item):
    """What a call came to."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | List[Part]
    name: str | None = None
    namespace: None = None
    caller: None = None


class ReasoningText(Echoed):
    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(_Item):
    """What the model thought in an earlier turn; the chat template decides whether it reads it again."""

    type: Literal["reasoning"]
    content: List[ReasoningText] | None = None
    summary: List[ReasoningText] | None = None
    encrypted_content: None = None  # nobody else's can be read


Item = Annotated[
    Annotated[MessageItem, Tag("Message")]
    | Annotated[FunctionCallItem, Tag("Call")]
    | Annotated[FunctionCallOutputItem, Tag("Output")]
    | Annotated[ReasoningItem, Tag("Reasoning")],
    by_type(
        "an item of type message, function_call, function_call_output or reasoning: nothing is stored here, and there "
        "are no built-in tools",
        {
            "message": "Message",
            "function_call": "Call",
            "function_call_output": "Output",
            "reasoning": "Reasoning",
        },
        default="message",
    ),
]


def _is_function(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type", "function") != "function":
        raise PydanticCustomError(
            "no_such_tool", "Input should be a tool of type function: there are no built-in tools"
        )
    return value


class FlatTool(FunctionTool):
    """A function, its fields beside the type."""

    type: Literal["function"]


class FunctionChoice(Body):
    type: Literal["function"]
    name: str


class AllowedTools(Body):
    """Some of the tools; the others might as well not be there."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Items[FunctionChoice]


ToolChoice = (
    Annotated[
        Annotated[FunctionChoice, Tag("Function")] | Annotated[AllowedTools, Tag("Allowed")],
        by_type(
            "auto, none, required, or an object of type function or allowed_tools",
            {"function": "Function", "allowed_tools": "Allowed"},
        ),
    ]
    | Literal["auto", "none", "required"]
)


class PlainFormat(Body):
    type: Literal["text", "json_object"]


class SchemaFormat(JsonSchema):
    type: Literal["json_schema"]


class TextConfig(Body):
    format: (
        Annotated[
            Annotated[PlainFormat, Tag("Plain")] | Annotated[SchemaFormat, Tag("Schema")],
            by_type(
                "an object of type text, json_object or json_schema",
                {"text": "Plain", "json_object": "Plain", "json_schema": "Schema"},
            ),
        ]
        | None
    ) = None
    verbosity: Literal["low", "medium", "high"] | None = None  # changes nothing: the model knows no such setting


class ReasoningConfig(Body):
    effort: ReasoningEffort | None = None  # none and minimal: no reasoning
    summary: Literal["auto", "concise", "detailed"] | None = None  # changes nothing: the reasoning itself is returned
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponseStreamOptions(Body):
    include_obfuscation: bool | None = None  # accepted: nothing is obfuscated


class ResponsesRequest(Generation, Inert):
    """POST /v1/responses."""

    input: Items[Item] | str
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    include: List[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    tools: Annotated[List[Annotated[FlatTool, BeforeValidator(_is_function)]], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = Field(None, ge=1)  # of built-in tools, of which there are none
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    stream_options: ResponseStreamOptions | None = None
    prompt_cache_options: JsonObject | None = None
    previous_response_id: str | None = Field(None, description="refused: nothing is stored")
    conversation: str | JsonObject | None = Field(None, description="refused: nothing is stored")
    prompt: JsonObject | None = Field(None, description="refused: nothing is stored")
    background: bool | None = Field(None, description="true is refused")
    truncation: Literal["auto", "disabled"] | None = Field(None, description="auto is refused")
    context_management: List[JsonObject] | None = Field(None, description="refused")
    moderation: JsonObject | None = Field(None, description="refused")
