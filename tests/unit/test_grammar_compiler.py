"""GrammarCompiler: its threads, its cache, what waits, and what a compile that fails or hangs costs the others."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from nmoe_backend import grammar
from nmoe_backend.grammar import GrammarCompiler
from nmoe_backend.text import Text
from nmoe_backend.types import ErrorKind, Grammar, Guide, RequestError
from tests.grammars import EOS_IDS, VOCAB_SIZE, compiled


@pytest.fixture
def own(folder: Path) -> Iterator[GrammarCompiler]:
    """A compiler of the test's own: nothing is cached."""
    made = GrammarCompiler(Text(folder), folder, vocab_size=VOCAB_SIZE, eos_token_ids=EOS_IDS)
    yield made
    made.close()


class _Panic(BaseException):
    """As pyo3's PanicException: no Exception."""


def test_a_panic_of_the_compiler_is_answered_and_its_thread_goes_on(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def panic(guide: Guide) -> str:
        raise _Panic("index out of bounds")

    with monkeypatch.context() as patched:
        patched.setattr(grammar, "_source", panic)
        for number in range(2 * grammar.COMPILE_THREADS):
            with pytest.raises(RequestError, match="see the server's log") as caught:
                compiled(compiler, "regex", f"panic{number}")
            assert caught.value.kind is ErrorKind.ENGINE
    assert "index out of bounds" in caplog.text
    assert compiled(compiler, "regex", "panic0")


ENDS = """
import sys, threading
from pathlib import Path
from nmoe_backend import grammar
from nmoe_backend.text import Text
from nmoe_backend.types import Guide
begun = threading.Event()
def hang(guide):
    begun.set()
    threading.Event().wait()
grammar._source = hang
folder = Path(sys.argv[1])
compiler = grammar.GrammarCompiler(Text(folder), folder, vocab_size=300, eos_token_ids=(263,))
future = compiler.compile(Guide(type="regex", text="a"))
begun.wait()
compiler.close()
print(future.exception(0).kind.name)
"""


def test_a_compile_that_never_ends_does_not_keep_the_process(folder: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", ENDS, str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "UNAVAILABLE\n", "")


def test_the_same_guide_is_compiled_once_and_a_refused_one_is_forgotten(compiler: GrammarCompiler) -> None:
    guide = Guide(type="regex", text="once")
    first = compiler.compile(guide)
    assert compiler.compile(Guide(type="regex", text="once")) is first
    wrong = Guide(type="regex", text="(")
    refused = compiler.compile(wrong)
    assert isinstance(refused.exception(60), RequestError)
    assert compiler.compile(wrong) is not refused


def test_the_cache_forgets_what_was_used_longest_ago(own: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "CACHED_GUIDES", 2)
    a, b, c = (Guide(type="regex", text=name) for name in "abc")
    futures = {guide: own.compile(guide) for guide in (a, b)}
    assert all(future.result(60) for future in futures.values())
    own.compile(a)
    own.compile(c)
    assert own.compile(a) is futures[a]
    assert own.compile(b) is not futures[b]


def test_the_cache_has_a_budget_of_characters(own: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "CACHED_CHARACTERS", 10)
    short, long, longer = (Guide(type="regex", text=name) for name in ("abc", "abcdefg", "abcdefgh"))
    futures = {}
    for guide in (short, long):  # 10 characters
        futures[guide] = own.compile(guide)
        assert futures[guide].result(60)
    assert own.compile(short) is futures[short]
    own.compile(longer).result(60)  # 18: the long one, used longest ago, and the short one go
    assert [own._cache.keys() & {guide} != set() for guide in (short, long, longer)] == [False, False, True]


def test_a_guide_that_waits_is_not_forgotten(own: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would not be counted then, and any number could wait."""
    monkeypatch.setattr(grammar, "CACHED_GUIDES", 2)
    monkeypatch.setattr(grammar, "MAX_WAITING", 4)
    go, _ = _hold(monkeypatch)
    waiting = [own.compile(guide) for guide in _guides("abcd")]
    with pytest.raises(RequestError, match="4 guides wait"):
        own.compile(Guide(type="regex", text="e"))
    go.set()
    assert all(future.result(60) for future in waiting)


def _hold(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Semaphore]:
    """(nothing is compiled before this event, released by every one that begins)."""
    go, begun, compile_ = threading.Event(), threading.Semaphore(0), GrammarCompiler._compile

    def held(self: GrammarCompiler, guide: Guide) -> Grammar:
        begun.release()
        assert go.wait(60)
        return compile_(self, guide)

    monkeypatch.setattr(GrammarCompiler, "_compile", held)
    return go, begun


def _guides(names: Iterable[str]) -> list[Guide]:
    return [Guide(type="regex", text=name) for name in names]


def test_too_many_that_wait_are_refused_as_overload(own: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "MAX_WAITING", 4)
    go, _ = _hold(monkeypatch)
    waiting = [own.compile(guide) for guide in _guides("abcd")]
    assert own.compile(Guide(type="regex", text="a")) is waiting[0]
    with pytest.raises(RequestError, match="4 guides wait") as caught:
        own.compile(Guide(type="regex", text="e"))
    assert caught.value.kind is ErrorKind.OVERLOADED
    go.set()
    assert all(future.result(60) for future in waiting)
    assert own.compile(Guide(type="regex", text="e")).result(60)


def test_closing_tells_those_who_wait_and_waits_for_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, begun = _hold(monkeypatch)
    closing = GrammarCompiler(Text(folder), folder, vocab_size=VOCAB_SIZE, eos_token_ids=EOS_IDS)
    futures = [closing.compile(guide) for guide in _guides("abcd")]
    assert all(begun.acquire(timeout=60) for _ in range(grammar.COMPILE_THREADS))
    thread = threading.Thread(target=closing.close, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "two run, and are held"
    assert [future.cancelled() for future in futures] == [False, False, True, True]
    for future in futures[:2]:
        error = future.exception(0)
        assert isinstance(error, RequestError) and error.kind is ErrorKind.UNAVAILABLE
    go.set()
