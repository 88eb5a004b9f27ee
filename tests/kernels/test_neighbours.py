"""Greedy output of a request does not depend on its neighbours: production steps of a Hopper GPU, graphs included.

Tokens and logits, of prompt and output, are compared bit for bit, of a request alone and beside 1 to 63 others, in
other slots, started with them or before them, with its prompt in chunks of any size. The longest prompt nearly fills a
piece of attention's context; the model has DeepSeek's head geometry and an o_proj of DeepSeek's 16,384 columns.

What is not promised: a request that was preempted has its own tokens fed again as a prompt, through another kernel; and
another number of ranks adds up experts in another order.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from nmoe_backend.step_buckets import step_buckets
from tests.gates.replica import Driver, Generated, Replica, limits_for
from tests.kernels.test_hopper_steps import make_model

pytestmark = pytest.mark.gpu
VOCAB = 1024
NUM_TOKENS = 20
ROWS = 64
LENGTHS = {"long": 3900, "short": 37, "one token": 1}
OURS = {name: [random.Random(name).randrange(3, VOCAB) for _ in range(n)] for name, n in LENGTHS.items()}


def others(count: int) -> list[list[int]]:
    """Prompts of 1 to 60 tokens."""
    draw = random.Random(count)
    return [[draw.randrange(3, VOCAB) for _ in range(draw.randint(1, 60))] for _ in range(count)]


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Replica:
    path: Path = make_model(tmp_path_factory.mktemp("neighbours"))
    limits = limits_for(1, 64, max_batch_size=ROWS, max_prefill_tokens=6144, max_seq_len=4096, num_pages=512)
    how = {"dtype": torch.bfloat16, "device": "cuda:0", "keep_quantized": True}
    made = Replica(path, 1, limits=limits, buckets=step_buckets(limits), **how)
    yield made
    made.close()


@pytest.fixture(scope="module")
def alone(replica: Replica) -> dict[str, Generated]:
    return {name: Driver(replica).generate([prompt], NUM_TOKENS)[0] for name, prompt in OURS.items()}


def assert_same(found: Generated, expected: Generated) -> None:
    assert found.tokens == expected.tokens
    different = (found.logits != expected.logits).any(-1).nonzero()[:, 0].tolist()
    assert different == [], f"{len(different)} of {len(found.logits)} positions, first at {different[:5]}"


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("count", [1, 3, 7, 15, 31, 47, 63])
def test_beside_any_number_of_others_in_any_slot(replica, alone, name, count):
    """All at once, so that the prompt is computed in one step with theirs and the output in one batch with theirs."""
    for place in {0, count // 2, count}:
        prompts: list[Sequence[int]] = [*others(count)]
        prompts.insert(place, OURS[name])
        found = Driver(replica, seed=place).generate(prompts, NUM_TOKENS, starts=count + 1)
        assert_same(found[place], alone[name])


@pytest.mark.parametrize("name", OURS)
def test_while_others_come_and_go(replica, alone, name):
    """One new prompt a step: every size of batch, decode rows beside others' prompts, chunks of 16."""
    prompts: list[Sequence[int]] = [*others(40)]
    prompts.insert(20, OURS[name])
    assert_same(Driver(replica).generate(prompts, NUM_TOKENS, chunk=16)[20], alone[name])


@pytest.mark.parametrize("chunk", [1, 15, 128, 1000, 2048])
def test_whatever_the_chunks_of_its_prompt(replica, alone, chunk):
    for name in OURS if chunk >= 128 else ("short",):
        assert_same(Driver(replica).generate([OURS[name]], NUM_TOKENS, chunk=chunk)[0], alone[name])
