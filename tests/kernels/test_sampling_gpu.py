"""The samplers on a GPU: the same tokens and log-probabilities as plain torch on the CPU, from graphs too.

TRITON_INTERPRET=1 runs the kernels in Triton-lang's interpreter, on the CPU, where the GPU marker lets them.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from nmoe_backend.parallel.ranks import RankGroup
from nmoe_backend.runtime.output import LogprobColumns, StepOutput, StepResult
from nmoe_backend.runtime.sampler_plain import PlainSampler
from nmoe_backend.types import EngineLimits, RankOutput, SamplingParams, SlotInit
from tests.gates.replica import limits_for
from tests.plain_sampler import SetGrammar

pytestmark = pytest.mark.gpu
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda:0")
NUM_SLOTS = 24
STOPS = (1, 2)


def limits(vocab: int) -> EngineLimits:
    return replace(limits_for(1, 16), max_batch_size=NUM_SLOTS, max_seq_len=96, vocab_size=vocab)


def plain(draw: random.Random, vocab: int) -> SamplingParams:
    return SamplingParams(temperature=draw.choice((0.0, 0.6, 1.0)), seed=draw.randrange(2**64))


def truncated(draw: random.Random, vocab: int) -> SamplingParams:
    return replace(
        plain(draw, vocab),
        top_k=draw.choice((0, 0, 5, 50, 10**6)),
        top_p=draw.choice((1.0, 0.9, 0.4)),
        min_p=draw.choice((0.0, 0.0, 0.1)),
    )


def with_everything(draw: random.Random, vocab: int) -> SamplingParams:
    """Outputs concentrate on the first 8 ids, so that phrases are met."""

    def word(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(8) for _ in range(length))

    grammar = SetGrammar(set(draw.sample(range(vocab), 20)), {draw.randrange(vocab)}) if draw.random() < 0.2 else None
    return replace(
        truncated(draw, vocab),
        repetition_penalty=draw.choice((1.0, 1.0, 1.3)),
        presence_penalty=draw.choice((0.0, 0.0, 0.5)),
        frequency_penalty=draw.choice((0.0, 0.0, 0.5)),
        logit_bias=draw.choice(({}, {3: 5.0, vocab - 1: 2.0}, dict.fromkeys(range(8), 8.0))),
        bad_words_ids=draw.choice(((), (), (word(1), word(2), word(3), word(2)), tuple((n,) for n in range(vocab)))),
        min_tokens=draw.choice((0, 0, 5)),
        num_logprobs=draw.choice((None, None, 0, 3, 20)),
        grammar=grammar,
    )


class Steps:
    """Several samplers that go through the same random life: sequences come, are preempted, and go."""

    def __init__(self, samplers: list, vocab: int, params: Callable[..., SamplingParams], seed: int = 0) -> None:
        self._samplers, self._vocab, self._params = samplers, vocab, params
        self._draw = random.Random(seed)
        self._positions: dict[int, int] = {}

    def step(self) -> list[RankOutput]:
        """Of each sampler, of a random choice of slots."""
        draw = self._draw
        slots = draw.sample(range(NUM_SLOTS), draw.randint(1, NUM_SLOTS))
        for slot in slots:
            if slot not in self._positions or draw.random() < 0.1:
                self._admit(slot)
        positions = [self._positions[slot] for slot in slots]
        logits = (
            torch.randn(len(slots), self._vocab, generator=torch.Generator().manual_seed(draw.randrange(2**32))) * 3
        )
        for slot in slots:
            self._positions[slot] += 1
        return [self._sample(sampler, logits, slots, positions) for sampler in self._samplers]

    def _admit(self, slot: int) -> None:
        draw, sampling = self._draw, self._params(self._draw, self._vocab)
        prompt = tuple(draw.randrange(self._vocab) for _ in range(draw.randint(1, 9)))
        num_outputs = 0 if sampling.grammar is not None else draw.choice((0, 0, 4))
        outputs = tuple(draw.randrange(8) for _ in range(num_outputs))
        for sampler in self._samplers:
            sampler.admit(
                SlotInit(slot=slot, sampling=sampling, prompt_ids=prompt, output_ids=outputs, stop_token_ids=STOPS)
            )
        self._positions[slot] = len(prompt) + num_outputs

    def _sample(self, sampler, logits, slots, positions) -> RankOutput:
        shown = logits.to(sampler.last_tokens.device)
        if sampler.logits is not None:
            shown = sampler.logits[: len(slots)].copy_(shown)
        sampled = sampler.sample(shown, slots, positions)
        assert torch.equal(shown.cpu(), logits), "the raw logits changed"
        return output_of(StepResult(sampled=sampled, sampling_rows=range(len(slots))))


def output_of(result: StepResult) -> RankOutput:
    return StepOutput(result, None if IS_INTERPRETED else torch.cuda.current_stream()).wait(60.0)


@pytest.fixture
def make_kernels():
    """Kernel samplers, on a stream of their own, as a rank's is."""
    from nmoe_backend.runtime.sampler_kernels import KernelSampler

    context = RankGroup.create(1, [DEVICE], 60.0)[0]

    def make(vocab: int, *, captures: bool = False) -> KernelSampler:
        sampler = KernelSampler(limits(vocab), context, captures=captures)
        sampler.capture(lambda line: None)
        return sampler

    with context.activate():
        yield make


