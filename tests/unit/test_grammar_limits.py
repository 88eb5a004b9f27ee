"""grammar_limits.py and the compiler's own bounds: what is refused before it costs anybody time or a stack."""

from __future__ import annotations

import json
import threading

import pytest

from nmoe_backend.grammar import GrammarCompiler
from nmoe_backend.grammar_limits import check_lark, check_schema
from nmoe_backend.types import ErrorKind, GuideType, RequestError
from tests.grammars import EOS_IDS, allowed, compiled


def properties(number: int, first: int = 0) -> dict[str, object]:
    return {"properties": {f"p{n}": {"type": "string"} for n in range(first, first + number)}}


def multiple(*values: float) -> str:
    return json.dumps({"allOf": [{"type": "number", "multipleOf": value} for value in values]})


OVER_A_BOUND = {
    "multiple": (multiple(99999989), "its multipleOf add up to 99999989 in .*need at most 10000"),
    "multiples that meet": (multiple(9973, 997), "multipleOf add up to 9943081 in .*need at most 10000"),
    "multiple of a power of ten": (multiple(9973000), "multipleOf add up to 9973000 in"),
    "multiples that do not meet": (
        json.dumps({"properties": {"a": {"multipleOf": 9973}, "b": {"multipleOf": 9967}}}),
        "multipleOf add up to 19940 in",
    ),
    "fraction": (multiple(999.9983), "multipleOf add up to 9999983 in"),
    "in a reference": (json.dumps({"$ref": "#/examples/0", "examples": [{"multipleOf": 99999989}]}), "99999989"),
    "huge": ('{"multipleOf": 1%s1}' % ("0" * 6000), "multipleOf add up to 10+ in"),
    "optional properties": (json.dumps(properties(481)), "an object has 481 optional properties, need at most 480"),
    "properties": (
        json.dumps({**properties(1001), "required": [f"p{n}" for n in range(1001)]}),
        "an object has 1001 properties, need at most 1000",
    ),
    "properties in all": (
        json.dumps({"anyOf": [properties(400, 400 * n) for n in range(13)]}),
        "a schema has 5200 properties, need at most 5000",
    ),
    "patterns": (
        json.dumps({"patternProperties": {f"^x{n}[a-z]*$": {} for n in range(65)}}),
        "a schema has 65 patternProperties, need at most 64",
    ),
    "pattern": (json.dumps({"type": "string", "pattern": "a?" * 4097}), "a pattern has 8194 characters"),
}


@pytest.mark.parametrize("name", OVER_A_BOUND)
@pytest.mark.parametrize("form", ["{}", "start: a\na: %json\n{}\n", "start: %lark {{\nstart: %json{}\n}}"])
def test_a_schema_that_would_compile_for_minutes_is_refused_before_wherever_it_stands(name: str, form: str) -> None:
    """Without a compiler: where the bound is missing, nothing would end this test."""
    schema, reason = OVER_A_BOUND[name]
    check = check_schema if form == "{}" else check_lark
    with pytest.raises(ValueError, match=reason):
        check(form.format(schema))


def test_a_regular_expression_in_lark_has_the_bound_of_one_alone() -> None:
    with pytest.raises(ValueError, match="a regular expression has 8193 characters, need at most 8192"):
        check_lark('start: "/" A // a/b\nA: /a\\/' + "a" * 8190 + "/i")
    check_lark('start: "/" A // ' + "a/" * 9000 + "\nA: /" + "a" * 8192 + "/")


@pytest.mark.parametrize("type", ["json_schema", "lark", "ebnf_grammar"])
def test_the_bounds_hold_in_every_type_of_guide(compiler: GrammarCompiler, type: GuideType) -> None:
    schema = json.dumps(properties(481))
    with pytest.raises(RequestError, match="481 optional properties") as caught:
        compiled(compiler, type, schema if type == "json_schema" else f"start: %json {schema}")
    assert caught.value.kind is ErrorKind.INVALID


AT_THE_BOUNDS = {
    "multiple": multiple(9973),
    "fraction of a multiple": multiple(99.73),
    "multiples of properties that do not meet": json.dumps(
        {"properties": {"a": {"multipleOf": 0.01}, "b": {"multipleOf": 97}, "c": {"multipleOf": 89}}}
    ),
    "powers of ten": multiple(0.01, 1000, 10**6),
    "optional properties": json.dumps(properties(480)),
    "properties": json.dumps({**properties(1000), "required": [f"p{n}" for n in range(1000)]}),
    "patterns": json.dumps({"patternProperties": {f"^x{n}[a-z]*$": {} for n in range(64)}}),
}


