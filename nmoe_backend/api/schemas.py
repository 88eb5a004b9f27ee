"""The bodies of requests, as pydantic models: OpenAI's fields and vLLM's usual extensions. The OpenAPI page shows them.

Unknown fields are errors. Fields of OpenAI's API that cannot change an answer here (`store`, `metadata`, ...) are
accepted, and so are values that ask for nothing (`HARMLESS`, null); those that would change it, and are not served, are
refused with a reason (validation.py). What clients echo back of an answer (messages) may hold more than we wrote.

However wrong a body is, few complaints come of it: lists end at their first wrong item (`fail_fast`), of unknown
fields only the first is kept, and objects with free keys are counted before they are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from nmoe_backend.contract_inputs import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, MAX_STOP_WORDS
from nmoe_backend.types import MAX_TOP_LOGPROBS


def _few_keys(value: Any) -> Any:
    """Before pydantic looks at every one of them."""
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise PydanticCustomError("too_many", f"Input should be an object of at most {MAX_LOGIT_BIAS} keys")
    return value


ItemT = TypeVar("ItemT")
ValueT = TypeVar("ValueT")
List = Annotated[list[ItemT], Field(fail_fast=True)]
Items = Annotated[list[ItemT], Field(fail_fast=True, min_length=1)]
FewKeys = Annotated[dict[str, ValueT], BeforeValidator(_few_keys)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
JsonObject = dict[str, Any]
TextOrIds = str | Items[TokenId] | Items[str] | Items[Items[TokenId]]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

_MOST_EXACT = 2.0**53  # of floats, beyond which not every integer is one; and orjson writes none beyond 64 bits
_ANY = ("any value",)
# Fields of OpenAI's and vLLM's clients that an endpoint does not have -> values with which they ask for nothing.
HARMLESS: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "include_stop_str_in_output": (False,),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "echo": (False,),
        "best_of": (1,),
        "length_penalty": (1,),
        "use_beam_search": (False,),
        "functions": ([],),
        "function_call": ("none",),
        "include_reasoning": (True,),
        "separate_reasoning": (True,),
        "return_token_ids": (False,),
        "prompt_logprobs": (0,),
        "extra_body": ({},),
        "verbosity": _ANY,
        "prompt_cache_options": _ANY,
        "request_id": _ANY,
        "cache_salt": _ANY,
    }
)


def by_type(needs: str, tags: Mapping[str, str], default: str = "") -> Discriminator:
    """Members of a union by their field `type`. Tags begin in upper case: errors leave them out of a field's name."""

    def tag(value: Any) -> str | None:
        given = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
        return tags.get(default if given is None else given) if given is None or isinstance(given, str) else None

    return Discriminator(tag, custom_error_type="no_such_type", custom_error_message=f"Input should be {needs}")


class Body(BaseModel):
    """What every body does: refuse what it does not know, and convert nothing silently."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _as_meant(cls, data: Any) -> Any:
        """Without nulls (as left out) and harmless fields; 100.0 is an integer: JSON has one kind of number."""
        if not isinstance(data, dict):
            return data
        fields = {field.alias or name: field for name, field in cls.model_fields.items()}
        meant, unknown = {}, 0
        for name, value in data.items():
            if value is None:
                continue
            if name in fields:
                kind = fields[name].annotation
                may_be_int = isinstance(value, float) and abs(value) <= _MOST_EXACT and int in (kind, *get_args(kind))
                is_whole = may_be_int and value.is_integer()
                meant[name] = int(value) if is_whole else value
            elif not _asks_for_nothing(name, value) and not unknown:
                meant[name] = value
                unknown = 1
        return meant


def _asks_for_nothing(name: str, value: Any) -> bool:
    harmless = HARMLESS.get(name, ())
    return harmless is _ANY or any(
        value == one and isinstance(value, bool) == isinstance(one, bool) for one in harmless
    )


class Echoed(Body):
    """Part of an earlier answer: clients add to it (`parsed`, `provider_specific_fields`, ...) and mean nothing."""

    model_config = ConfigDict(extra="ignore")


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's: the usage so far in every chunk
    include_obfuscation: bool | None = None  # accepted: nothing is obfuscated


class JsonSchema(Body):
    name: str = "schema"
    description: str | None = None
    schema_: JsonObject = Field(alias="schema")
    strict: bool | None = None  # always strict: the grammar is enforced


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """vLLM's `structured_outputs`: exactly one of them."""

    json_: JsonObject | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Items[str] | None = None
    grammar: str | None = None


