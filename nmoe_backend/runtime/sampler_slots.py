"""What a sequence asks of a sampler, worked out once when it takes a slot. Both samplers read it; no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nmoe_backend.types import SamplingParams, SlotInit

ANY_TOKEN = -1  # in the padding of phrases: matches everything
NO_TOKEN = -2  # in a history: a prompt position, or none yet; matches nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotNeeds:
    """One sequence's."""

    sampling: SamplingParams
    seed: int  # signed: the same 64 bits
    top_k: int  # 0 where it leaves the whole vocabulary
    min_end: int  # stop ids are banned at positions before this one
    stop_ids: Sequence[int]
    banned_ids: Sequence[int]  # bad words of one token
    phrases: Sequence[Sequence[int]]  # bad words of several, padded in front with ANY_TOKEN to one length
    num_logprobs: int  # alternatives; -1: no log-probabilities at all

    @classmethod
    def of(cls, init: SlotInit, vocab_size: int) -> SlotNeeds:
        p = init.sampling
        assert p.seed is not None, f"slot {init.slot}: the engine resolves the seed before a sequence is admitted"
        longer = [word for word in p.bad_words_ids if len(word) > 1]
        length = max(map(len, longer), default=0)
        return cls(
            sampling=p,
            seed=p.seed - (2**64 if p.seed >= 2**63 else 0),
            top_k=p.top_k if p.top_k < vocab_size else 0,
            min_end=len(init.prompt_ids) + p.min_tokens,
            stop_ids=init.stop_token_ids if p.min_tokens else (),
            banned_ids=[word[0] for word in p.bad_words_ids if len(word) == 1],
            phrases=[[ANY_TOKEN] * (length - len(word)) + list(word) for word in longer],
            num_logprobs=-1 if p.num_logprobs is None else min(p.num_logprobs, vocab_size),
        )

    @property
    def is_greedy(self) -> bool:
        """The most likely token is taken, the lowest id of equals."""
        return self.sampling.temperature == 0

    @property
    def is_truncated(self) -> bool:
        """The draw is from a part of the vocabulary."""
        return not self.is_greedy and (self.top_k > 0 or self.sampling.top_p < 1 or self.sampling.min_p > 0)

    @property
    def has_penalties(self) -> bool:
        """Tokens of prompt and output are counted."""
        p = self.sampling
        return p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