@pytest.mark.parametrize("name", AT_THE_BOUNDS)
def test_a_schema_at_a_bound_compiles_and_its_text_begins(compiler: GrammarCompiler, name: str) -> None:
    made = compiled(compiler, "json_schema", AT_THE_BOUNDS[name])
    matcher = made.matcher()
    for _ in range(3):
        ids = allowed(made, matcher)[0] - set(EOS_IDS)
        assert matcher.error() is None
        matcher.advance((max(ids),))


def test_a_schema_whose_texts_could_not_go_on_behind_their_first_token_is_refused(compiler: GrammarCompiler) -> None:
    """Alternatives of few properties each, together more than a row of the parser holds."""
    schema = json.dumps({"anyOf": [{"type": "object", **properties(100, 100 * n)} for n in range(10)]})
    with pytest.raises(RequestError, match="ends behind its first token: .*items; max is 2000") as caught:
        compiled(compiler, "json_schema", schema)
    assert caught.value.kind is ErrorKind.INVALID


BEYOND_GRAMMARS = {
    "not": {},
    "if": {},
    "then": {},
    "else": {},
    "contains": {},
    "minContains": 1,
    "uniqueItems": True,
    "propertyNames": {},
    "dependentRequired": {},
    "dependentSchemas": {},
    "unevaluatedItems": False,
    "unevaluatedProperties": False,
    "$dynamicRef": "#",
}


@pytest.mark.parametrize("keyword", BEYOND_GRAMMARS)
def test_a_keyword_that_cannot_be_enforced_is_refused_even_where_the_schema_asks_for_leniency(
    compiler: GrammarCompiler, keyword: str
) -> None:
    for extra in ({}, {"x-guidance": {"lenient": True, "coerce_one_of": True}}):
        schema = {"properties": {"a": {keyword: BEYOND_GRAMMARS[keyword]}}, **extra}
        with pytest.raises(RequestError, match="Unimplemented keys"):
            compiled(compiler, "json_schema", json.dumps(schema))


def chains(length: int) -> dict[str, str]:
    """Rules, terminals and references, each naming the next."""
    ref = {"$defs": {f"{i}": {"properties": {"x": {"$ref": f"#/$defs/{i + 1}"}}} for i in range(length // 8)}}
    ref["$defs"][f"{length // 8}"] = {"properties": {}}
    return {
        "rules": "start: r0\n" + "".join(f'r{i}: r{i + 1} "a"\n' for i in range(length)) + f'r{length}: "b"',
        "terminals": "start: T0\n" + "".join(f'T{i}: ("a" T{i + 1})|"c"\n' for i in range(length)) + f'T{length}: "b"',
        "references": json.dumps({**ref, "$ref": "#/$defs/0"}),
    }


@pytest.mark.parametrize("kind", ["rules", "terminals", "references"])
def test_long_chains_do_not_overflow_a_stack(compiler: GrammarCompiler, kind: str) -> None:
    """4,000 rules and 1,000 references overflow 8 MB; what was compiled is used from a thread with a small stack."""
    source = chains(10_000)[kind]
    made = compiled(compiler, "json_schema" if kind == "references" else "lark", source)
    seen: list[set[int]] = []

    def use() -> None:
        matcher = made.matcher()
        for _ in range(3):
            seen.extend(allowed(made, matcher))
            matcher.advance((min(seen[-1]),))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert len(seen) == 3 and all(seen)


def test_an_exponential_expression_is_refused_or_ends_its_sequence_as_the_clients_error(
    compiler: GrammarCompiler,
) -> None:
    kinds = set()
    for pattern in ("(a{1,500}){1,500}", "((a{1,100}){1,100}){1,100}", "a" + "{2}" * 200, "(?s).*(a|b).{40}"):
        try:
            made = compiled(compiler, "regex", pattern)
        except RequestError as error:
            kinds.add(error.kind)
            continue
        matcher = made.matcher()
        for _ in range(200):
            ids = allowed(made, matcher)[0] - set(EOS_IDS)
            if (failure := matcher.error()) is not None:
                assert "the text cannot go on" in str(failure)
                kinds.add(failure.kind)
                break
            matcher.advance((min(ids),))
    assert kinds == {ErrorKind.INVALID}
