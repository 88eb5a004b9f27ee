"""The sampler's kernels against the sorted, float64 definition: the same tokens from the same seeds.

TRITON_INTERPRET=1 runs them in Triton-lang's interpreter, on the CPU, where the GPU marker lets them.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import Tensor

from nmoe_backend.kernels.sampling import (
    apply_penalties,
    bits_of,
    counter_uniform,
    draw_tokens,
    keep_mask,
    restrict,
    token_weights,
)

pytestmark = pytest.mark.gpu
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
NUM_ROWS = 48


def _logits(vocab: int, seed: int) -> Tensor:
    """Ordinary rows, and: rounded ones full of ties, equal ones, mostly and wholly banned ones, infinite ones."""
    logits = torch.randn(NUM_ROWS, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    logits[5], logits[6], logits[7] = logits[5].round(), (logits[6] * 2).round() / 2, 0.0
    logits[8, 3:], logits[9] = -torch.inf, -torch.inf
    logits[10, 4], logits[11, 7], logits[11, 9] = torch.inf, torch.inf, torch.inf
    return logits


def _cycle(values: tuple[float, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([values[n % len(values)] for n in range(NUM_ROWS)], dtype=dtype)


def _words(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, generator=generator)


def _want(logits: Tensor, how: dict[str, Tensor]) -> Tensor:
    temperature = how["temperature"]
    weights = token_weights(logits, torch.where(temperature > 0, temperature, 1.0))
    kept = keep_mask(weights, how["top_k"], how["top_p"], how["min_p"])
    drawn = draw_tokens(weights * kept, counter_uniform(how["seed"], how["positions"]))
    return torch.where(temperature == 0, logits.argmax(dim=1), drawn)


def _table(num_rows: int, **columns: Tensor) -> Tensor:
    """A table of slots from columns by their names in table.py."""
    from nmoe_backend.kernels.sampling_gpu import table

    rows = np.zeros((num_rows, table.NUM_COLUMNS.value), dtype=np.int64)
    for name, values in columns.items():
        column = values.numpy()
        rows[:, getattr(table, name.upper()).value] = column.view(np.int64) if column.dtype == np.float64 else column
    return torch.from_numpy(rows).to(DEVICE)


def _step(num_rows: int, slots: Tensor | None = None, positions: Tensor | None = None, masks: Tensor | None = None):
    from nmoe_backend.kernels.sampling_gpu.table import StepRows

    none = torch.zeros(num_rows, dtype=torch.int64)
    columns = (torch.arange(num_rows) if slots is None else slots, none if positions is None else positions)
    slots, positions, mask_rows = (t.to(DEVICE) for t in (*columns, none - 1 if masks is None else masks))
    return StepRows(slots=slots, positions=positions, mask_rows=mask_rows)


def _sample(logits: Tensor, how: dict[str, Tensor]) -> Tensor:
    """Slots are the rows backwards, and a row of padding stands behind the last."""
    from nmoe_backend.kernels.sampling_gpu import table
    from nmoe_backend.kernels.sampling_gpu.draw import draw
    from nmoe_backend.kernels.sampling_gpu.stats import RowStats, row_stats
    from nmoe_backend.kernels.sampling_gpu.truncation import Candidates, draw_truncated

    num_rows, vocab = logits.shape
    top_k = torch.where(how["top_k"] < vocab, how["top_k"], 0)
    truncated = (top_k > 0) | (how["top_p"] < 1) | (how["min_p"] > 0)
    kind = torch.where(truncated, table.TRUNCATED.value, table.PLAIN.value)
    kind = torch.where(how["temperature"] == 0, table.GREEDY.value, kind)
    columns = {**{name: value for name, value in how.items() if name != "positions"}, "top_k": top_k, "kind": kind}
    rows = _table(num_rows, **{name: value.flip(0) for name, value in columns.items()})
    slots = torch.cat((torch.arange(num_rows).flip(0), torch.tensor([-1])))
    step = _step(num_rows + 1, slots, torch.cat((how["positions"], torch.tensor([0]))))
    logits = torch.cat((logits, logits[:1])).to(DEVICE)
    stats = RowStats.create(num_rows + 1, vocab, DEVICE)
    out = torch.full((num_rows + 1,), -1, dtype=torch.int64, device=DEVICE)
    row_stats(logits, stats, step.slots, rows)
    draw(logits, step, rows, stats, out)
    draw_truncated(logits, step, rows, stats, Candidates.create(num_rows + 1, stats, vocab), out)
    assert out[-1] == -1, "a row of padding was sampled"
    return out[:-1].cpu()


@pytest.mark.parametrize("vocab", [200, 9000, 129280])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        ((0,), (1.0,), (0.0,)),
        ((0, 50, 0, 5, 150, 1), (1.0, 0.9, 0.5), (0.0, 0.05, 0.0, 0.0)),
        ((2000, 5000), (1.0, 0.3, 0.95), (0.0,)),
        ((0,), (0.999, 0.0, 1e-6), (0.0, 0.0, 1.0)),
    ],
)
def test_the_same_tokens_as_the_definition(top_k, top_p, min_p, vocab):
    """fp32 weights move a boundary between tokens by about 1e-6 of the whole: one row in 2,000 may fall there."""
    differ = []
    for seed in range(2):
        logits, generator = _logits(vocab, seed), torch.Generator().manual_seed(seed)
        how = {
            "temperature": _cycle((0.0, 0.6, 1.0, 1.3, 1e-4, 20.0, 0.8)),
            "top_k": _cycle(top_k, torch.int64),
            "top_p": _cycle(top_p),
            "min_p": _cycle(min_p),
            "seed": torch.randint(-(2**63), 2**63 - 1, (NUM_ROWS,), generator=generator),
            "positions": torch.randint(0, 100000, (NUM_ROWS,), generator=generator),
        }
        got, want = _sample(logits, how), _want(logits, how)
        differ += [(int(g), int(w)) for g, w in zip(got, want, strict=True) if g != w]
    assert len(differ) <= 1, differ


def test_a_row_does_not_depend_on_its_neighbours_and_repeats():
    logits = _logits(129280, 3)
    how = {
        "temperature": _cycle((1.0, 0.0, 0.7)), "top_k": _cycle((0, 0, 40, 3000), torch.int64),
        "top_p": _cycle((1.0, 0.9)), "min_p": _cycle((0.0,)), "seed": torch.arange(NUM_ROWS),
        "positions": torch.arange(NUM_ROWS) * 7,
    }  # fmt: skip
    together = _sample(logits, how)
    assert torch.equal(together, _sample(logits, how))
    for n in (0, 2, 13, 47):
        alone = _sample(logits[n : n + 1], {name: value[n : n + 1] for name, value in how.items()})
        assert alone.item() == together[n].item()


def test_draws_follow_the_distribution():
    """20,000 draws of one row: each token's count within 5 standard deviations."""
    num, weights = 20000, torch.tensor([0.5, 0.25, 0.125, 0.1, 0.02, 0.005])
    logits = weights.log().repeat(num, 1)
    how = {
        "temperature": torch.ones(num, dtype=torch.float64), "top_k": torch.zeros(num, dtype=torch.int64),
        "top_p": torch.ones(num, dtype=torch.float64), "min_p": torch.zeros(num, dtype=torch.float64),
        "seed": torch.full((num,), 42), "positions": torch.arange(num),
    }  # fmt: skip
    counts = torch.bincount(_sample(logits, how), minlength=6)
    expected = weights * num
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all()