def close(got: RankOutput, want: RankOutput) -> None:
    """Log-probabilities within what fp32 weights allow; everything else equal."""
    assert (got.token_ids, got.failed) == (want.token_ids, want.failed)
    assert got.logprobs.keys() == want.logprobs.keys()
    for row, expected in want.logprobs.items():
        entry = got.logprobs[row]
        assert (entry.token_id, [i for i, _ in entry.top]) == (expected.token_id, [i for i, _ in expected.top])
        assert abs(entry.logprob - expected.logprob) < 1e-6


@pytest.mark.parametrize("vocab", [200, 9000])
@pytest.mark.parametrize("params", [plain, truncated, with_everything])
def test_the_kernels_give_the_tokens_of_the_plain_sampler_whatever_a_batch_asks_for(make_kernels, params, vocab):
    samplers = [PlainSampler(limits(vocab), "cpu"), make_kernels(vocab, captures=not IS_INTERPRETED)]
    steps = Steps(samplers, vocab, params)
    for _ in range(3 if IS_INTERPRETED else 40):
        want, got = steps.step()
        close(got, want)
        assert torch.equal(samplers[1].last_tokens.cpu(), samplers[0].last_tokens)


@pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter captures nothing")
@pytest.mark.parametrize("params", [plain, truncated, with_everything])
def test_a_graph_gives_what_its_kernels_give_one_by_one(make_kernels, params):
    samplers = [make_kernels(129280), make_kernels(129280, captures=True)]
    steps = Steps(samplers, 129280, params, seed=7)
    for _ in range(30):
        eager, replayed = steps.step()
        assert eager == replayed


@pytest.mark.skipif(IS_INTERPRETED, reason="there is nothing to wait for")
def test_a_step_waits_for_nothing(make_kernels):
    sampler, draw = make_kernels(9000, captures=True), random.Random(0)
    inits = [
        SlotInit(
            slot=n, sampling=replace(with_everything(draw, 9000), grammar=None), prompt_ids=(3, 4), output_ids=(5,)
        )
        for n in range(NUM_SLOTS)
    ]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for position in (3, 4, 5):
            for init in inits:
                sampler.admit(init)
            sampled = sampler.sample(sampler.logits, range(NUM_SLOTS), [position] * NUM_SLOTS)
            prompt = sampler.prompt_logprobs(sampler.logits, range(NUM_SLOTS), 5)
            output = StepOutput(
                StepResult(sampled=sampled, sampling_rows=range(NUM_SLOTS), prompt_logprobs={0: [prompt]}),
                torch.cuda.current_stream(),
            )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(output.wait(60.0).prompt_logprobs[0]) == NUM_SLOTS


@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_prompt_logprobs_are_those_of_log_softmax(make_kernels, num_top):
    logits = torch.randn(50, 9000, generator=torch.Generator().manual_seed(1)) * 3
    targets = [(7 * n) % 9000 for n in range(50)]
    columns = make_kernels(9000).prompt_logprobs(logits.to(DEVICE), targets, num_top)
    assert isinstance(columns, LogprobColumns)
    got = output_of(StepResult(prompt_logprobs={4: [columns]})).prompt_logprobs[4]
    want = logits.double().log_softmax(-1)
    assert [entry.token_id for entry in got] == targets
    assert [entry.logprob for entry in got] == pytest.approx(
        [want[n, t].item() for n, t in enumerate(targets)], abs=1e-6
    )
    assert [[i for i, _ in entry.top] for entry in got] == want.topk(num_top, dim=1).indices.tolist()


@pytest.mark.skipif(IS_INTERPRETED, reason="the CPU is what it is compared with")
def test_the_plain_sampler_gives_the_same_on_a_gpu_as_on_the_cpu():
    samplers = [PlainSampler(limits(4096), device) for device in ("cpu", "cuda")]
    steps = Steps(samplers, 4096, with_everything, seed=11)
    for _ in range(12):
        want, got = steps.step()
        close(got, want)