class Generation(Body):
    """What every endpoint that generates shares."""

    model: str
    adapter: str | None = None
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)  # 0: greedy
    seed: int | None = Field(None, ge=-(2**63), le=2**64 - 1)
    priority: int = Field(0, ge=0, le=2**32 - 1, description="higher goes first")
    timeout: float | None = Field(None, gt=0, le=86400, description="seconds")
    user: str | None = None


class Sampling(Generation):
    """What chat and completions share."""

    n: int = Field(1, ge=1, le=128)
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=0, le=2**31 - 1)
    min_tokens: int = Field(0, ge=0, le=2**31 - 1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    logit_bias: FewKeys[Annotated[float, Field(ge=-100, le=100)]] | None = None
    bad_words: List[str] | None = None
    stop: str | Annotated[List[str], Field(max_length=MAX_STOP_WORDS)] | None = None
    stop_token_ids: Annotated[List[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None


class TextPart(Echoed):
    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: List[Any] | None = None


class RefusalPart(Echoed):
    type: Literal["refusal"]
    refusal: str


class FunctionCall(Echoed):
    name: str
    arguments: str


class ToolCall(Echoed):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(Echoed):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | List[TextPart | RefusalPart] | None = None
    name: str | None = None
    tool_calls: List[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    annotations: List[Any] | None = None
    audio: None = None
    function_call: None = None


class FunctionTool(Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: FunctionTool


class NamedFunction(Body):
    name: str


class NamedToolChoice(Body):
    type: Literal["function"]
    function: NamedFunction


class AllowedFunctions(Body):
    mode: Literal["auto", "required"]
    tools: Items[NamedToolChoice]


class AllowedToolChoice(Body):
    """Some of the tools; the others might as well not be there."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedFunctions


ToolChoice = (
    Annotated[
        Annotated[NamedToolChoice, Tag("Named")] | Annotated[AllowedToolChoice, Tag("Allowed")],
        by_type(
            "auto, none, required, or an object of type function or allowed_tools",
            {"function": "Named", "allowed_tools": "Allowed"},
        ),
    ]
    | Literal["auto", "none", "required"]
)


class Thinking(Body):
    type: Literal["enabled", "disabled"]


class Inert(Body):
    """Fields of OpenAI's API that change nothing here."""

    store: bool | None = None
    metadata: FewKeys[str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class ChatRequest(Sampling, Inert):
    """POST /v1/chat/completions."""

    messages: Items[Message]
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: Annotated[List[Tool], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: ReasoningEffort | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: JsonObject | None = None
    modalities: List[Literal["text"]] | None = None


class CompletionRequest(Sampling, Inert):
    """POST /v1/completions."""

    prompt: TextOrIds
    max_tokens: int = Field(16, ge=0, le=2**31 - 1)  # OpenAI's default, for null too
    best_of: int | None = Field(None, ge=1, le=128)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    suffix: str | None = None


class EmbeddingRequest(Body):
    """POST /v1/embeddings."""

    model: str
    input: TextOrIds
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = None


class TokenizeRequest(Body):
    """POST /tokenize: a prompt, or messages as the chat template renders them."""

    model: str | None = None
    prompt: str | None = None
    messages: Items[Message] | None = None
    tools: List[Tool] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: JsonObject | None = None


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: List[TokenId]
