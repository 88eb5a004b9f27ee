"""The grammar of a section of tool calls in each format, in llguidance's dialect of Lark.

Written as DeepSeek's own templates write past calls, so that a constrained model stays on its own ground: V3 and V3.1
in marker tokens, V3.2 in DSML. The parsers read more than this; they read all of this.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from nmoe_backend.api.parsers.deepseek import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEPARATOR
from nmoe_backend.api.parsers.dsml import DSML
from nmoe_backend.types import RequestError

# A model may put line feeds into JSON, but never without end; DeepSeek itself writes one space behind , and :.
_WHITESPACE = r"[ \n\r\t]{1,32}"
# Keywords of a schema whose members can be written one by one as parameters.
_NOTES = {"title", "description", "default", "examples", "deprecated", "$comment"}
_PLAIN_STRING = frozenset({"type", *_NOTES})
_PLAIN_OBJECT = frozenset(
    {"type", "properties", "required", "additionalProperties", "$schema", "$id", "$defs", "definitions", *_NOTES}
)
_FENCE = "\n```json\n"
_BEGIN, _END = f"<{DSML}function_calls>", f"</{DSML}function_calls>"
_CALL_END, _VALUE_END, _LINE = f"</{DSML}invoke>\n", f"</{DSML}parameter>", "\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A tool that may be called. `schema` is an object's; `lenient`: keywords that no grammar can hold do not count."""

    name: str
    schema: Mapping[str, Any]
    lenient: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Rules, and two ways to use them: `forced` begins the answer with calls, `free` lets text stand in front."""

    rules: tuple[str, ...]
    forced: str
    free: str


def literal(text: str) -> str:
    """A Lark string: JSON's, but for DEL, which llguidance takes escaped only."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", r"\u007f")


def json_value(schema: Mapping[str, Any], *, lenient: bool = False) -> str:
    """A JSON value by its schema, whose own hints to llguidance do not count."""
    hints = {"whitespace_pattern": _WHITESPACE, "lenient": lenient}
    try:
        return f"%json {json.dumps({**schema, 'x-guidance': hints}, ensure_ascii=False)}"
    except RecursionError as error:
        raise RequestError("a schema is nested too deeply to be read. Make it flatter.") from error


def text_without(*spelled: str) -> str:
    """A terminal: any text in which none of these stands."""
    names = "|".join(re.escape(name).replace("/", r"\/") for name in spelled)
    return f"/(?s:.*)/ & ~/(?s:.*)({names})(?s:.*)/"


def section_v3(calls: Sequence[Call], many: bool, dsml_id: int | None) -> Section:
    """V3 and R1: a fenced object behind the name."""
    fenced = [
        " ".join(('"function"', SEPARATOR, literal(call.name + _FENCE), _arguments(call), literal("\n```")))
        for call in calls
    ]
    return _markers(fenced, '(call ("\\n" call)*)' if many else "call")


def section_v31(calls: Sequence[Call], many: bool, dsml_id: int | None) -> Section:
    """V3.1: an object behind the name."""
    bare = [f"{literal(call.name)} {SEPARATOR} {_arguments(call)}" for call in calls]
    return _markers(bare, "call+" if many else "call")


def section_v32(calls: Sequence[Call], many: bool, dsml_id: int | None) -> Section:
    """V3.2. `dsml_id`: of the token ｜DSML｜, which is no text to llguidance and has no name in brackets either."""
    return _Dsml(dsml_id).section(calls, many)


SECTIONS: Mapping[str, Callable[[Sequence[Call], bool, int | None], Section]] = MappingProxyType(
    {"deepseek_v3": section_v3, "deepseek_v31": section_v31, "deepseek_v32": section_v32}
)


def _arguments(call: Call) -> str:
    return json_value(call.schema, lenient=call.lenient)


def _markers(bodies: Sequence[str], calls: str) -> Section:
    return Section(
        rules=(
            f"section: {CALLS_BEGIN} {calls} {CALLS_END}",
            f"call: {CALL_BEGIN} ({' | '.join(bodies)}) {CALL_END}",
            f"FREE: {text_without(CALLS_BEGIN)}",
        ),
        forced="section",
        free="FREE section?",
    )


