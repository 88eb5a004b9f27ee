"""The decode benchmark's plans, parts and lines, on a worker that computes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nmoe_backend.config import ServeConfig
from nmoe_backend.types import RankOutput, StepPlan
from perf import bench_lmsys_decode as bench, results
from perf.device_trace import added_us

LOCAL, WORLD, TOP_K = 4, 2, 2


class FakeWorker:
    """Notes the plans; every token visits one rank."""

    def __init__(self, config: ServeConfig) -> None:
        rows, pages = config.max_batch_size, -(-config.max_seq_len // 64)
        self.plans: list[StepPlan] = []
        self.biases: list[list[float]] = []
        self._context = SimpleNamespace(activate=torch.inference_mode, device=torch.device("cpu"))
        self._state = SimpleNamespace(
            block_tables=torch.zeros(rows + 1, pages, dtype=torch.int32),
            last_tokens=torch.zeros(rows + 1, dtype=torch.int64),
        )
        ids = torch.full((WORLD, rows, TOP_K), -1)
        ids[0] = 1
        layout = SimpleNamespace(
            world_size=WORLD,
            hidden_size=256,
            scales_per_row=2,
            top_k=TOP_K,
            return_dtype=torch.bfloat16,
            num_local=LOCAL,
        )
        rdep = SimpleNamespace(layout=layout, received={"ids": ids})
        moe = SimpleNamespace(
            _exchange=SimpleNamespace(rdep=rdep), _router=SimpleNamespace(_bias=torch.zeros(LOCAL * WORLD))
        )
        self._model = SimpleNamespace(_layers=[SimpleNamespace(_ffn=moe), SimpleNamespace(_ffn=object())])

    def execute(self, plan: StepPlan) -> Any:
        self.plans.append(plan)
        self.biases.append(self._model._layers[0]._ffn._router._bias.tolist())
        tokens = list(range(len(plan.ranks[0].slots)))
        return SimpleNamespace(wait=lambda _: RankOutput(token_ids=tokens))


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[FakeWorker]:
    """Those that were built; nothing asks for a GPU."""
    made: list[FakeWorker] = []

    @contextmanager
    def built(config: ServeConfig, buckets: Sequence[int]) -> Iterator[FakeWorker]:
        made.append(FakeWorker(config))
        yield made[-1]

    monkeypatch.setattr(bench, "built", built)
    monkeypatch.setattr(bench, "trace", lambda work: (work(), {"nvjet_x": (1, 8.0)})[1])
    monkeypatch.setattr(bench, "clocked_workers", lambda: nullcontext(SimpleNamespace(idle_share=lambda: 0.01)))
    monkeypatch.setattr(results, "require_gpu", lambda count=1: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1_500_000_000, 150_000_000_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 147_254_000_000)
    return made


def run(*argv: str) -> None:
    assert bench.main(["--commit", "abc", "--steps", "6", "--nvlink", "385", *argv]) == 0


def test_the_quick_default_measures_both_goals(workers: list[FakeWorker], tmp_path: Path) -> None:
    run("--output", str(tmp_path / "x" / "decode.json"))
    made = json.loads((tmp_path / "x" / "decode.json").read_text())
    assert set(made["goals"]) == {"P1", "P2"}
    for line in made["goals"].values():
        assert set(line) == {"value", "raw", "unit", "goal", "commit", "method"}
        assert line["commit"] == "abc" and 0 < line["value"] <= line["raw"]
    assert [(one["part"], one["rows"], one["context"]) for one in made["results"]] == [
        ("goals", 256, 2000),
        ("goals", 32, 2000),
    ]
    assert made["results"][0]["memory_gb"].keys() == {"device", "torch", "budget"}
    assert (made["results"][0]["memory_gb"]["device"], made["results"][0]["memory_gb"]["torch"]) == (148.5, 147.25)
    assert made["results"][0]["operations_us"] == {"head": {"launches": 0.25, "us": 2.0}}


def test_deterministic_sums_have_lines_of_their_own(workers: list[FakeWorker], tmp_path: Path) -> None:
    run("--parts", "deterministic", "--output", str(tmp_path / "decode.json"))
    made = json.loads((tmp_path / "decode.json").read_text())
    assert set(made["goals"]) == {"P1_deterministic", "P2_deterministic"}


def test_positions_go_on_and_pages_are_announced_when_they_are_entered(workers: list[FakeWorker]) -> None:
    run("--rows", "3", "--context", "130")
    plans = [plan.ranks[0] for plan in workers[0].plans]
    starts = [plan.starts[0] for plan in plans]
    assert starts == list(range(130 - 3 - bench.WARM_STEPS, 130 - 3 + 6 + bench.TRACED_STEPS))
    assert plans[0].admitted and not any(plan.admitted for plan in plans[1:])
    announced = {plan.starts[0]: [index for _, index, _ in plan.new_pages] for plan in plans if plan.new_pages}
    assert announced == {128: [2, 2, 2]}


def test_skewed_routing_raises_one_expert_a_rank_and_takes_it_back(workers: list[FakeWorker]) -> None:
    run("--parts", "goals", "skew", "--rows", "2")
    even, hot = [0.0] * (LOCAL * WORLD), [1.0, 0.0, 0.0, 0.0] * WORLD
    assert [bias for bias in (even, hot) if bias in workers[0].biases] == [even, hot]
    assert workers[0]._model._layers[0]._ffn._router._bias.tolist() == even


def test_contexts_take_as_many_rows_as_the_pages_hold(workers: list[FakeWorker], tmp_path: Path) -> None:
    run("--parts", "context", "--output", str(tmp_path / "c.json"))
    made = json.loads((tmp_path / "c.json").read_text())
    shapes = [(one["context"], one["rows"]) for one in made["results"]]
    assert shapes == [
        (1024, 64), (2048, 64), (4096, 64), (8192, 64), (16384, 32), (32768, 16), (65536, 8), (131072, 4)
    ]  # fmt: skip
    assert made["goals"] == {}, "only the goals' own part counts for them"


def test_an_error_word_ends_the_run(workers: list[FakeWorker], monkeypatch: pytest.MonkeyPatch) -> None:
    bad = SimpleNamespace(wait=lambda _: RankOutput(token_ids=(), error_word=3))
    monkeypatch.setattr(FakeWorker, "execute", lambda self, plan: bad)
    with pytest.raises(SystemExit, match="error word 0x3"):
        run()


def test_a_kernel_counts_from_the_end_of_the_one_before_it() -> None:
    """The first b waits inside a; the pause before c is the host's."""
    spans = [("a", 0.0, 10.0), ("b", 1.0, 12.0), ("c", 50.0, 60.0), ("b", 61.0, 62.5)]
    assert added_us(spans) == {"a": (1, 10.0), "b": (2, 2.0 + 2.5), "c": (1, 10.0)}


def test_every_operation_of_the_breakdown_can_be_reached() -> None:
    parts = [part for part, _ in bench.OPERATIONS]
    hidden = [part for index, part in enumerate(parts) if any(earlier in part for earlier in parts[:index])]
    assert not hidden
