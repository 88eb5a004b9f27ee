"""Fixtures of several files: the small tokenizer, grammars and responders over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nmoe_backend.grammar import GrammarCompiler
from nmoe_backend.text import Text
from tests.grammars import EOS_IDS, VOCAB_SIZE
from tests.responding import WAIT_S, Desk
from tests.texts import make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(folder: Path) -> Text:
    return Text(folder)


@pytest.fixture(scope="module")
def compiler(folder: Path) -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(Text(folder), folder, vocab_size=VOCAB_SIZE, eos_token_ids=EOS_IDS)
    yield made
    made.close()


@pytest.fixture
def running(text: Text) -> Iterator[Callable[..., Desk]]:
    desks: list[Desk] = []

    def start(**options: object) -> Desk:
        desks.append(Desk(text, **options))
        desks[-1].responder.start()
        return desks[-1]

    yield start
    for desk in desks:
        desk.responder.close(timeout_s=WAIT_S)
