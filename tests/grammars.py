"""Compiled grammars over the tokenizer of tests/texts.py: what they allow where."""

from __future__ import annotations

import numpy as np

from nmoe_backend.grammar import GrammarCompiler
from nmoe_backend.text import Text
from nmoe_backend.types import Grammar, Guide, GuideType, TokenMatcher

VOCAB_SIZE = 300  # the tokenizer has 267
EOS_IDS = (263, 290)  # the tokenizer's, and one that it does not know


def compiled(compiler: GrammarCompiler, type: GuideType, source: str) -> Grammar:
    return compiler.compile(Guide(type=type, text=source)).result(60)


def allowed(made: Grammar, *matchers: TokenMatcher) -> list[set[int]]:
    bitmask = np.full((len(matchers), -(-VOCAB_SIZE // 32)), -1, dtype=np.int32)
    made.fill_masks(matchers, bitmask.data)
    bits = np.unpackbits(bitmask.view(np.uint8), axis=1, bitorder="little")
    return [set(np.flatnonzero(row).tolist()) for row in bits]


def walk(made: Grammar, text: Text, written: str) -> set[int]:
    """What may follow `written`, every token of which was allowed."""
    matcher = made.matcher()
    for token_id in text.encode_plain(written):
        assert token_id in allowed(made, matcher)[0], f"{token_id} of {written!r}"
        matcher.advance((token_id,))
    assert matcher.error() is None
    return allowed(made, matcher)[0]
