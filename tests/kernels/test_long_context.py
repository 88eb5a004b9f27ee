"""One sequence of 131,072 tokens through the production steps: 16 chunks as graph replays, then decode.

Plain torch over all of it would take minutes, so it is held in lockstep where it matters: every operation of the last
chunk and of the decode steps behind it against plain torch on the very inputs that it had, with 131,000 latents of each
layer among them. What came before is the same code on shorter prefixes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nmoe_backend.layers import context as layer_context
from nmoe_backend.step_buckets import Bucket, max_keys
from nmoe_backend.types import RankPlan, SamplingParams, SlotInit
from scripts.make_tiny_checkpoint import PRESETS, make_checkpoint
from tests.gates.replica import Replica, limits_for
from tests.lockstep import Lockstep, beyond_bounds

pytestmark = pytest.mark.gpu
LENGTH, CHUNK, LAST, NUM_DECODE = 131072, 8192, 96, 3
PAGE = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of 64 heads, rope for 131,072 positions."""
    preset = replace(
        PRESETS["slim"], num_hidden_layers=2, num_attention_heads=64, n_routed_experts=16, num_experts_per_tok=4,
        rope_factor=4.0, original_max_position=32768,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "long", preset)
        return make_checkpoint(tmp_path_factory.mktemp("long"), preset="long", dtype="fp8")


def chunks() -> list[tuple[int, int]]:
    """(start, length): the last one is short, so that plain torch has room for its scores."""
    last = LENGTH - NUM_DECODE - LAST
    return [(start, min(CHUNK, last - start)) for start in range(0, last, CHUNK)] + [(last, LAST)]


def generate(model: Path, *, in_lockstep: bool) -> tuple[list[torch.Tensor], list[Lockstep]]:
    """The logits of the token behind the prompt and of the decode steps."""
    made: list[Lockstep] = []
    original = layer_context.build_table

    def lockstep_table(rank, request, switches):
        made.append(Lockstep(*original(rank, request, switches)))
        made[0].is_on = False
        return made[0], made[0]

    limits = limits_for(
        1, PAGE, max_batch_size=2, max_prefill_tokens=CHUNK, max_seq_len=LENGTH, num_pages=LENGTH // PAGE
    )
    keys = max_keys(limits)
    buckets = [Bucket(tokens=0, keys=0, rows=1), *(Bucket(tokens, keys, 2) for tokens in (128, CHUNK))]
    with pytest.MonkeyPatch.context() as patch:
        if in_lockstep:
            patch.setattr(layer_context, "build_table", lockstep_table)
        replica = Replica(
            model, 1, limits=limits, dtype=torch.bfloat16, device="cuda:0", keep_quantized=True, buckets=buckets
        )
    prompt = torch.randint(30, 1000, (LENGTH - NUM_DECODE,), generator=torch.Generator().manual_seed(3)).tolist()
    init = SlotInit(slot=1, sampling=SamplingParams(temperature=0.0), prompt_ids=tuple(prompt))
    pages = torch.randperm(LENGTH // PAGE, generator=torch.Generator().manual_seed(4)).tolist()
    known = 0  # pages announced
    for start, length in [*chunks(), *((LENGTH - NUM_DECODE + n, 1) for n in range(NUM_DECODE))]:
        is_decode, end = start >= len(prompt), start + length
        if made:
            made[0].is_on = end > len(prompt) - LAST
        entered = range(known, -(-end // PAGE))
        known = max(known, -(-end // PAGE))
        plan = RankPlan(
            slots=[1], starts=[start], lengths=[length], num_decode=int(is_decode),
            token_ids=() if is_decode else prompt[start:end], samples=[end >= len(prompt)],
            new_pages=[(1, index, pages[index]) for index in entered], admitted=[init] if start == 0 else (),
        )  # fmt: skip
        replica.step(plan)
    seen = replica.samplers[0].seen
    logits = [seen[1, position].clone() for position in range(len(prompt), LENGTH + 1)]
    replica.close()
    return logits, made


@pytest.fixture(scope="module")
def in_lockstep(model: Path) -> tuple[list[torch.Tensor], list[Lockstep]]:
    return generate(model, in_lockstep=True)


def test_every_operation_at_the_end_of_131072_tokens_equals_plain_torch(in_lockstep):
    (lockstep,) = in_lockstep[1]
    worst = lockstep.worst()
    assert {name.split()[1] for name in worst} >= {"norm", "linear", "mla", "cache", "exchange", "head"}
    assert len(lockstep.errors["fp8 mla"]) == 2 * (1 + NUM_DECODE)
    assert beyond_bounds(worst) == {}


def test_graph_replays_of_131072_tokens_give_the_same_bits(model, in_lockstep):
    for replayed, eager in zip(generate(model, in_lockstep=False)[0], in_lockstep[0], strict=True):
        assert torch.equal(replayed, eager)
        assert replayed.isfinite().all()
