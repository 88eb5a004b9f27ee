"""The plain sampler under grammars: only what their bitmasks allow, whatever else is asked for; matchers in step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nmoe_backend.kernels.sampling import bits_of, restrict
from nmoe_backend.types import SamplingParams, SlotInit
from tests.plain_sampler import PROMPT, VOCAB, SetGrammar, make_sampler, random_logits, sample_one

torch.set_num_threads(1)


@given(
    vocab=st.sampled_from([1, 31, 32, 33, 61, 100]), rows=st.integers(1, 4), seed=st.integers(0, 10**6), data=st.data()
)
@settings(max_examples=100, deadline=None)
def test_a_bitmask_keeps_what_is_allowed_finite_and_nothing_else(vocab, rows, seed, data):
    logits = random_logits(rows, seed, vocab)
    logits[:, :: data.draw(st.integers(1, 5))] = data.draw(st.sampled_from([-math.inf, 1.5, math.inf]))
    words = torch.randint(-(2**31), 2**31, (rows, -(-vocab // 32)), generator=torch.Generator().manual_seed(seed))
    got = restrict(logits, bits_of(words.to(torch.int32), vocab)).tolist()
    for row, numbers in enumerate(words.tolist()):
        for token, value in enumerate(logits[row].tolist()):
            is_allowed = numbers[token // 32] >> (token % 32) & 1
            want = max(value, torch.finfo(torch.float32).min) if is_allowed else -math.inf
            assert got[row][token] == want


ALLOWED = {5, 31, 32, 60}


GREEDY_OR_DRAWN = [SamplingParams(temperature=0.0), SamplingParams(top_k=3, top_p=0.5, min_p=0.1), SamplingParams()]


@pytest.mark.parametrize("params", GREEDY_OR_DRAWN, ids=["greedy", "truncated", "plain"])
@pytest.mark.parametrize(
    "against",
    [
        {},
        {"logit_bias": dict.fromkeys(ALLOWED, -100.0)},
        {"repetition_penalty": 3e38},
        {"bad_words_ids": tuple((token,) for token in range(VOCAB))},
        {"bad_words_ids": tuple((token,) for token in ALLOWED)},
        {"min_tokens": 99},
    ],
    ids=["alone", "bias", "overflow", "all-banned", "allowed-banned", "min-tokens"],
)
def test_only_what_the_grammar_allows_is_picked_whatever_else_is_asked_for(params, against):
    params = replace(params, grammar=SetGrammar(ALLOWED), **against)
    sampler = make_sampler(params, stop=ALLOWED, prompt=(*PROMPT, *ALLOWED))
    for position in range(8, 40):
        logits = random_logits(1, position) - 50 * torch.isin(torch.arange(VOCAB), torch.tensor([*ALLOWED]))
        assert sample_one(sampler, logits, position) in ALLOWED


def test_bans_choose_among_what_is_allowed():
    params = SamplingParams(temperature=0.0, grammar=SetGrammar(ALLOWED), bad_words_ids=((5,), (31,), (32,)))
    sampler = make_sampler(params)
    assert {sample_one(sampler, random_logits(1, n), 4 + n) for n in range(20)} == {60}


def test_a_grammar_changes_the_distribution_only_by_what_it_leaves_out():
    grammar = SetGrammar(ALLOWED)
    params = SamplingParams(temperature=0.7, grammar=grammar)
    sampler = make_sampler(params, replace(params, grammar=None, seed=0))
    masked = torch.full((1, VOCAB), -math.inf)
    logits = random_logits(1)
    masked[:, [*ALLOWED]] = logits[:, [*ALLOWED]]
    for position in range(4, 40):
        assert sample_one(sampler, logits, position) == sample_one(sampler, masked, position, slot=1)


def test_matchers_follow_their_slots_through_steps_new_owners_and_failures():
    turns = SetGrammar({1, 2}, {3}, {4, 5})
    p = SamplingParams(temperature=0.0, seed=0)
    sampler = make_sampler(replace(p, grammar=turns), p, replace(p, grammar=SetGrammar({9}, limit=1)))
    first = sampler.sample(random_logits(3), [2, 1, 0], [4, 4, 4])
    free = int(first.token_ids[1])
    assert (first.failed, int(first.token_ids[0])) == ({}, 9) and int(first.token_ids[2]) in (1, 2)
    sampler.sample(random_logits(1), [1], [5])  # a step without grammars in between
    second = sampler.sample(random_logits(3, 1), [1, 0, 2], [6, 5, 5])
    assert int(second.token_ids[1]) == 3
    assert [str(error) for error in second.failed.values()] == ["too long"] and set(second.failed) == {2}
    outputs = (2, 3)
    sampler.admit(SlotInit(slot=2, sampling=replace(p, grammar=turns), prompt_ids=PROMPT, output_ids=outputs))
    sampler.admit(SlotInit(slot=0, sampling=p, prompt_ids=PROMPT))
    third = sampler.sample(random_logits(3), [0, 1, 2], [4, 7, 6])
    assert third.failed == {} and int(third.token_ids[2]) in (4, 5), "a preempted sequence goes on where it was"
    assert int(third.token_ids[0]) == int(random_logits(3)[0].argmax()) and free == int(random_logits(3)[1].argmax())
