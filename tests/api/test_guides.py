"""Composed guides in the engine's own compiler, token by token over the tiny tokenizer, read back by the parsers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import jsonschema
import pytest
from hypothesis import given, settings, strategies as st
from llguidance import LLMatcher
from tokenizers import Tokenizer

from nmoe_backend import types
from nmoe_backend.api.guides import Guide, compose, offer
from nmoe_backend.api.guides_calls import SECTIONS
from nmoe_backend.api.parsers import TOOL_FORMATS, make_parser
from nmoe_backend.api.parsers.events import Content, ToolCallBroken, append
from nmoe_backend.grammar import GrammarCompiler
from nmoe_backend.text import Text
from nmoe_backend.types import RequestError
from scripts.make_tiny_checkpoint import VOCAB_SIZE, make_tokenizer
from tests.api.test_parsers import NO_THINKING, THINKING, calls_of, content_of, write_calls

DSML = "｜DSML｜"
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "array", "items": {"$ref": "#/$defs/day"}, "maxItems": 2},
        "code": {"type": "string", "pattern": "^[A-Z]{2}$"},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"day": {"type": "integer", "minimum": 1, "maximum": 31}},
}
EITHER = {"anyOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"properties": {"b": {}}}]}
STRICT: list[Mapping[str, Any]] = [
    {"name": "get_weather", "parameters": WEATHER, "strict": True},
    {"name": "now", "strict": True},
]
LOOSE: list[Mapping[str, Any]] = [{"name": tool["name"], "parameters": tool.get("parameters")} for tool in STRICT]
MIXED = [STRICT[0], LOOSE[1]]
GOOD, ALSO_GOOD = '{"city": "Paris", "days": [1, 2]}', '{"city": "a</b>", "unit": "celsius", "days": []}'
BAD = ['{"city": 1, "days": []}', '{"days": []}', '{"city": "x", "days": [32]}', '{"city": "x", "days": [], "no": 1}']
JSON_OBJECT = Guide("json", "")


@dataclass(frozen=True)
class Model:
    """A tokenizer, the engine's compiler over it, and what compose has to know."""

    tokenizer: Tokenizer
    compiler: GrammarCompiler
    dsml_id: int | None

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def matcher(self, guide: Guide) -> LLMatcher:
        """RequestError where the guide does not compile."""
        grammar = self.compiler.compile(types.Guide(type=cast(types.GuideType, guide.type), text=guide.guide))
        return cast(Any, grammar.result().matcher()).matcher

    def accepts(self, guide: Guide, text: str) -> bool:
        matcher = self.matcher(guide)
        return all(matcher.try_consume_tokens([token]) == 1 for token in self.ids(text)) and matcher.is_accepting()

    def begins(self, guide: Guide, text: str) -> bool:
        ids = self.ids(text)
        return self.matcher(guide).validate_tokens(ids) == len(ids)


