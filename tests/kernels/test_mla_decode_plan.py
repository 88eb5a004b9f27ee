"""The work lists of decode attention: every key of every row once, where and by whom it should be."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

pytestmark = pytest.mark.gpu

HEADS = 128
BLOCK = 64
DRAW = random.Random(0)
BATCHES = {
    "one": [2000],
    "one key": [1],
    "nothing": [0],
    "equal": [2000] * 32,
    "more than programs": [2000] * 256,
    "ragged": [DRAW.randint(0, 6000) for _ in range(61)],
    "long beside short": [131_072, *(DRAW.randint(1, 90) for _ in range(50))],
    "borders": [0, 1, 63, 64, 65, 1023, 1024, 1025, 2048, 4096, 4097, 8192],
}


def made(lens: Sequence[int], split: int | None) -> tuple[list[list[tuple[int, ...]]], dict[int, tuple[int, int]], int]:
    """Items (row, first key, keys, slot) of each group; row -> (first slot, pieces); slots that there are."""
    from nmoe_backend.kernels.mla_sm90 import decode_plan as plans

    plan = plans.make_mla_decode_plan(len(lens), max(*lens, 1), sum(lens), HEADS, torch.device("cuda"), split)
    for buffer in (plan.items, plan.group_items, plan.merges, plan.num_merges):
        buffer.fill_(-7)
    plans.plan_mla_decode(plan, torch.tensor(lens, device="cuda"))
    bounds = plan.group_items.tolist()
    items = [tuple(item) for item in plan.items.tolist()]
    assert bounds[0] == 0 and bounds == sorted(bounds)
    groups = [items[low:high] for low, high in pairwise(bounds)]
    merges = plan.merges[: int(plan.num_merges)].tolist()
    return groups, {row: (slot, pieces) for row, slot, pieces in merges}, plan.lse.shape[0]


@pytest.mark.parametrize("split", [64, 1024, 4096, None])
@pytest.mark.parametrize("name", BATCHES)
def test_pieces_make_up_the_contexts_and_have_slots_of_their_own(name: str, split: int | None) -> None:
    lens = BATCHES[name]
    groups, merges, num_slots = made(lens, split)
    pieces: dict[int, list[tuple[int, int, int]]] = {row: [] for row in range(len(lens))}
    for row, first, keys, slot in (item for group in groups for item in group):
        pieces[row].append((first, keys, slot))
    taken: list[int] = []
    for row, length in enumerate(lens):
        parts = sorted(pieces[row])
        ends = [first + keys for first, keys, _ in parts]
        assert [first for first, _, _ in parts] == [0, *ends[:-1]] and ends[-1] == length
        assert all(keys > 0 for _, keys, _ in parts) or length == 0
        assert all(first % BLOCK == 0 for first, _, _ in parts)
        slots = [slot for _, _, slot in parts]
        if len(parts) == 1:
            assert slots == [-1] and row not in merges
        else:
            first_slot, count = merges[row]
            assert slots == list(range(first_slot, first_slot + count))
            taken += slots
    assert sorted(taken) == list(range(len(taken))) and len(taken) <= num_slots


@pytest.mark.parametrize("name", BATCHES)
def test_an_even_plan_gives_every_group_as_many_blocks(name: str) -> None:
    lens = BATCHES[name]
    groups, _, _ = made(lens, None)
    blocks = [sum(max(1, -(-keys // BLOCK)) for _, _, keys, _ in group) for group in groups]
    share = max(2, -(-sum(blocks) // len(groups)))
    full = sum(blocks) // share
    assert blocks[:full] == [share] * full and sum(blocks[full + 1 :]) == 0


@pytest.mark.parametrize("split", [512, 4096])
def test_splits_go_to_the_groups_longest_first_there_and_back(split: int) -> None:
    lens = BATCHES["ragged"] * 3
    groups, _, _ = made(lens, split)
    rounds = [[group[i][2] for group in groups if i < len(group)] for i in range(max(map(len, groups)))]
    there_and_back = [keys for i, each in enumerate(rounds) for keys in (each if i % 2 == 0 else each[::-1])]
    assert there_and_back == sorted(there_and_back, reverse=True)
    assert all(len(each) == len(groups) for each in rounds[:-1])


@pytest.mark.parametrize("split", [512, 4096])
def test_splits_are_cut_at_their_multiples(split: int) -> None:
    groups, _, _ = made(BATCHES["ragged"], split)
    assert all(first % split == 0 and keys <= split for group in groups for _, first, keys, _ in group)
