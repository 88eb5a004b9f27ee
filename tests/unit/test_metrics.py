"""metrics.py: what reaches the registry."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from nmoe_backend.metrics import ITL_SAMPLES_PER_PUSH, SPECS, Metrics, MetricSpec, MetricsPusher
from nmoe_backend.types import EngineStats, ErrorKind


class FakeSeries:
    """One series; refuses what its kind cannot do."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.value = 0.0
        self.observed: list[float] = []

    def set(self, value: float) -> None:
        assert self.kind == "gauge"
        self.value = value

    def increment(self, value: float) -> None:
        assert self.kind == "counter" and value > 0
        self.value += value

    def observe(self, value: float) -> None:
        assert self.kind == "histogram"
        self.observed.append(value)


class FakeRegistry(dict[str, FakeSeries]):
    def __call__(self, spec: MetricSpec, labels: Mapping[str, str]) -> FakeSeries:
        name = "".join([spec.name, *labels.values()])
        assert name not in self
        self[name] = FakeSeries(spec.kind)
        return self[name]


def stats(**values: object) -> EngineStats:
    return EngineStats(
        **{  # type: ignore[arg-type]
            "num_running": 3,
            "num_waiting": 2,
            "num_slots": 8,
            "pages_used": 5,
            "pages_total": 20,
            "pages_used_per_rank": (5, 0),
            "running_per_rank": (2, 1),
            "steps_total": 10,
            "preemptions_total": 1,
            "prompt_tokens_total": 100,
            "generation_tokens_total": 40,
            "requests_finished_total": {"stop": 4},
            "errors_total": {},
            "last_step_s": 0.02,
            "predicted_step_s": 0.02,
            **values,
        }
    )


def test_names_follow_prometheus_and_are_unique() -> None:
    names = [spec.name for spec in SPECS]
    assert len(set(names)) == len(names)
    for spec in SPECS:
        assert spec.name.startswith("nmoe_") and spec.help
        assert spec.name.endswith("_total") == (spec.kind == "counter")
        assert bool(spec.buckets) == (spec.kind == "histogram")
        assert list(spec.buckets) == sorted(spec.buckets)


def test_gauges_show_the_last_snapshot_and_counters_its_growth() -> None:
    registry = FakeRegistry()
    metrics = Metrics(registry)
    metrics.push(stats(), True, 1.0)
    metrics.push(stats(generation_tokens_total=90, prompt_tokens_total=100, num_waiting=0), False, 1.5)
    assert registry["nmoe_engine_alive"].value == 0.0
    assert registry["nmoe_requests_running"].value == 3
    assert registry["nmoe_requests_waiting"].value == 0
    assert registry["nmoe_kv_cache_utilization_percent"].value == 25.0
    assert registry["nmoe_generation_tokens_total"].value == 90
    assert registry["nmoe_requests_finished_totalstop"].value == 4
    assert registry["nmoe_decode_tokens_per_second"].value == 100.0
    assert registry["nmoe_prefill_tokens_per_second"].value == 0.0


def test_observations_are_pushed_once() -> None:
    registry = FakeRegistry()
    metrics = Metrics(registry)
    metrics.first_tokens(0.5)
    metrics.more_tokens(0.3, 3)
    metrics.ended(2.0, None)
    metrics.ended(9.0, ErrorKind.DEADLINE)
    metrics.refused(ErrorKind.INVALID)
    for now_s in (1.0, 2.0):
        metrics.push(stats(), True, now_s)
    assert registry["nmoe_time_to_first_token_seconds"].observed == [0.5]
    assert registry["nmoe_inter_token_latency_seconds"].observed == pytest.approx([0.1] * 3)
    assert registry["nmoe_inter_token_intervals_total"].value == 3
    assert registry["nmoe_inter_token_seconds_total"].value == 0.3
    assert registry["nmoe_request_latency_seconds"].observed == [2.0]
    assert registry["nmoe_request_errors_totaldeadline"].value == 1
    assert registry["nmoe_request_errors_totalinvalid"].value == 1


def test_inter_token_latency_is_a_bounded_seeded_sample_with_exact_totals() -> None:
    samples = []
    for _ in range(2):
        registry = FakeRegistry()
        metrics = Metrics(registry, seed=5)
        for index in range(4000):
            metrics.more_tokens(0.25 if index % 4 else 0.75, 1)
        metrics.push(stats(), True, 1.0)
        samples.append(registry["nmoe_inter_token_latency_seconds"].observed)
        assert registry["nmoe_inter_token_intervals_total"].value == 4000
        assert registry["nmoe_inter_token_seconds_total"].value == 1500.0
    assert samples[0] == samples[1]
    assert len(samples[0]) == ITL_SAMPLES_PER_PUSH
    assert sum(samples[0]) / len(samples[0]) == pytest.approx(0.375, rel=0.15)


def test_the_pusher_pushes_a_last_time_when_it_stops() -> None:
    registry = FakeRegistry()
    metrics = Metrics(registry)
    pusher = MetricsPusher(metrics, lambda: stats(steps_total=11), lambda: True)
    pusher.start()
    metrics.first_tokens(0.1)
    pusher.stop()
    assert registry["nmoe_time_to_first_token_seconds"].observed == [0.1]
    assert registry["nmoe_steps_total"].value == 11


def test_the_warm_up_is_not_counted_and_heartbeats_stop_with_the_engine() -> None:
    registry = FakeRegistry()
    metrics = Metrics(registry)
    metrics.start_from(stats(steps_total=10, requests_finished_total={"length": 8}))
    metrics.push(stats(steps_total=12, requests_finished_total={"length": 9}), True, 1.0)
    metrics.push(stats(steps_total=12, requests_finished_total={"length": 9}), False, 2.0)
    assert registry["nmoe_steps_total"].value == 2
    assert registry["nmoe_requests_finished_totallength"].value == 1
    assert registry["nmoe_engine_heartbeats_total"].value == 1
    assert registry["nmoe_engine_alive"].value == 0