@pytest.fixture(scope="module", params=["token", "text"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """With ｜DSML｜ as the special token that it is in DeepSeek-V3.2, and as text."""
    folder = tmp_path_factory.mktemp("model")
    form = json.loads(make_tokenizer().to_str())
    if request.param == "text":
        form["added_tokens"] = [token for token in form["added_tokens"] if token["content"] != DSML]
    (folder / "tokenizer.json").write_text(json.dumps(form))
    (folder / "tokenizer_config.json").write_text("{}")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    compiler = GrammarCompiler(Text(folder), folder, vocab_size=VOCAB_SIZE, eos_token_ids=[1])
    yield Model(tokenizer, compiler, tokenizer.token_to_id(DSML))
    compiler.close()


def composed(model: Model, tool_format: str | None = "deepseek_v31", **changes: Any) -> Guide | None:
    wishes: dict[str, Any] = {
        "response_guide": None,
        "tools": STRICT,
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "starts_in_reasoning": False,
        "may_reason": False,
        **changes,
    }
    tools = offer(wishes.pop("tools"), wishes.pop("tool_choice"), wishes.pop("parallel_tool_calls"))
    return compose(**wishes, offer=tools, tool_format=tool_format, dsml_token_id=model.dsml_id)


def guide_of(model: Model, tool_format: str | None = "deepseek_v31", **changes: Any) -> Guide:
    guide = composed(model, tool_format, **changes)
    assert guide is not None
    return guide


def test_the_choice_decides_what_is_read_and_what_may_be_called() -> None:
    tools = [{"name": "f"}, {"name": "g"}]
    cases: list[tuple[Any, Any, Any, bool]] = [
        (None, tools, tools, False),
        ("auto", tools, tools, False),
        ("none", [], [], False),
        ("required", tools, tools, True),
        ({"name": "g"}, tools, tools[1:], True),
    ]
    for choice, read, callable_tools, is_forced in cases:
        made = offer(tools, choice)
        assert (list(made.tools), list(made.callable), made.is_forced) == (read, callable_tools, is_forced)


def test_every_format_has_a_grammar() -> None:
    assert SECTIONS.keys() == TOOL_FORMATS.keys()


RESPONSES = [
    None,
    JSON_OBJECT,
    Guide("json_schema", json.dumps(WEATHER)),
    Guide("regex", "a/b\\/[c\n]"),
    Guide("choice", '["yes", "no \\"é\\""]'),
    Guide("ebnf_grammar", 'start: section\nsection: "yes" | "no"'),
]


@pytest.mark.parametrize("tool_format", TOOL_FORMATS)
def test_every_combination_compiles(model: Model, tool_format: str) -> None:
    choices = ["none", "auto", "required", {"name": "now"}]
    tools = [STRICT, LOOSE, MIXED, [{"name": "x", "parameters": EITHER, "strict": True}, *MIXED], []]
    reasons = [(False, False), (True, True), (False, True)]
    for choice, offered, response, parallel, (starts, may) in product(
        choices, tools, RESPONSES, [True, False], reasons
    ):
        if not offered and choice not in ("auto", "none"):
            continue
        wishes = {"tool_choice": choice, "tools": offered, "response_guide": response}
        guide = composed(
            model, tool_format, **wishes, parallel_tool_calls=parallel, starts_in_reasoning=starts, may_reason=may
        )
        if guide is not None and guide is not response:
            model.matcher(guide)


@pytest.mark.parametrize("tool_format", TOOL_FORMATS)
@pytest.mark.parametrize("thought", ["", "Hmm. <b></think>"])
def test_required_calls_are_calls_by_the_schema_and_nothing_else(model: Model, tool_format: str, thought: str) -> None:
    guide = guide_of(model, tool_format, tool_choice="required", starts_in_reasoning=bool(thought))
    for arguments in (GOOD, ALSO_GOOD):
        calls = [("get_weather", arguments), ("now", "{}")]
        assert model.accepts(guide, thought + write_calls(tool_format, calls))
    for arguments in BAD:
        assert not model.accepts(guide, thought + write_calls(tool_format, [("get_weather", arguments)]))
    assert not model.accepts(guide, thought + write_calls(tool_format, [("other", "{}")]))
    assert not model.begins(guide, thought + "Let me see.")
    assert not model.accepts(guide, thought)


def test_dsml_writes_a_string_with_a_rule_of_its_own_as_json(model: Model) -> None:
    """A pattern cannot be laid over text that ends at a tag; quoted as JSON it can, and DeepSeek's decoder reads it."""
    guide = guide_of(model, "deepseek_v32", tool_choice="required")
    text = write_calls("deepseek_v32", [("get_weather", '{"city": "x", "days": [], "code": "DE"}')])
    quoted = text.replace('"code" string="true">DE<', '"code" string="false">"DE"<')
    assert quoted != text
    assert model.accepts(guide, quoted)
    assert not model.accepts(guide, quoted.replace('"DE"', '"de"'))


@pytest.mark.parametrize("tool_format", TOOL_FORMATS)
def test_a_named_choice_leaves_that_tool_only(model: Model, tool_format: str) -> None:
    guide = guide_of(model, tool_format, tool_choice={"name": "now"})
    assert model.accepts(guide, write_calls(tool_format, [("now", "{}")]))
    assert not model.accepts(guide, write_calls(tool_format, [("get_weather", GOOD)]))


@pytest.mark.parametrize("tool_format", TOOL_FORMATS)
def test_strict_tools_leave_text_free_and_bind_what_follows_a_calls_beginning(model: Model, tool_format: str) -> None:
    guide = guide_of(model, tool_format)
    section = write_calls(tool_format, [("get_weather", GOOD), ("now", "{}")])
    for text in ("", "Just text, with <b>html</b>.\n\n", "{}"):
        assert model.accepts(guide, text)
        assert model.accepts(guide, text + section)
    for arguments in BAD:
        assert not model.accepts(guide, "Text." + write_calls(tool_format, [("get_weather", arguments)]))
    assert not model.accepts(guide, write_calls(tool_format, [("other", "{}")]))


@pytest.mark.parametrize("tool_format", TOOL_FORMATS)
def test_a_tool_that_is_not_strict_takes_any_object_beside_a_strict_one(model: Model, tool_format: str) -> None:
    guide = guide_of(model, tool_format, tools=MIXED)
    assert model.accepts(guide, write_calls(tool_format, [("now", '{"any": ["thing"], "text": "x"}')]))
    assert not model.accepts(guide, write_calls(tool_format, [("get_weather", BAD[0])]))


@pytest.mark.parametrize("tool_format", TOOL_FORMATS)
@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize("tools", [STRICT, LOOSE], ids=["strict", "loose"])
def test_without_parallel_calls_there_is_one_at_most(
    model: Model, tool_format: str, choice: str, tools: list[Mapping[str, Any]]
) -> None:
    guide = guide_of(model, tool_format, tools=tools, tool_choice=choice, parallel_tool_calls=False)
    assert model.accepts(guide, write_calls(tool_format, [("get_weather", GOOD)]))
    assert not model.accepts(guide, write_calls(tool_format, [("get_weather", GOOD), ("now", "{}")]))


def test_nothing_to_constrain_is_no_guide(model: Model) -> None:
    assert composed(model, tools=LOOSE) is None
    assert composed(model, tools=LOOSE, starts_in_reasoning=True, may_reason=True) is None
    assert composed(model, tools=[]) is None
    assert composed(model, tool_choice="none") is None
    assert composed(model, None) is None


def test_a_response_guide_alone_goes_to_the_engine_as_it_is(model: Model) -> None:
    for response in RESPONSES[1:]:
        assert composed(model, tools=[], response_guide=response) is response
        assert composed(model, tool_choice="none", response_guide=response) is response


@pytest.mark.parametrize(
    ("response", "good", "bad"),
    [
        (JSON_OBJECT, '{"a": [1]}', "[1]"),
        (Guide("json_schema", json.dumps(WEATHER)), GOOD, BAD[0]),
        (RESPONSES[3], "a/b/c", "a/b/d"),
        (RESPONSES[4], 'no "é"', "maybe"),
        (RESPONSES[5], "yes", "maybe"),
    ],
)
def test_a_response_guide_holds_behind_the_reasoning(model: Model, response: Guide, good: str, bad: str) -> None:
    reasons = guide_of(model, tools=[], response_guide=response, starts_in_reasoning=True, may_reason=True)
    assert model.accepts(reasons, f"Is it {bad}?</think>{good}")
    assert model.accepts(reasons, f"</think>\n\n{good}")
    assert not model.accepts(reasons, f"Hm.</think>{bad}")
    assert not model.accepts(reasons, good)
    may = guide_of(model, tools=[], response_guide=response, may_reason=True)
    assert model.accepts(may, f"<think>Is it {bad}?</think>{good}")
    assert model.accepts(may, good)
    assert not model.accepts(may, bad)


def test_any_character_may_stand_in_a_choice_behind_the_reasoning(model: Model) -> None:
    for character in map(chr, [*range(0x100), 0x2028, 0xFEFF, 0xFFFF, 0x1F600]):
        response = Guide("choice", json.dumps([f"a{character}b", "other"]))
        guide = guide_of(model, tools=[], response_guide=response, starts_in_reasoning=True)
        assert model.accepts(guide, f"why</think>a{character}b"), hex(ord(character))


@pytest.mark.parametrize("tool_format", TOOL_FORMATS)
def test_with_a_response_format_and_tools_the_answer_is_one_or_the_other(model: Model, tool_format: str) -> None:
    """A call is no answer yet: the format binds the answer that follows the results, so it must not forbid calls."""
    guide = guide_of(model, tool_format, response_guide=JSON_OBJECT, starts_in_reasoning=True)
    section = write_calls(tool_format, [("get_weather", GOOD)])
    assert model.accepts(guide, 'x</think>{"a": 1}')
    assert model.accepts(guide, f"x</think>{section}")
    assert not model.accepts(guide, "x</think>Text.")
    assert not model.begins(guide, f"x</think>Text.{section}")
    assert not model.begins(guide, 'x</think>{"a": 1}' + section)


def test_markers_that_text_spells_letter_by_letter_are_refused(model: Model) -> None:
    """They would read as markers to the parsers, past the grammar."""

    def spelled(name: str) -> list[int]:
        return [token for character in name for token in model.ids(character)]

    for tool_format, name in [
        ("deepseek_v31", "<｜tool▁calls▁begin｜>"),
        ("deepseek_v32", "<function_calls>"),
        ("deepseek_v32", f"<{DSML}function_calls>"),
    ]:
        matcher = model.matcher(guide_of(model, tool_format))
        assert matcher.consume_tokens(spelled(name[:-1]))
        rest = [*spelled(">"), *model.ids(" and so on")]
        assert matcher.try_consume_tokens(rest) < len(rest) or not matcher.is_accepting()
    matcher = model.matcher(guide_of(model, starts_in_reasoning=True))
    assert matcher.try_consume_tokens(spelled("a</think>")) < len(spelled("a</think>"))


@pytest.mark.parametrize("tool_format", TOOL_FORMATS)
@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize("reasons", [False, True])
def test_every_walk_through_a_guide_parses_into_calls_that_validate(
    model: Model, tool_format: str, choice: str, reasons: bool
) -> None:
    """Random tokens of the mask. What is complete has whole calls only; what is not is still on its way."""
    tools = [*STRICT, {"name": "either", "parameters": EITHER, "strict": True}]
    schemas = {tool["name"]: tool.get("parameters") or {"maxProperties": 0} for tool in tools}
    guide = guide_of(model, tool_format, tools=tools, tool_choice=choice, starts_in_reasoning=reasons)
    draw = random.Random(f"{tool_format} {choice} {reasons}")
    complete = 0
    for _ in range(24):
        ids, ended = walk(model, guide, draw, tool_format)
        text = model.tokenizer.decode(ids, skip_special_tokens=True)
        parser = make_parser(
            tool_format=tool_format, reasoning_format="deepseek", prompt=THINKING if reasons else NO_THINKING
        )
        events: list[Any] = []
        for event in (*parser.feed(text), *parser.finish()):
            append(events, event)
        if not ended:
            continue
        complete += 1
        assert not any(isinstance(event, ToolCallBroken) for event in events), text
        calls = calls_of(events)
        for name, arguments in calls:
            jsonschema.validate(arguments, schemas[name])
        if choice == "required":
            assert calls
            assert not content_of(events).strip()
        elif not calls:
            assert all(isinstance(event, Content) for event in events) or reasons
    assert complete >= 6


def walk(model: Model, guide: Guide, draw: random.Random, tool_format: str) -> tuple[list[int], bool]:
    """(tokens, whether the guide may end there). Endings are drawn more often than a mask offers them."""
    section = write_calls(tool_format, [("now", "{}")]).lstrip("\n")
    endings = [section.split("now")[0], "</think>", f"</{DSML}parameter>", '"', "]", "}", ">", ">\n"]
    matcher, ids = model.matcher(guide), []
    while len(ids) < 400 and not matcher.is_stopped():
        if matcher.is_accepting() and ids and draw.random() < 0.3:
            return ids, True
        hurry = model.ids(draw.choice(endings))
        if draw.random() < 0.5 and matcher.validate_tokens(hurry) == len(hurry):
            chosen = hurry
        else:
            mask = matcher.compute_logit_bias()
            chosen = [draw.choice([token for token, allowed in enumerate(mask) if allowed and token != 1] or [1])]
        if chosen == [1]:
            return ids, True
        assert matcher.consume_tokens(chosen)
        ids += chosen
    return ids, matcher.is_accepting()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tool_choice": "required", "tools": []}, "no tools"),
        ({"tool_choice": {"name": "other"}}, "other"),
        ({"tools": [{"name": "f", "strict": True, "parameters": {"type": "array"}}]}, "type to object"),
        ({"tools": [], "may_reason": True, "response_guide": Guide("json_schema", "[")}, "not JSON"),
        ({"tools": [], "may_reason": True, "response_guide": Guide("json_schema", "[]")}, "needs an object"),
        ({"tools": [], "may_reason": True, "response_guide": Guide("choice", "[]")}, "at least one"),
        ({"tools": [], "may_reason": True, "response_guide": Guide("ebnf_grammar", 'root ::= "a"')}, "GBNF"),
    ],
)
def test_wishes_that_no_grammar_meets_are_refused(model: Model, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        composed(model, **changes)


def test_a_forced_call_without_a_format_is_refused(model: Model) -> None:
    with pytest.raises(RequestError, match="tool_format"):
        composed(model, None, tool_choice="required")


def test_schemas_that_are_not_strict_are_met_as_far_as_they_can_be(model: Model) -> None:
    """`not` is beyond a grammar: an error in strict tools, left out in others."""
    odd: Sequence[Mapping[str, Any]] = [
        {"name": "f", "parameters": {"properties": {"a": {"type": "integer", "not": {"const": 1}}}, "required": ["a"]}}
    ]
    guide = guide_of(model, tools=odd, tool_choice="required")
    assert model.accepts(guide, write_calls("deepseek_v31", [("f", '{"a": 2}')]))
    strict = guide_of(model, tools=[{**odd[0], "strict": True}], tool_choice="required")
    with pytest.raises(RequestError, match="not"):
        model.matcher(strict)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["object", "string", "#/$defs/x", 'a"\n', "a/b"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                [
                    "type",
                    "properties",
                    "required",
                    "additionalProperties",
                    "$defs",
                    "$ref",
                    "enum",
                    "const",
                    "anyOf",
                    "a",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(schema=ANYTHING, strict=st.booleans(), tool_format=st.sampled_from(sorted(TOOL_FORMATS)))
def test_any_schema_compiles_or_is_refused(model: Model, schema: Any, strict: bool, tool_format: str) -> None:
    tools = [{"name": "f", "parameters": schema, "strict": strict}]
    try:
        model.matcher(guide_of(model, tool_format, tools=tools, tool_choice="required"))
    except RequestError:
        return
    assert isinstance(schema, dict | None)


def test_a_schema_nested_beyond_reading_is_refused(model: Model) -> None:
    schema: dict[str, Any] = {}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(RequestError, match="nested"):
        composed(model, tools=[{"name": "f", "parameters": schema, "strict": True}])