def _edited(logits: Tensor, step, tables, masks: Tensor) -> Tensor:
    """[N, V] logits as they are sampled from; the raw ones stay."""
    from nmoe_backend.kernels.sampling_gpu.edits import EditRows, edit_logits

    edits = EditRows.create(*logits.shape, DEVICE)
    both = torch.cat((logits, torch.full_like(logits, torch.nan))).to(DEVICE)
    edit_logits(both, step, tables, masks.to(DEVICE), edits)
    assert torch.equal(both[: len(logits)].cpu(), logits)
    return both[edits.sources].cpu()


@pytest.mark.parametrize("vocab", [200, 129280])
def test_penalties_and_biases_equal_the_plain_operations_bit_for_bit(vocab):
    from nmoe_backend.kernels.sampling_gpu import table
    from nmoe_backend.kernels.sampling_gpu.table import SlotTables

    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(NUM_ROWS, vocab, generator=generator) * 3
    prompt_mask = torch.rand(NUM_ROWS, vocab, generator=generator) < 0.1
    counts = torch.randint(-20, 4, (NUM_ROWS, vocab), generator=generator).clamp(min=0).to(torch.int32)
    penalties = torch.rand(3, NUM_ROWS, generator=generator).double() + torch.tensor([[0.6], [0.0], [0.0]])
    has_penalties, has_bias = _cycle((1, 0, 1, 1, 0), torch.int64), _cycle((0, 0, 1), torch.int64)
    biases = [(n % 7, 150 + n) for n in range(NUM_ROWS)]
    entries = torch.tensor([[*ids, *np.float32((3.0, -n)).view(np.int32)] for n, ids in enumerate(biases)])
    entries = entries.to(torch.int32).to(DEVICE)
    tables = SlotTables.create(NUM_ROWS, vocab, 64, DEVICE)
    tables.prompt_mask.copy_(prompt_mask)
    tables.counts.copy_(counts)
    tables.rows.copy_(
        _table(
            NUM_ROWS, repetition=penalties[0], presence=penalties[1], frequency=penalties[2],
            edits=has_penalties * table.HAS_PENALTIES.value + has_bias * table.HAS_BIAS.value,
            bias=torch.tensor([row.data_ptr() for row in entries]), num_bias=_cycle((2,), torch.int64),
        )
    )  # fmt: skip
    slots = torch.arange(NUM_ROWS).flip(0)
    slots[3] = -1
    want = logits.clone()
    for n, slot in enumerate(slots.tolist()):
        if slot >= 0 and has_bias[slot]:
            want[n, biases[slot][0]] += 3.0
            want[n, biases[slot][1]] -= slot
        if slot >= 0 and has_penalties[slot]:
            want[n : n + 1] = apply_penalties(
                want[n : n + 1], prompt_mask[slot, None], counts[slot, None], *penalties[:, slot, None].float()
            )
    got = _edited(logits, _step(NUM_ROWS, slots), tables, torch.zeros_like(tables.unbanned))
    assert torch.equal(got, want)


