"""From pydantic's complaints to OpenAI's error object: one sentence that names the parameter and says what to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from reprlib import Repr
from types import MappingProxyType
from typing import Any

import orjson

from nmoe_backend.api.errors import ApiError, bad_request
from nmoe_backend.toml_table import nearest

# Fields that somebody may send for good reasons, and what to do instead.
_REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "functions": "is deprecated and not served. Send tools.",
        "function_call": "is deprecated and not served. Send tool_choice.",
        "audio": "is not served: this model reads and writes text.",
        "prediction": "is not served. Leave it out.",
        "web_search_options": "is not served. Leave it out, or offer a tool.",
        "guided_json": 'has gone. Send structured_outputs = {"json": ...} or response_format.',
        "guided_regex": 'has gone. Send structured_outputs = {"regex": ...}.',
        "guided_choice": 'has gone. Send structured_outputs = {"choice": [...]}.',
        "guided_grammar": 'has gone. Send structured_outputs = {"grammar": ...}.',
        "use_beam_search": "is not served: one sequence is sampled per choice.",
        "skip_special_tokens": "is not served: special tokens never stand in the text.",
        "prompt_logprobs": "is not served here. Send echo = true with logprobs to /v1/completions.",
        "thinking.budget_tokens": "is not served: nothing ends the reasoning early. Leave it out, or send max_tokens.",
        "lora_request": 'is not served. Name the adapter in `adapter`, or as model = "base:adapter".',
    }
)
_LENGTH = ("too_short", "too_long")
_SHOWN = 80
_MAX_DEPTH = 200
_ORJSON_DEPTH = 254  # levels that it can write


def explain(errors: Sequence[Mapping[str, Any]], known: Iterable[str]) -> ApiError:
    """The first complaint. `known` are the names of the body's fields, for a guess at what was meant."""
    error = _most_specific(errors)
    path = [str(part) for part in error["loc"]]
    name = _join(path)
    kind = error["type"]
    if not path:
        return no_object()
    if kind == "missing":
        return bad_request(f"{name}: is required. Add it.", name, "missing_required_parameter")
    if kind == "extra_forbidden":
        name = ".".join(filter(None, (_join(path[:-1]), _cut(path[-1]))))
        if len(path) > 1:
            reason = _REFUSED.get(name) or "is not a known field. Leave it out."
            return bad_request(f"{name}: {reason}", name, "unknown_parameter")
        reason = _REFUSED.get(name) or f"is not a known parameter. Did you mean {nearest(name, known)!r}?"
        return bad_request(f"{name}: {reason}", name, "unknown_parameter")
    text = str(error["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
    if kind in _LENGTH:  # "List should have at least 1 item after validation, not 0"
        text = text.replace("List should have", "a list of").partition(" after validation")[0]
    return bad_request(
        f"{name}: got {shown(error.get('input'))}, need {text}. Correct the value.", name, "invalid_value"
    )


def no_object() -> ApiError:
    """For a body that is missing, or anything but a JSON object."""
    return bad_request("the body is missing or no JSON object. Send one, with Content-Type: application/json.")


def shown(value: object) -> str:
    """A value as an error shows it; a large one is never written out whole."""
    few = Repr()
    few.maxstring = few.maxother = _SHOWN
    few.maxlevel, few.maxlist, few.maxdict = 2, 3, 3
    return _cut(few.repr(value))


def check_depth(value: object) -> None:
    """Of a JSON value. What reads it recursively (templates, schemas, orjson itself) ends at 254 levels and more.

    ApiError 400. By orjson, which refuses to write what is deeper than it takes: a walk in Python would take seconds.
    """
    for _ in range(_ORJSON_DEPTH - _MAX_DEPTH):
        value = [value]
    try:
        orjson.dumps(value)
    except TypeError as error:
        raise bad_request(
            f"the body is nested too deeply, need at most {_MAX_DEPTH} levels. Make it flatter."
        ) from error


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _most_specific(errors: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """A union complains once per member: the complaint that lies deepest is of the member that fits best; of those
    that lie equally deep, the one about a list's length: the others are about the type."""
    of_field = (error for error in errors if error["loc"][:1] == errors[0]["loc"][:1])
    return max(of_field, key=lambda error: (len(error["loc"]), error["type"] in _LENGTH))


def _join(path: Sequence[str]) -> str:
    """`messages`, `0`, `content` -> `messages[0].content`; members of unions that pydantic names are left out."""
    name = ""
    for part in path:
        if part.isdigit():
            name += f"[{_cut(part)}]"
        elif part.isidentifier() and not part[0].isupper() and part not in ("str", "int", "nullable"):
            name += f".{part}" if name else part
    return name
