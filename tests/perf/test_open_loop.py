"""Loads and what is read off their answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nmoe_backend.config import ServeConfig
from nmoe_backend.types import RequestError
from perf import bench_latency, bench_startup, open_loop, step_clock
from perf.bench_streaming import Arrivals


def test_poisson_arrivals_have_the_rate_and_the_spread() -> None:
    times = open_loop.poisson(20.0, 500.0, seed=3)
    assert times == open_loop.poisson(20.0, 500.0, seed=3) != open_loop.poisson(20.0, 500.0, seed=4)
    assert times == sorted(times) and times[0] > 0 and times[-1] < 500.0
    assert len(times) == pytest.approx(10_000, rel=0.03)
    gaps = [after - before for before, after in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance**0.5 == pytest.approx(mean, rel=0.05)  # exponential


def test_a_quiet_stretch_still_has_one_request() -> None:
    assert open_loop.poisson(0.001, 1.0) == [0.0]


def test_steady_rate_counts_only_while_all_streams_run() -> None:
    # stream A runs from 0 to 4 s with a token a second, B from 2 to 6 s with two
    a = Arrivals([0.0, 1.0, 2.0, 3.0, 4.0], [1] * 5, 0.0)
    b = Arrivals([2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0], [1] * 6 + [3], 0.0)
    found = open_loop.steady([a, b])
    assert found["window_s"] == 2.0
    assert found["tok_s"] == 3.0  # (2, 4]: A's at 3 and 4, B's at 2.5, 3, 3.5, 4
    assert found["itl_ms"]["p50"] == 500.0 and found["itl_ms"]["max"] == 1000.0
    assert found["mean_chunk"] == 1.0


def test_streams_that_never_run_together_are_an_error() -> None:
    with pytest.raises(ValueError, match="never ran all at once"):
        open_loop.steady([Arrivals([0.0, 1.0], [1, 1], 0.0), Arrivals([2.0, 3.0], [1, 1], 0.0)])


def test_latencies_are_from_the_request_to_the_first_token_and_between_chunks() -> None:
    found = open_loop.latencies([Arrivals([1.5, 2.0, 2.5], [1, 1, 2], 1.0), Arrivals([2.0, 3.0], [1, 1], 1.0)])
    assert found["ttft_ms"]["p50"] == 750.0 and found["ttft_ms"]["max"] == 1000.0
    assert found["itl_ms"]["p50"] == 500.0 and found["itl_ms"]["max"] == 1000.0
    assert found["tok_s"] == 3.0 and found["mean_chunk"] == 1.2


class FakeOrchestrator:
    """Answers at once, from another thread."""

    def __init__(self, error: RequestError | None = None) -> None:
        self.error = error
        self.requests: list[Any] = []

    def submit(self, request: Any, sink: Any) -> None:
        self.requests.append(request)
        threading.Thread(target=self._answer, args=(request, sink)).start()

    def _answer(self, request: Any, sink: Any) -> None:
        if self.error is not None:
            return sink.close("error", self.error)
        for left in reversed(range(request.sampling.max_tokens)):
            sink.put(7, None, None if left else "length")


def test_the_engine_is_asked_for_what_was_planned() -> None:
    engine = FakeOrchestrator()
    load = open_loop.planned([0.0, 0.01], 5, 3, 100)
    arrivals = open_loop.run_engine(engine, load)
    assert [sum(one.counts) for one in arrivals] == [3, 3]
    assert [request.prompt_ids for request in engine.requests] == [one.prompt_ids for one in load]
    assert all(8 <= token < 100 for one in load for token in one.prompt_ids)
    assert all(one.sent_s <= one.times[0] for one in arrivals)


def test_a_refused_request_ends_the_run() -> None:
    with pytest.raises(RequestError, match="too long"):
        open_loop.run_engine(FakeOrchestrator(RequestError("too long")), open_loop.all_at_once(1, 2, 2, 100))


def test_the_gpu_waits_where_a_step_was_launched_after_the_end_of_the_one_before() -> None:
    ends, launches = [1.0, 2.0, 3.5, 5.0], [0.0, 0.5, 2.5, 3.4]
    assert step_clock.idle_share(ends, launches) == 0.5 / 4  # only the third was late, by 0.5 s
    assert step_clock.idle_share(ends, [0.0, 0.1, 0.2, 0.3]) == 0.0
    with pytest.raises(ValueError, match="two steps at least"):
        step_clock.idle_share([1.0], [0.0])


def test_stages_are_read_from_the_progress_lines() -> None:
    lines = [
        "replica 0: weights on 8 ranks ...",
        "replica 0: weights on 8 ranks: 12.5 s, 4 GB/s",
        "other",
        "x: 1.0 s\n",
    ]
    assert bench_startup.stages(lines) == {"weights on 8 ranks": 12.5, "x": 1.0}


def decode(path: str, rate: float, p50: float) -> dict[str, Any]:
    return {"part": "decode", "path": path, "tok_s": rate, "itl_ms": {"p50": p50}}


def test_goal_lines_compare_the_two_paths() -> None:
    args = bench_latency.arguments().parse_args(["--commit", "abc"])
    entries = [
        decode("engine", 4000.0, 40.0),
        {"part": "idle", "path": "engine", "idle_percent": 1.2, "steps": 100},
        {"part": "startup", "path": "server", "first_token_s": 31.5},
        decode("server", 3900.0, 41.5),
    ]
    lines = bench_latency.goal_lines(entries, args)
    assert {name: line["value"] for name, line in lines.items()} == {"P4": 97.5, "P6": 31.5, "P7_engine": 1.2}
    assert "+1.50 ms" in lines["P4"]["method"]
    assert set(bench_latency.goal_lines(entries[:2], args)) == {"P7_engine"}


def test_the_engines_session_and_the_servers_make_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions: list[tuple[Path, str]] = []

    def session(path: str, entries: list[dict[str, Any]]) -> Callable[..., list[dict[str, Any]]]:
        return lambda config_path, args: sessions.append((config_path, path)) or entries

    start = {"part": "startup", "path": "server", "first_token_s": 31.5}
    monkeypatch.setattr(bench_latency, "in_process", lambda work, *args: work(*args))
    monkeypatch.setattr(bench_latency, "engine_session", session("engine", [decode("engine", 4000.0, 40.0)]))
    monkeypatch.setattr(bench_latency, "server_session", session("server", [start, decode("server", 3960.0, 40.5)]))
    monkeypatch.setattr(bench_latency.results, "require_gpu", lambda count=1: None)
    assert bench_latency.main(["--commit", "abc", "--output", str(tmp_path / "latency.json")]) == 0
    made = json.loads((tmp_path / "latency.json").read_text())
    assert [path for _, path in sessions] == ["engine", "server"] and sessions[0][0] == sessions[1][0]
    assert made["goals"]["P4"]["value"] == 99.0 and made["goals"]["P6"]["value"] == 31.5
    assert len(made["results"]) == 3


def test_starts_are_measured_with_the_model_folder_that_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[ServeConfig] = []
    found = {"total_s": 90.5, "ranks": 8, "layers": 61, "stages_s": {"steps": 30.5}}
    monkeypatch.setattr(bench_startup, "in_process", lambda work, *args: work(*args))
    load = lambda path, *_: seen.append(ServeConfig.from_toml(path)) or found  # noqa: E731
    monkeypatch.setattr(bench_startup, "start_engine", load)
    monkeypatch.setattr(bench_startup, "capture", load)
    monkeypatch.setattr(bench_startup.results, "require_gpu", lambda count=1: None)
    assert bench_startup.main(["--commit", "abc", "--output", str(tmp_path / "startup.json")]) == 0
    goals = json.loads((tmp_path / "startup.json").read_text())["goals"]
    assert {name: line["value"] for name, line in goals.items()} == {"start_cold": 90.5, "capture_eight_ranks": 30.5}
    cold, warm, one, eight = seen
    assert cold.model_path == warm.model_path and cold.load_format == "dummy" and cold.vocab_size == 129280
    assert (cold.max_batch_size, cold.num_pages) == (256, 8448)
    assert one.replicas[0].expert_ranks == eight.replicas[0].world_size == 8 and eight.replicas[0].is_virtual
