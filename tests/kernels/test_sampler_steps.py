"""Steps of a worker with the sampler that production has: captured equals eager, and both choose what plain torch
chooses from the same logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nmoe_backend.models import load_spec
from nmoe_backend.runtime.sampler import build_sampler
from nmoe_backend.runtime.sampler_plain import PlainSampler
from nmoe_backend.types import RankOutput, RankPlan, SamplingParams, SlotInit
from scripts.make_tiny_checkpoint import make_checkpoint
from tests.gates.replica import Replica, limits_for

PAGE_SIZE = 16
NUM_STEPS = 12
PROMPTS = [tuple(range(40, 61)), (5, 6, 7), (9,), tuple(range(100, 117))]
SAMPLING = [
    SamplingParams(temperature=0.0, seed=1),
    SamplingParams(seed=2),
    SamplingParams(temperature=0.7, top_p=0.9, top_k=40, seed=3),
    SamplingParams(frequency_penalty=0.5, bad_words_ids=((7,), (8, 9)), min_tokens=4, num_logprobs=3, seed=4),
]


class Watched:
    """A sampler; keeps what it was shown."""

    def __init__(self, sampler) -> None:
        self._sampler = sampler
        self.seen: list[tuple[Tensor, Sequence[int], Sequence[int]]] = []

    def __getattr__(self, name: str):
        return getattr(self._sampler, name)

    def sample(self, logits: Tensor, slots: Sequence[int], positions: Sequence[int]):
        self.seen.append((logits.cpu(), slots, positions))
        return self._sampler.sample(logits, slots, positions)


def inits() -> list[SlotInit]:
    pairs = zip(PROMPTS, SAMPLING, strict=True)
    return [
        SlotInit(slot=slot, sampling=sampling, prompt_ids=prompt, stop_token_ids=(1,))
        for slot, (prompt, sampling) in enumerate(pairs)
    ]


def entered(slot: int, begin: int, end: int) -> list[tuple[int, int, int]]:
    """The pages that positions [begin, end) of a slot are the first of; 4 a slot."""
    return [
        (slot, position // PAGE_SIZE, 4 * slot + position // PAGE_SIZE)
        for position in range(begin, end)
        if position % PAGE_SIZE == 0
    ]


def run(path: Path, device: str, **options) -> tuple[list[RankOutput], Watched]:
    """All prompts in one step, then decode steps of all of them."""
    limits = limits_for(1, PAGE_SIZE, max_batch_size=4, max_prefill_tokens=64, max_seq_len=64, num_pages=16)
    limits = replace(limits, vocab_size=load_spec(path).vocab_size)
    made: list[Watched] = []

    def make_sampler(*args):
        made.append(Watched(build_sampler(*args)))
        return made[0]

    replica = Replica(
        path, 1, PAGE_SIZE, limits=limits, device=device, keep_quantized=device != "cpu", make_sampler=make_sampler,
        **options,
    )  # fmt: skip
    slots, lengths = list(range(len(PROMPTS))), [len(prompt) for prompt in PROMPTS]
    first = RankPlan(
        slots=slots,
        starts=[0] * len(slots),
        lengths=lengths,
        token_ids=[token for prompt in PROMPTS for token in prompt],
        samples=[True] * len(slots),
        new_pages=[page for slot in slots for page in entered(slot, 0, lengths[slot])],
        admitted=inits(),
    )
    outputs = [replica.step(first)[0]]
    for step in range(NUM_STEPS):
        order = slots[step % 4 :] + slots[: step % 4]
        starts = [lengths[slot] + step for slot in order]
        decode = RankPlan(
            slots=order, starts=starts, lengths=[1] * 4, num_decode=4, samples=[True] * 4,
            new_pages=[page for slot, at in zip(order, starts, strict=True) for page in entered(slot, at, at + 1)],
        )  # fmt: skip
        outputs.append(replica.step(decode)[0])
    replica.close()
    return outputs, made[0]


def assert_chosen_as_plain_torch_would(outputs: list[RankOutput], sampler: Watched, vocab_size: int) -> None:
    limits = replace(limits_for(1, PAGE_SIZE), max_batch_size=4, max_seq_len=64, vocab_size=vocab_size)
    plain = PlainSampler(limits, "cpu")
    for init in inits():
        plain.admit(init)
    for output, shown in zip(outputs, sampler.seen, strict=True):
        want = plain.sample(*shown)
        assert list(output.token_ids) == want.token_ids.tolist()
        entries = {} if want.logprobs is None else want.logprobs.entries()
        assert output.logprobs.keys() == entries.keys() and len(entries) == 1
        for row, expected in entries.items():
            assert output.logprobs[row].token_id == expected.token_id
            assert output.logprobs[row].logprob == pytest.approx(expected.logprob, abs=1e-6)
            assert [token for token, _ in output.logprobs[row].top] == [token for token, _ in expected.top]


def test_a_worker_samples_by_slot_and_position(device, tiny_checkpoint):
    outputs, sampler = run(tiny_checkpoint, device)
    assert_chosen_as_plain_torch_would(outputs, sampler, load_spec(tiny_checkpoint).vocab_size)


@pytest.mark.gpu
def test_steps_with_the_samplers_graphs_equal_eager_ones_bit_for_bit(tmp_path):
    path = make_checkpoint(tmp_path / "slim", preset="slim", dtype="fp8")
    options = {"device": "cuda:0", "dtype": torch.bfloat16}
    (captured, sampler), (eager, _) = run(path, **options), run(path, capture=False, **options)
    assert [(one.token_ids, one.logprobs) for one in captured] == [(one.token_ids, one.logprobs) for one in eager]
    assert_chosen_as_plain_torch_would(captured, sampler, load_spec(path).vocab_size)
