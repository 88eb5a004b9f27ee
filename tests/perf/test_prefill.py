"""The prefill benchmark's plans are what the scheduler would write, and its lines say what was measured."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from perf.bench_prefill import Prompts, goal_lines

CONFIG = SimpleNamespace(kv_layout=SimpleNamespace(page_size=64), max_batch_size=8, num_pages=320)


@pytest.mark.parametrize(("tokens", "length"), [(4096, 2000), (8000, 2000), (300, 700), (64, 64)])
def test_prompts_follow_each_other_through_steps_that_are_full(tokens: int, length: int) -> None:
    prompts = Prompts(None, CONFIG, length)  # type: ignore[arg-type]
    fed: dict[int, int] = {}  # slot -> positions fed
    tables: dict[int, dict[int, int]] = {}
    for _ in range(12):
        (plan,) = prompts.plan(tokens).ranks
        assert len(plan.token_ids) == sum(plan.lengths) == tokens and plan.num_decode == 0
        for init in plan.admitted:
            assert fed.pop(init.slot, length) == length, "a slot is free when its prompt is done"
            assert len(init.prompt_ids) == length
        for slot, index, page in plan.new_pages:
            tables.setdefault(slot, {})[index] = page
        for slot, start, chunk, samples in zip(plan.slots, plan.starts, plan.lengths, plan.samples, strict=True):
            assert start == fed.get(slot, 0)
            fed[slot] = start + chunk
            assert samples == (fed[slot] == length)
            assert set(range(-(-fed[slot] // 64))) <= set(tables[slot])
    owners = [page for table in tables.values() for page in table.values()]
    assert len(owners) == len(set(owners)), "no two slots share a page"


def entry(part: str, tokens: int, corrected: float, idle: float) -> dict[str, object]:
    rates = {"raw_tok_s_gpu": corrected + 500, "corrected_tok_s_gpu": corrected}
    return {"part": part, "tokens": tokens, "idle_share": idle} | rates


def test_the_lines_are_the_best_rate_and_the_longest_wait() -> None:
    args = SimpleNamespace(commit="abc", steps=8, prompt=2000, nvlink=None)
    entries = [
        entry("goals", 4096, 9600.4, 0.001),
        entry("goals", 8000, 9900.6, 0.002),
        entry("decode", 64, 1700.0, 0.0234),
    ]
    lines = goal_lines(entries, args)  # type: ignore[arg-type]
    assert (lines["P3"]["value"], lines["P3"]["raw"]) == (9901, 10401)
    assert "8 steps of 8000 tokens" in lines["P3"]["method"]
    assert lines["P7"]["value"] == 2.34
    assert goal_lines(entries[:2], args).keys() == {"P3"}, "P7 needs both"  # type: ignore[arg-type]
    long = {"part": "long", "chunk_s": {0: 0.95, 15: 9.486}}
    line = goal_lines([long], args)["prefill_131072"]  # type: ignore[arg-type, list-item]
    assert line["value"] == 9.49 and line["method"].endswith("in chunks of 8,192, the last of chunks 0, 15")
    assert goal_lines([{"part": "long", "chunk_s": {0: 0.95}}], args) == {}  # type: ignore[arg-type, list-item]
