"""text.py against the tokenizers and transformers libraries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer

from nmoe_backend.text import IncrementalDetokenizer, StopChecker, Text
from nmoe_backend.types import ConfigError, RequestError
from tests.texts import BOS, EOS, make_folder, stop_reference


@pytest.fixture(scope="module")
def reference(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_deltas_in_any_cut_are_whole_and_join_to_the_full_decode(
    text: Text, reference: Tokenizer, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, text.vocab_size + 3), max_size=40))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=10)))
    detokenizer = IncrementalDetokenizer(text)
    deltas = [detokenizer.feed(ids[a:b]) for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    expected = reference.decode(ids, skip_special_tokens=True).replace("\0", "\ufffd")
    assert expected.startswith("".join(deltas))
    assert "".join(deltas) + detokenizer.flush() == expected
    assert text.decode(ids) == expected


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40).filter(lambda string: "\0" not in string))
def test_text_survives_encode_and_decode_one_token_at_a_time(text: Text, string: str) -> None:
    detokenizer = IncrementalDetokenizer(text)
    deltas = [detokenizer.feed([token_id]) for token_id in text.encode_plain(string)]
    assert "".join(deltas) + detokenizer.flush() == string


def test_a_character_of_four_bytes_comes_out_when_its_last_byte_is_in(text: Text) -> None:
    ids = text.encode_plain("\U0001f600")
    assert len(ids) > 1
    detokenizer = IncrementalDetokenizer(text)
    assert [detokenizer.feed([token_id]) for token_id in ids] == [""] * (len(ids) - 1) + ["\U0001f600"]


def test_the_end_of_a_stream_turns_half_a_character_into_u_fffd(text: Text) -> None:
    detokenizer = IncrementalDetokenizer(text)
    assert detokenizer.feed(text.encode_plain("\U0001f600")[:1]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_nul_never_reaches_a_client(text: Text) -> None:
    assert text.decode(text.encode_plain("a\0b")) == "a\ufffdb"


def test_special_tokens_are_skipped_and_added_ones_are_text(text: Text) -> None:
    assert text.decode(text.encode(f"{BOS}a<think>b<｜User｜>two words é{EOS}")) == "a<think>b<｜User｜>two words é"


def test_bos_stands_in_front_exactly_once(text: Text) -> None:
    ids = text.encode("hello")
    assert ids[0] == text.bos_id
    assert text.encode(BOS + "hello") == ids
    assert text.encode_plain("hello") == ids[1:]


def test_no_bos_where_the_model_wants_none(tmp_path: Path) -> None:
    text = Text(make_folder(tmp_path, add_bos_token=False))
    assert text.bos_id is None
    assert text.encode("hello") == text.encode_plain("hello")


def test_a_bad_word_is_banned_with_and_without_a_space_in_front(text: Text) -> None:
    assert text.encode_word("we") == [tuple(text.encode_plain("we")), tuple(text.encode_plain(" we"))]
    assert text.encode_word(" we") == [tuple(text.encode_plain(" we"))]


def test_chat_template_renders_as_transformers_does(text: Text, folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [
        {"role": "user", "content": "<b>é</b>\n"},
        {"role": "assistant", "content": "ll"},
        {"role": "user", "content": "{{ bos_token }}"},
    ]
    tools = [{"name": "f", "parameters": {"type": "object", "description": "<é>"}}]
    for add, given_tools in ((True, None), (False, None), (True, tools)):
        expected = reference.apply_chat_template(messages, tools=given_tools, add_generation_prompt=add, tokenize=False)
        assert text.render_chat(messages, add, tools=given_tools) == expected
    assert text.encode(text.render_chat(messages)).count(text.bos_id or -1) == 1


def test_a_template_that_refuses_is_the_clients_error(text: Text) -> None:
    with pytest.raises(RequestError, match="no role tool"):
        text.render_chat([{"role": "tool", "content": ""}])


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path: Path) -> None:
    text = Text(make_folder(tmp_path, chat_template="{{ messages.__class__.__mro__ }}"))
    with pytest.raises(RequestError, match="refuses"):
        text.render_chat([])


def test_other_tokenizers_and_missing_files_are_refused_at_load(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer at"):
        Text(tmp_path)
    folder = make_folder(tmp_path / "metaspace")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["decoder"] = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="'Metaspace' decoder, needs a byte-level"):
        Text(folder)
    with pytest.raises(ConfigError, match="bos_token '<s>'"):
        Text(make_folder(tmp_path / "bos", bos_token="<s>"))


@settings(max_examples=600, deadline=None)
@given(
    stop=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4),
    deltas=st.lists(st.text("ab\n", max_size=6), max_size=8),
)
def test_stop_strings_cut_at_the_same_place_in_any_cut(stop: list[str], deltas: list[str]) -> None:
    checker = StopChecker(stop)
    out, hit = "", False
    for delta in deltas:
        emitted, hit = checker.feed(delta)
        out += emitted
        if hit:
            break
    assert (out + checker.flush(), hit) == stop_reference(stop, "".join(deltas))


def test_a_possible_beginning_is_held_back_and_given_out_when_it_is_none() -> None:
    checker = StopChecker(("END",))
    assert checker.feed("a E") == ("a ", False)
    assert checker.feed("N") == ("", False)
    assert checker.feed("D") == ("", True)
    checker = StopChecker(("END",))
    assert checker.feed("EN") == ("", False)
    assert checker.feed("E") == ("EN", False)
    assert checker.flush() == "E"
