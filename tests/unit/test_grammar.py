"""grammar.py: masks against the `regex` module's partial matches, and which guides are refused and why."""

from __future__ import annotations

import json

import pytest
import regex

from nmoe_backend.grammar import GrammarCompiler
from nmoe_backend.text import Text
from nmoe_backend.types import ErrorKind, GuideType, RequestError
from tests.grammars import EOS_IDS, VOCAB_SIZE, allowed, compiled, walk
from tests.texts import BOS, EOS


def test_the_folder_has_the_ids_that_these_tests_use(text: Text) -> None:
    assert (text.vocab_size, text.encode_plain(EOS)) == (267, [EOS_IDS[0]])


PATTERNS = ["he(l|lo)+ w?", "[a-c]{2,4}|é+", "a|ab|abc", "(x|y)*z", "", r"\n+[^\n]{0,2}"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_regex_allows_exactly_the_tokens_that_leave_a_partial_match(
    compiler: GrammarCompiler, text: Text, pattern: str
) -> None:
    """Where they are beginnings of one text, one of them: the tokenizer's own."""
    made = compiled(compiler, "regex", pattern)
    reference = regex.compile(pattern)
    states = {""}
    for _ in range(3):  # breadth first, over whole characters
        following = set()
        for written in states:
            got = walk(made, text, written)
            whole = {}
            for token_id in range(text.vocab_size - 5):
                added = text.raw_token_bytes(token_id)
                if added.isascii() or _is_utf8(added):
                    whole[token_id] = written + added.decode()
            want = {token_id for token_id, longer in whole.items() if reference.fullmatch(longer, partial=True)}
            if (got := {token_id for token_id in got if token_id in whole}) != want:
                longest = max((whole[token_id] for token_id in want), key=len)
                is_forced = all(longest.startswith(whole[token_id]) for token_id in want)
                assert is_forced and len(got) == 1 and got < want, written
            assert (reference.fullmatch(written) is not None) == (set(EOS_IDS) <= walk(made, text, written)), written
            following |= {whole[token_id] for token_id in sorted(got)[:3]}
        states = following


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_ids_without_text_are_never_allowed_and_every_eos_ends(compiler: GrammarCompiler, text: Text) -> None:
    anything = compiled(compiler, "regex", r"(?s:.*)")
    got = walk(anything, text, "hello")
    assert got & set(range(262, VOCAB_SIZE)) == set(EOS_IDS)
    assert got > set(text.encode_plain('abc{}"\n'))
    finished = compiled(compiler, "choice", '["hello"]')
    assert walk(finished, text, "hello") == set(EOS_IDS)
    assert not walk(finished, text, "he") & set(EOS_IDS)


def test_after_eos_there_is_only_eos(compiler: GrammarCompiler) -> None:
    """A sequence may have a row in the step after its last token."""
    made = compiled(compiler, "regex", "a*")
    matcher = made.matcher()
    matcher.advance((EOS_IDS[1],))
    assert matcher.error() is None and allowed(made, matcher) == [set(EOS_IDS)]
    matcher.advance((EOS_IDS[0],))
    assert matcher.error() is None


def test_a_token_stands_in_a_grammar_only_where_it_is_named(compiler: GrammarCompiler, text: Text) -> None:
    (think,) = text.encode_plain("<think>")
    assert walk(compiled(compiler, "lark", "start: <think> /a+/"), text, "") == {think}
    assert walk(compiled(compiler, "lark", f"start: <[{think}]> /a+/"), text, "") == {think}
    for name in ("<think>", BOS, "two words é"):
        spelled = compiled(compiler, "choice", json.dumps([name]))
        letters = [id for letter in name for id in text.encode_plain(letter)]
        matcher = spelled.matcher()
        for letter_id in letters[:2]:
            assert allowed(spelled, matcher) == [{letter_id}]
            matcher.advance((letter_id,))


CHOICES = ["yes", 'q"uo\\te', "a\nb", "é\U0001f600", "a/b", "\x01", "\x7f", "ab", "abc", ""]


def test_a_choice_is_taken_to_the_letter(compiler: GrammarCompiler, text: Text) -> None:
    made = compiled(compiler, "choice", json.dumps(CHOICES))
    for choice in CHOICES:
        assert set(EOS_IDS) <= walk(made, text, choice)
    assert walk(compiled(compiler, "choice", '["ab", "abc"]'), text, "ab") == {*EOS_IDS, *text.encode_plain("c")}


@pytest.mark.parametrize("source", ['root ::= "h" rest\nrest ::= [0-9]+ "!"?', 'start: "h" REST\nREST: /[0-9]+!?/'])
def test_an_ebnf_grammar_is_gbnf_or_lark(compiler: GrammarCompiler, text: Text, source: str) -> None:
    made = compiled(compiler, "ebnf_grammar", source)
    digits = set(text.encode_plain("0123456789"))
    assert walk(made, text, "h") == digits
    assert walk(made, text, "h12") == {*digits, *text.encode_plain("!"), *EOS_IDS}


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 7, "maximum": 12}},
    "required": ["a"],
    "additionalProperties": False,
}


