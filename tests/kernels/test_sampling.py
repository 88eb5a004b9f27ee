"""Sampling against independent references: transformers, penalties by hand, splitmix64 in Python integers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers.generation import logits_process as hf

from nmoe_backend.kernels.sampling import counter_uniform, draw_tokens, keep_mask, token_weights
from nmoe_backend.runtime.output import SampledTokens
from nmoe_backend.runtime.sampler_plain import PlainSampler
from nmoe_backend.types import SamplingParams, SlotInit, TokenLogprobs
from tests.plain_sampler import PROMPT, VOCAB, make_sampler, random_logits, sample_one, sampler_limits

torch.set_num_threads(1)

MASK64 = 2**64 - 1


def logprobs_of(out: SampledTokens) -> dict[int, TokenLogprobs]:
    return {} if out.logprobs is None else out.logprobs.entries()


def processed(sampler: PlainSampler, logits: torch.Tensor, position: int = len(PROMPT)) -> torch.Tensor:
    """[V] logits of slot 0 as they are drawn from."""
    return sampler._edit(logits, [sampler._slot(0)], [0], [position])[0]


def distribution(params: SamplingParams, logits: torch.Tensor) -> torch.Tensor:
    """[V] float64 probabilities with which the draw picks each id."""
    column = [torch.tensor([v], dtype=torch.float64) for v in (params.temperature, params.top_p, params.min_p)]
    weights = token_weights(logits, column[0])
    weights = weights * keep_mask(weights, torch.tensor([params.top_k]), column[1], column[2])
    return (weights / weights.sum(1, keepdim=True))[0]


def hf_distribution(params: SamplingParams, logits: torch.Tensor) -> torch.Tensor:
    scores, ids = logits.double(), torch.zeros(1, 1, dtype=torch.long)
    warpers = [hf.TemperatureLogitsWarper(params.temperature)]
    warpers += [hf.TopKLogitsWarper(params.top_k)] if params.top_k else []
    warpers += [hf.TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    warpers += [hf.MinPLogitsWarper(params.min_p)] if params.min_p > 0 else []
    for warper in warpers:
        scores = warper(ids, scores)
    return scores.softmax(-1)[0]


truncations = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.1, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([0, 1, 2, 5, 60, 61, 500]),
    top_p=st.sampled_from([0.05, 0.3, 0.77, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.4, 1.0]),
)


@given(params=truncations, seed=st.integers(0, 10**6))
@settings(max_examples=300, deadline=None)
def test_kept_set_and_probabilities_equal_transformers_warpers(params, seed):
    logits = random_logits(1, seed)
    ours, theirs = distribution(params, logits), hf_distribution(params, logits)
    assert torch.equal(ours > 0, theirs > 0)
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=0)


def test_top_p_keeps_the_lower_id_among_equals_and_top_k_keeps_all_equals():
    weights = torch.tensor([[0.2, 1.0, 0.4, 0.4]], dtype=torch.float64)
    off, one = torch.tensor([0.0], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    top_p = keep_mask(weights, torch.tensor([0]), torch.tensor([0.6], dtype=torch.float64), off)
    assert top_p.tolist() == [[False, True, True, False]]
    assert keep_mask(weights, torch.tensor([2]), one, off).tolist() == [[False, True, True, True]]


def splitmix64_uniform(seed: int, position: int) -> float:
    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    key = mix((seed + golden) & MASK64)
    return (mix((key + (position + 1) * golden) & MASK64) >> 11) * 2.0**-53


@given(seed=st.integers(0, MASK64), position=st.integers(0, 10**6))
def test_uniform_is_splitmix64_of_seed_and_position(seed, position):
    signed = seed - 2**64 if seed >= 2**63 else seed
    got = counter_uniform(torch.tensor([signed]), torch.tensor([position])).item()
    assert got == splitmix64_uniform(seed, position)
    assert 0 <= got < 1


def test_uniforms_of_neighbouring_seeds_and_positions_are_uncorrelated_and_uniform():
    seeds = torch.arange(200).repeat_interleave(200)
    u = counter_uniform(seeds, torch.arange(200).repeat(200)).view(200, 200)
    assert abs(u.mean().item() - 0.5) < 0.005
    histogram = torch.histc(u.float(), 20, 0, 1)
    assert ((histogram - 2000) ** 2 / 2000).sum().item() < 45  # chi-square, 19 degrees: p = 0.0007
    centred = u - 0.5
    for other in (centred.roll(1, 0), centred.roll(1, 1), centred.roll((1, -1), (0, 1))):
        assert abs((centred * other).mean().item()) * 12 < 0.025  # 5 sigma at 40,000


@given(weights=st.lists(st.sampled_from([0.0, 1e-300, 0.25, 1.0, 3.0]), min_size=1, max_size=12), u=st.floats(0, 1))
def test_draw_is_inverse_cdf_in_id_order_and_never_picks_a_weightless_token(weights, u):
    u = min(u, 1 - 2.0**-53)
    got = int(draw_tokens(torch.tensor([weights], dtype=torch.float64), torch.tensor([u], dtype=torch.float64))[0])
    total, running = sum(weights), 0.0
    if total == 0:
        assert got == 0
        return
    expected = None
    for i, weight in enumerate(weights):
        running += weight
        if running > u * total:
            expected = i
            break
    assert got == expected
    assert weights[got] > 0


def test_frequencies_follow_the_truncated_distribution():
    params = SamplingParams(temperature=0.9, top_k=12, top_p=0.9, min_p=0.02, seed=123)
    logits = random_logits(1, seed=5)
    sampler, draws = make_sampler(params), 20_000
    counts = torch.zeros(VOCAB, dtype=torch.float64)
    uniforms = counter_uniform(torch.full((draws,), 123), torch.arange(draws))
    weights = distribution(params, logits)
    counts.index_add_(0, draw_tokens(weights.expand(draws, -1).contiguous(), uniforms), torch.ones(draws).double())
    expected = hf_distribution(params, logits) * draws
    kept = expected > 0
    assert counts[~kept].sum() == 0
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum().item()
    degrees = int(kept.sum()) - 1
    assert degrees >= 3
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)
    # The sampler draws the very same tokens.
    direct = [sample_one(sampler, logits, position) for position in range(50)]
    assert direct == draw_tokens(weights.expand(50, -1).contiguous(), uniforms[:50]).tolist()


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_penalty_is_transformers_over_prompt_and_output(penalty):
    outputs = (5, 9, 5)
    logits = random_logits(1, seed=2)
    sampler = make_sampler(SamplingParams(repetition_penalty=penalty), outputs=outputs)
    expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([PROMPT + outputs]), logits.clone())
    assert torch.allclose(processed(sampler, logits, len(PROMPT) + 3), expected[0], rtol=1e-6)


def test_presence_and_frequency_penalties_count_the_output_only():
    sampler = make_sampler(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), outputs=(5, 9, 5))
    logits = random_logits(1, seed=2)
    expected = logits[0].clone()
    expected[5] -= 0.5 + 2 * 0.25
    expected[9] -= 0.5 + 0.25
    assert torch.allclose(processed(sampler, logits), expected)


def test_penalties_grow_as_tokens_are_sampled():
    logits = torch.tensor([[2.5, 2.0, 0.0]])
    sampler = PlainSampler(sampler_limits(1, 3), "cpu")
    params = SamplingParams(temperature=0.0, frequency_penalty=1.0, seed=0)
    sampler.admit(SlotInit(slot=0, sampling=params, prompt_ids=(2,)))
    assert [sample_one(sampler, logits, 1 + i) for i in range(6)] == [0, 1, 0, 1, 0, 1]


def test_logit_bias_comes_before_the_penalties():
    params = SamplingParams(logit_bias={7: 4.0, 30: -2.5}, repetition_penalty=2.0)
    logits = torch.zeros(1, VOCAB)
    got = processed(make_sampler(params), logits)
    assert got[7] == 2.0  # 4 / 2: 7 is in the prompt
    assert got[30] == -2.5
    assert int((got != 0).sum()) == 2


def test_stop_ids_are_banned_below_min_tokens_as_in_transformers():
    sampler = make_sampler(SamplingParams(min_tokens=3), stop=(1, 40))
    logits = random_logits(1, seed=3)
    for num_outputs in range(5):
        processor = hf.MinNewTokensLengthLogitsProcessor(len(PROMPT), 3, [1, 40])
        ids = torch.zeros(1, len(PROMPT) + num_outputs, dtype=torch.long)
        expected = processor(ids, logits.clone())[0]
        assert torch.equal(processed(sampler, logits, len(PROMPT) + num_outputs), expected), num_outputs


@given(
    words=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=5),
    outputs=st.lists(st.integers(0, 3), max_size=8),
)
@settings(max_examples=200, deadline=None)
def test_bad_words_are_banned_as_in_transformers_over_the_output(words, outputs):
    params = SamplingParams(bad_words_ids=tuple(map(tuple, words)))
    sampler = make_sampler(params, outputs=outputs, prompt=(0, 1, 2, 3))
    logits = random_logits(1, seed=4)
    got = processed(sampler, logits, 4 + len(outputs))
    # transformers matches over prompt and output; an output alone is what must be free of bad words here. It refuses
    # duplicates and an empty sequence, hence the set and the id that no word has.
    unique = [list(word) for word in dict.fromkeys(map(tuple, words))]
    processor = hf.NoBadWordsLogitsProcessor(unique, eos_token_id=torch.tensor([60]))
    expected = processor(torch.tensor([[50, *outputs]]), logits.clone())[0]
    assert torch.equal(got, expected)


def test_generated_bad_word_is_never_completed_across_steps():
    params = SamplingParams(temperature=0.0, bad_words_ids=((2, 2, 2), (5,)), seed=0)
    sampler = make_sampler(params)
    logits = torch.zeros(1, VOCAB)
    logits[0, 5], logits[0, 2], logits[0, 9] = 9.0, 8.0, 7.0
    tokens = [sample_one(sampler, logits, len(PROMPT) + i) for i in range(7)]
    assert tokens == [2, 2, 9, 2, 2, 9, 2]


def test_a_row_with_everything_banned_ignores_its_bans():
    params = SamplingParams(temperature=0.0, bad_words_ids=tuple((i,) for i in range(VOCAB)))
    logits = random_logits(1, seed=6)
    assert sample_one(make_sampler(params), logits, 4) == int(logits.argmax())
    drawn = sample_one(make_sampler(replace(params, temperature=1.0, top_p=0.5)), logits, 4)
    assert 0 <= drawn < VOCAB


def test_greedy_takes_the_lowest_id_of_equals():
    logits = torch.zeros(1, VOCAB)
    logits[0, [17, 4, 50]] = 1.0
    assert sample_one(make_sampler(SamplingParams(temperature=0.0)), logits, 4) == 4


@pytest.mark.parametrize("temperature", [1e-300, 1e-9])
def test_the_smallest_temperatures_give_the_best_token_and_no_nan(temperature):
    logits = random_logits(1, seed=8)
    params = SamplingParams(temperature=temperature, top_k=5, top_p=0.9)
    assert sample_one(make_sampler(params), logits, 4) == int(logits.argmax())


def test_extreme_logits_and_penalties_still_give_a_token_in_range():
    logits = random_logits(1, seed=8) * 1e30
    params = SamplingParams(temperature=2.0, presence_penalty=-2.0, repetition_penalty=10.0, logit_bias={3: 100.0})
    assert 0 <= sample_one(make_sampler(params, outputs=(1, 2, 3)), logits, 7) < VOCAB


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("penalty", [1e-45, 1e-38, 3e38])  # FP32 tensors carry subnormals too
def test_a_penalty_that_overflows_still_draws_from_the_vocabulary(penalty, top_p):
    params = SamplingParams(repetition_penalty=penalty, top_p=top_p)
    for logits in (torch.full((1, VOCAB), 5.0), torch.full((1, VOCAB), -5.0), torch.zeros(1, VOCAB)):
        for position in range(4, 12):
            assert 0 <= sample_one(make_sampler(params), logits, position) < VOCAB
    favoured = {sample_one(make_sampler(params), torch.full((1, VOCAB), 5.0), n) for n in range(4, 40)}
    assert favoured == set(PROMPT) if penalty < 1 else favoured.isdisjoint(PROMPT)


sampling_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    top_k=st.sampled_from([0, 3, 40]),
    top_p=st.sampled_from([0.4, 1.0]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
    presence_penalty=st.sampled_from([0.0, 1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.sampled_from([{}, {5: 3.0, 11: -4.0}]),
    bad_words_ids=st.sampled_from([(), ((5,), (11, 12)), ((1, 2, 3),)]),
    min_tokens=st.sampled_from([0, 4]),
    seed=st.integers(0, MASK64),
    num_logprobs=st.sampled_from([None, 0, 3]),
)


def run_alone(params: SamplingParams, logits: torch.Tensor, num_steps: int) -> list[tuple[int, object]]:
    """logits [steps, V]; one request in a sampler of its own."""
    sampler, result = make_sampler(params, stop=(9,)), []
    for step in range(num_steps):
        out = sampler.sample(logits[step : step + 1], [0], [len(PROMPT) + step])
        result.append((int(out.token_ids[0]), logprobs_of(out).get(0)))
    return result


@given(batch=st.lists(sampling_params, min_size=2, max_size=6), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_a_row_gives_the_same_tokens_alone_and_in_any_mixed_batch(batch, seed):
    num_steps = 6
    logits = random_logits(len(batch) * num_steps, seed).view(len(batch), num_steps, VOCAB)
    alone = [run_alone(params, logits[i], num_steps) for i, params in enumerate(batch)]
    sampler = make_sampler(*batch, stop=(9,))
    order = list(reversed(range(len(batch))))
    for step in range(num_steps):
        out = sampler.sample(logits[order, step], order, [len(PROMPT) + step] * len(batch))
        for n, slot in enumerate(order):
            assert (int(out.token_ids[n]), logprobs_of(out).get(n)) == alone[slot][step]


@given(params=sampling_params, seed=st.integers(0, 1000), cut=st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_a_preempted_sequence_goes_on_with_the_same_tokens_in_another_slot(params, seed, cut):
    num_steps = 8
    logits = random_logits(num_steps, seed)
    expected = [token for token, _ in run_alone(params, logits, num_steps)]
    sampler = make_sampler(replace(params, frequency_penalty=2.0, bad_words_ids=((4,), (4, 4))), params, stop=(9,))
    init = SlotInit(slot=0, sampling=params, prompt_ids=PROMPT, output_ids=tuple(expected[:cut]), stop_token_ids=(9,))
    sample_one(sampler, logits[:1], len(PROMPT))  # leaves the former sequence's state behind
    sampler.admit(init)
    assert [sample_one(sampler, logits[i : i + 1], len(PROMPT) + i) for i in range(cut, num_steps)] == expected[cut:]


def test_sampling_leaves_the_callers_logits_unchanged():
    logits = random_logits(1)
    before = logits.clone()
    params = SamplingParams(logit_bias={3: 1.0}, repetition_penalty=2.0, bad_words_ids=((1,),), num_logprobs=2)
    make_sampler(params).sample(logits, [0], [4])
    assert torch.equal(logits, before)


def test_logprobs_are_of_the_raw_logits_whatever_the_parameters():
    params = SamplingParams(temperature=0.3, top_k=1, logit_bias={8: 50.0}, repetition_penalty=1.7, num_logprobs=4)
    logits = random_logits(1, seed=9)
    out = make_sampler(params).sample(logits, [0], [4])
    expected = torch.log_softmax(logits[0].double(), -1)
    got = logprobs_of(out)[0]
    assert got.token_id == 8 == int(out.token_ids[0])
    assert got.logprob == pytest.approx(expected[8].item(), abs=1e-12)
    best = expected.sort(descending=True, stable=True)
    assert [i for i, _ in got.top] == best.indices[:4].tolist()
    assert [v for _, v in got.top] == pytest.approx(best.values[:4].tolist(), abs=1e-12)


def test_only_rows_that_asked_have_logprobs_each_with_its_own_count():
    params = [SamplingParams(num_logprobs=n) for n in (None, 0, 5)]
    out = make_sampler(*params).sample(random_logits(3), [0, 1, 2], [4, 4, 4])
    assert sorted(logprobs_of(out)) == [1, 2]
    assert [len(logprobs_of(out)[n].top) for n in (1, 2)] == [0, 5]


def test_prompt_logprobs_equal_log_softmax_across_the_block_bound():
    logits = random_logits(150, seed=10)
    targets = [(7 * i) % VOCAB for i in range(150)]
    got = make_sampler(SamplingParams()).prompt_logprobs(logits, targets, 3).entries()
    assert list(got) == list(range(150))
    got = list(got.values())
    expected = torch.log_softmax(logits.double(), -1)
    assert [entry.token_id for entry in got] == targets
    assert [e.logprob for e in got] == pytest.approx([expected[i, t].item() for i, t in enumerate(targets)], abs=1e-12)
    assert [[i for i, _ in e.top] for e in got] == expected.topk(3, dim=1).indices.tolist()


def test_prompt_logprobs_of_no_rows_are_empty():
    assert make_sampler(SamplingParams()).prompt_logprobs(random_logits(0), [], 3).entries() == {}


def test_more_alternatives_than_tokens_gives_all_tokens():
    logits = torch.tensor([[0.0, 1.0, 0.0]])
    sampler = PlainSampler(sampler_limits(1, 3), "cpu")
    sampler.admit(SlotInit(slot=0, sampling=SamplingParams(seed=1, num_logprobs=20), prompt_ids=(0,)))
    out = sampler.sample(logits, [0], [1])
    assert [i for i, _ in logprobs_of(out)[0].top] == [1, 0, 2]


def test_an_all_greedy_batch_without_extras_returns_the_callers_argmax_for_an_empty_batch_too():
    sampler = make_sampler(*[SamplingParams(temperature=0.0)] * 3)
    logits = random_logits(3)
    assert torch.equal(sampler.sample(logits, [2, 0, 1], [4, 5, 6]).token_ids, logits.argmax(1))
    assert sampler.sample(random_logits(0), [], []).token_ids.tolist() == []