class _Dsml:
    """Writes DSML as Lark."""

    def __init__(self, dsml_id: int | None) -> None:
        self._id = dsml_id

    def section(self, calls: Sequence[Call], many: bool) -> Section:
        free = text_without(f"<{DSML}function_calls>", "<function_calls>")
        begin, end, call_end = (self._text(tag) for tag in (_BEGIN, _END, _CALL_END))
        rules = [
            f'section: {begin} "\\n" calls',
            f"calls: {'call+' if many else 'call'} {end}",
            f"call: ({' | '.join(self._call(call) for call in calls)}) {call_end}",
            f"parameter: {self._any_parameter()}",
            f"FREE: {free}",
        ]
        if self._id is None:  # a lazy terminal ends where the tag is complete
            rules += [
                f"head[lazy]: LEAD {begin}",
                f"LEAD: {text_without('<function_calls>')}",
                f"value[lazy]: /(?s:.*)/ {self._text(_VALUE_END)}",
            ]
        else:  # the token itself ends the text in front of it
            rules += [
                f"head: HEAD {begin.removeprefix(literal('<'))}",
                f"HEAD: /(?s:.*)</ & {free}",
                f"value: VALUE {self._text(_VALUE_END).removeprefix(literal('</'))}",
                f"VALUE: /(?s:.*)<\\// & {text_without(_VALUE_END, _VALUE_END.replace(DSML, ''))}",
            ]
        return Section(rules=tuple(rules), forced='"\\n\\n" section', free='FREE | head "\\n" calls')

    def _text(self, text: str) -> str:
        if self._id is None:
            return literal(text)
        return f" <[{self._id}]> ".join(literal(piece) for piece in text.split(DSML))

    def _call(self, call: Call) -> str:
        opening = self._text(f'<{DSML}invoke name="{call.name}">\n')
        parameters = self._parameters(call)
        if parameters is None:  # what parameters one by one cannot express is written as one object
            return f'{opening} {_arguments(call)} "\\n"'
        return " ".join((opening, *parameters, *self._blank_line(call.schema)))

    def _blank_line(self, schema: Mapping[str, Any]) -> tuple[str, ...]:
        """DeepSeek puts a line feed behind the parameters, also behind none."""
        if schema.get("required"):
            return ()
        return ('"\\n"?',) if schema.get("properties") or schema.get("additionalProperties", True) else ('"\\n"',)

    def _any_parameter(self) -> str:
        """Of a tool that takes any object. A grammar cannot count keys: one written twice breaks the call."""
        name, end = self._text(f'<{DSML}parameter name="'), self._text(_VALUE_END)
        text, other = literal('" string="true">'), literal('" string="false">')
        return f'{name} /[^"\\n]{{1,64}}/ ({text} value | {other} {json_value({})} {end}) "\\n"'

    def _parameters(self, call: Call) -> list[str] | None:
        schema = call.schema
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not all(key in _PLAIN_OBJECT or key.startswith("x-") for key in schema):
            return None
        if not properties and not required and schema.get("additionalProperties", True) is True:
            return ["parameter*"]
        if not isinstance(properties, Mapping) or not all(isinstance(value, Mapping) for value in properties.values()):
            return None
        if not isinstance(required, list) or not all(key in [*properties] for key in required):
            return None
        # References within the schema keep their meaning where its definitions travel along.
        if re.search(r'"\$ref": "#(?!/\$defs/|/definitions/)', json.dumps(properties)) or any(
            '"' in key or "\n" in key for key in properties
        ):
            return None
        return [
            f"({self._parameter(call, key, value)})" + ("" if key in required else "?")
            for key, value in properties.items()
        ]

    def _parameter(self, call: Call, key: str, schema: Mapping[str, Any]) -> str:
        texts = _string_values(schema)
        head = self._text(f'<{DSML}parameter name="{key}" string="{"false" if texts is None else "true"}">')
        if texts is None:
            definitions = {name: call.schema[name] for name in ("$defs", "definitions") if name in call.schema}
            value = json_value({**schema, **definitions}, lenient=call.lenient)
            return f"{head} {value} {self._text(_VALUE_END + _LINE)}"
        if not texts:
            return f'{head} value "\\n"'
        return f"{head} ({' | '.join(self._text(text + _VALUE_END + _LINE) for text in texts)})"


def _string_values(schema: Mapping[str, Any]) -> list[str] | None:
    """The values of a string that can stand unescaped; [] for any; None for what must be written as JSON."""
    if schema.get("type", "string") != "string" or schema.keys() - _PLAIN_STRING - {"enum", "const"}:
        return None
    if "enum" not in schema and "const" not in schema:
        return [] if "type" in schema else None
    values = [schema["const"]] if "const" in schema else schema["enum"]
    listed = isinstance(values, list) and len(values) > 0 and not {"enum", "const"} <= schema.keys()
    return values if listed and all(isinstance(value, str) and "parameter>" not in value for value in values) else None