def test_json_has_white_space_where_json_allows_it_and_no_more_than_32_in_a_row(
    compiler: GrammarCompiler, text: Text
) -> None:
    made = compiled(compiler, "json_schema", json.dumps(SCHEMA))
    for written in ('{"a":7}', json.dumps({"a": 12}, indent=8), '{ "a" :\r\n\t10 }'):
        assert set(EOS_IDS) <= walk(made, text, written)
    (blank,) = text.encode_plain(" ")
    assert blank in walk(made, text, "{" + " " * 31)
    assert blank not in walk(made, text, "{" + " " * 32)
    assert not walk(made, text, '{"a":1') & set(text.encode_plain("3"))


def test_json_is_any_object(compiler: GrammarCompiler, text: Text) -> None:
    made = compiled(compiler, "json", "")
    assert not walk(made, text, "") & set(text.encode_plain('["1'))
    assert set(EOS_IDS) <= walk(made, text, '{"x": [1, {"é\\n": null}], "": -2.5e3}')


@pytest.mark.parametrize(
    ("type", "source", "reason"),
    [
        ("json_schema", '{"type": "strin"}', "got no valid json_schema: Invalid type: strin"),
        ("json_schema", '{"type": ', "EOF while parsing"),
        ("json_schema", "[" * 10**5, "recursion limit"),
        ("json_schema", "false", "Expecting object schema"),
        ("json_schema", '{"enum": []}', "Unsatisfiable"),
        ("json_schema", '{"type": "string", "format": "color"}', "Unknown format: color"),
        ("json_schema", '{"type": "string", "pattern": "(?=a)b"}', "look-around"),
        ("json_schema", '{"$ref": "https://example.com/schema"}', "not present in a registry"),
        ("json_schema", '{"oneOf": [{"type": "string"}, {"maxLength": 3}]}', "oneOf"),
        ("regex", "a(", "got no valid regex: .*unclosed group"),
        ("regex", "a" * 8193, "8193 characters, need at most 8192"),
        ("choice", "yes", "got no JSON .*need a JSON list of at least one string"),
        ("choice", "[]", "need a JSON list of at least one string"),
        ("choice", '["a", 1]', "need a JSON list of at least one string"),
        ("choice", "[" * 10**5, "need a JSON list of at least one string"),
        ("choice", '["a", "\\ud800"]', r"got '\\ud800', half of a surrogate pair, need whole characters"),
        ("ebnf_grammar", 'root ::= "a', "got no valid ebnf_grammar: .*Unexpected end of input"),
        ("ebnf_grammar", 'root ::= "a"\n' * 1300, "16900 characters, need at most 16384"),
        ("lark", "start: nothing", 'unknown name: "nothing"'),
        ("lark", "start: " + "(" * 10**5, "too deeply nested"),
    ],
)
def test_a_guide_that_cannot_be_used_is_refused_with_the_reason(
    compiler: GrammarCompiler, type: GuideType, source: str, reason: str
) -> None:
    with pytest.raises(RequestError, match=f"(?s)^guided_decoding_guide: .*{reason}") as caught:
        compiled(compiler, type, source)
    assert caught.value.kind is ErrorKind.INVALID


def test_a_refused_token_is_our_error_and_stays_one(compiler: GrammarCompiler, text: Text) -> None:
    made = compiled(compiler, "choice", '["yes", "no"]')
    good, bad = made.matcher(), made.matcher()
    bad.advance(text.encode_plain("x"))
    bad.advance(text.encode_plain("yes"))
    error = bad.error()
    assert error is not None and error.kind is ErrorKind.ENGINE and "refuses a token" in str(error)
    assert allowed(made, good, bad)[0] == set(text.encode_plain("yn")), "the others go on"
    assert good.error() is None


def test_a_matcher_that_is_shown_all_tokens_at_once_stands_where_the_other_one_stands(
    compiler: GrammarCompiler, text: Text
) -> None:
    made = compiled(compiler, "json", "")
    written = text.encode_plain('{"key": [1, "é\\n", {"x"')
    step, once = made.matcher(), made.matcher()
    for token_id in written:
        allowed(made, step)
        step.advance((token_id,))
    once.advance(written)
    first, second = allowed(made, step, once)
    assert first == second and first >= set(text.encode_plain(": \n\r\t"))


def test_masks_of_different_grammars_are_filled_together(compiler: GrammarCompiler, text: Text) -> None:
    made = [compiled(compiler, "choice", json.dumps([letter])) for letter in "abc"]
    got = allowed(made[0], *(one.matcher() for one in made))
    assert got == [set(text.encode_plain(letter)) for letter in "abc"]