@pytest.mark.parametrize("vocab", [200, 129280])
@pytest.mark.parametrize("with_bans", [True, False])
def test_a_grammars_mask_always_holds_and_bans_where_they_leave_something_of_it(vocab, with_bans):
    from nmoe_backend.kernels.sampling_gpu import table
    from nmoe_backend.kernels.sampling_gpu.table import SlotTables

    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(NUM_ROWS, vocab, generator=generator) * 3
    logits[:, ::7] = -torch.inf
    tables = SlotTables.create(NUM_ROWS, vocab, 64, "cpu")
    bans, stops, masks = (_words(*tables.unbanned.shape, generator=generator) for _ in range(3))
    bans[4], bans[6] = ~masks[2], 0  # row 4 has mask 2: nothing would be left; row 7 has none
    bans[7] = 0
    mask_rows = torch.tensor([n // 2 if n % 2 == 0 else -1 for n in range(NUM_ROWS)])
    has_bans = _cycle((1, 1, 0), torch.int64) * with_bans
    has_stops = _cycle((0, 0, 0, 0, 0, 1, 1, 0), torch.int64) * with_bans
    edits = has_bans * table.HAS_BANS.value + has_stops * table.HAS_STOPS.value
    min_end, position = _cycle((40, 10), torch.int64), torch.full((NUM_ROWS,), 20)
    tables = SlotTables(
        rows=_table(NUM_ROWS, edits=edits, min_end=min_end), unbanned=bans.to(DEVICE), unstopped=stops.to(DEVICE),
        **{name: getattr(tables, name).to(DEVICE) for name in ("prompt_mask", "counts", "history")},
    )  # fmt: skip
    want = logits.clone()
    for n in range(NUM_ROWS):
        stops_hold = bool(has_stops[n]) and int(min_end[n]) > 20
        if mask_rows[n] < 0 and not has_bans[n] and not stops_hold:
            continue
        allowed = (
            torch.ones(1, vocab, dtype=torch.bool) if mask_rows[n] < 0 else bits_of(masks[mask_rows[n]][None], vocab)
        )
        left = allowed & bits_of(bans[n, None], vocab) if has_bans[n] else allowed
        left = left & bits_of(stops[n, None], vocab) if stops_hold else left
        want[n] = restrict(logits[n, None], left if left.any() else allowed)
    assert torch.equal(_edited(logits, _step(NUM_ROWS, None, position, mask_rows), tables, masks), want)


@pytest.mark.parametrize("vocab", [200, 129280])
def test_logprobs_are_those_of_log_softmax_and_the_best_are_in_order(vocab):
    from nmoe_backend.kernels.sampling_gpu.logprobs import LogprobRows, logprobs
    from nmoe_backend.kernels.sampling_gpu.stats import RowStats, raw_stats

    logits = _logits(vocab, 4)[:8]  # with ties; without infinities
    num_top = torch.tensor([-1, 0, 3, 20, 5, 20, 20, 20])
    token_ids = torch.tensor([3, 199, 0, 7, 150, 6, 100, 64])
    want = logits.double().log_softmax(1)
    ranked = want.sort(dim=1, descending=True, stable=True)
    for of_slots, slots, rows in ((True, torch.arange(8).to(DEVICE), _table(8, num_top=num_top)), (False, None, None)):
        stats, out = RowStats.create(8, vocab, DEVICE), LogprobRows.create(8, 20, DEVICE)
        raw_stats(logits.to(DEVICE), stats, slots, rows)
        logprobs(logits.to(DEVICE), token_ids.to(DEVICE), stats, out, slots, rows)
        for n in range(1, 8):
            count = int(num_top[n]) if of_slots else 20
            assert abs(out.logprobs[n].cpu() - want[n, token_ids[n]]) < 1e-6
            assert out.top_ids[n, :count].tolist() == ranked.indices[n, :count].tolist()
            torch.testing.assert_close(out.top_logprobs[n, :count].cpu(), ranked.values[n, :count], rtol=0, atol=1e-6)


def test_statistics_of_another_vocabulary_are_an_error():
    from nmoe_backend.kernels.sampling_gpu.stats import RowStats, raw_stats

    with pytest.raises(ValueError, match="statistics of"):
        raw_stats(torch.zeros(2, 9000, device=DEVICE), RowStats.create(2, 100, DEVICE), None, None)
