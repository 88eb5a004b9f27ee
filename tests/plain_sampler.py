"""The plain sampler with a slot for each of some parameters, logits for it, and grammars that are sets of ids."""

from __future__ import annotations

from dataclasses import replace

import torch

from nmoe_backend.runtime.sampler_plain import PlainSampler
from nmoe_backend.types import EngineLimits, RequestError, SamplingParams, SlotInit
from tests.gates.replica import limits_for

VOCAB = 61
PROMPT = (3, 7, 7, 20)


def random_logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def sampler_limits(num_slots: int, vocab: int) -> EngineLimits:
    return replace(limits_for(1, 16), max_batch_size=num_slots, max_seq_len=256, vocab_size=vocab)


def make_sampler(*params: SamplingParams, prompt=PROMPT, outputs=(), stop=(), vocab=VOCAB) -> PlainSampler:
    sampler = PlainSampler(sampler_limits(len(params), vocab), "cpu")
    for slot, p in enumerate(params):
        p = p if p.seed is not None else replace(p, seed=0)
        sampler.admit(
            SlotInit(slot=slot, sampling=p, prompt_ids=prompt, output_ids=tuple(outputs), stop_token_ids=tuple(stop))
        )
    return sampler


def sample_one(sampler: PlainSampler, logits: torch.Tensor, position: int, slot: int = 0) -> int:
    return int(sampler.sample(logits, [slot], [position]).token_ids[0])


class SetGrammar:
    """Allows a set of ids at every position; refuses any other, and gives up after `limit` tokens."""

    def __init__(self, *sets: set[int], limit: int = 10**6) -> None:
        self.sets, self.limit = sets, limit

    def matcher(self):
        return SetMatcher(self)

    def fill_masks(self, matchers, bitmask):
        words = torch.frombuffer(bitmask, dtype=torch.int32).view(len(matchers), -1)
        for row, matcher in zip(words, matchers, strict=True):
            row.zero_()
            for token_id in matcher.grammar.sets[len(matcher.seen) % len(matcher.grammar.sets)]:
                row[token_id // 32] |= torch.tensor(1 << token_id % 32, dtype=torch.int64).to(torch.int32)


class SetMatcher:
    def __init__(self, grammar):
        self.grammar, self.seen = grammar, []

    def advance(self, token_ids):
        for token_id in token_ids:
            assert token_id in self.grammar.sets[len(self.seen) % len(self.grammar.sets)]
            self.seen.append(token_id)

    def error(self):
        return RequestError("too long") if len(self.seen) >= self.grammar.limit else None
