"""Every metric, declared once, and the thread that pushes them.

A metric call into Triton costs about 15 us and goes through the one thread that responses use too. So nothing on the
way of a token calls Triton: sender threads append to a queue, and the pusher turns the engine's counters and gauges and
what lies in the queue into a few calls four times a second. Inter-token latency is observed as a seeded sample of at
most 500 a second; its exact count and sum are counters of their own.

The registry is injected: `register(spec, labels)` gives something with `set`, `increment` or `observe`.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from nmoe_backend.types import EngineStats, ErrorKind

T = TypeVar("T")
PUSH_INTERVAL_S = 0.25
ITL_SAMPLES_PER_PUSH = 125  # 500 a second
_LATENCY_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class Metric(Protocol):
    """One time series, as pb_utils gives it."""

    def set(self, value: float, /) -> None:
        """Gauge."""

    def increment(self, value: float, /) -> None:
        """Counter."""

    def observe(self, value: float, /) -> None:
        """Histogram."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricSpec:
    """One family. With `label`, a series for each of `label_values`."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    label: str = ""
    label_values: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


Register = Callable[[MetricSpec, Mapping[str, str]], Metric]


def _gauge(name: str, text: str) -> MetricSpec:
    return MetricSpec(name=name, kind="gauge", help=text)


def _counter(name: str, text: str, label: str = "", label_values: tuple[str, ...] = ()) -> MetricSpec:
    return MetricSpec(name=name, kind="counter", help=text, label=label, label_values=label_values)


def _histogram(name: str, text: str, buckets: tuple[float, ...]) -> MetricSpec:
    return MetricSpec(name=name, kind="histogram", help=text, buckets=buckets)


SPECS = (
    _gauge("nmoe_engine_alive", "1 while the engine's heartbeat is young, 0 after a failure: restart the server then"),
    _counter("nmoe_engine_heartbeats_total", "Four a second while the engine is alive: `nmoe serve` watches it"),
    _gauge("nmoe_requests_running", "Requests that hold a slot of a rank"),
    _gauge("nmoe_requests_waiting", "Requests that wait for their first step or for readmission"),
    _gauge("nmoe_batch_size_current", "Sequences in the step that runs, all ranks"),
    _gauge("nmoe_kv_cache_utilization_percent", "KV pages in use, percent of all ranks' pages"),
    _gauge("nmoe_step_seconds", "Duration of the last step"),
    _gauge("nmoe_decode_tokens_per_second", "Generated tokens a second over the last push interval"),
    _gauge("nmoe_prefill_tokens_per_second", "Computed prompt tokens a second over the last push interval"),
    _counter("nmoe_prompt_tokens_total", "Prompt tokens computed, recomputation after a preemption included"),
    _counter("nmoe_generation_tokens_total", "Tokens generated"),
    _counter("nmoe_steps_total", "Steps"),
    _counter("nmoe_preemptions_total", "Sequences that gave their pages back and were recomputed later"),
    _counter(
        "nmoe_requests_finished_total",
        "Requests that the engine ended, by finish reason",
        "finish_reason",
        ("stop", "length", "cancelled", "error"),
    ),
    _counter(
        "nmoe_request_errors_total",
        "Requests that ended with an error, by kind",
        "kind",
        tuple(kind.value for kind in ErrorKind),
    ),
    _histogram("nmoe_time_to_first_token_seconds", "Arrival to first response with a token", _TTFT_BUCKETS),
    _histogram("nmoe_inter_token_latency_seconds", "Time a token, sampled: at most 500 a second", _ITL_BUCKETS),
    _histogram("nmoe_request_latency_seconds", "Arrival to final response, errors left out", _LATENCY_BUCKETS),
    _counter("nmoe_inter_token_intervals_total", "Intervals between tokens that left: exact count of the histogram"),
    _counter("nmoe_inter_token_seconds_total", "Sum of the intervals between tokens that left: exact"),
)


class Metrics:
    """Holds the series and what has not been pushed. The observer methods may be called from any thread."""

    def __init__(self, register: Register, *, seed: int = 0) -> None:
        self._series = {
            (spec.name, value): register(spec, {spec.label: value} if value else {})
            for spec in SPECS
            for value in spec.label_values or ("",)
        }
        self._pushed: dict[tuple[str, str], float] = {}  # counters: what Triton has, or was never told
        self._random = random.Random(seed)
        self._ttfts: deque[float] = deque()
        self._gaps: deque[tuple[float, int]] = deque()
        self._latencies: deque[float] = deque()
        self._errors: deque[ErrorKind] = deque()
        self._last_push: tuple[float, int, int] | None = None  # (time, generated, prompt tokens)

    def start_from(self, stats: EngineStats) -> None:
        """What the engine counted so far (its warm-up) was no client's: the counters start at 0 from here."""
        self._pushed.update(_totals(stats))

    def first_tokens(self, ttft_s: float) -> None:
        """The first response with a token left."""
        self._ttfts.append(ttft_s)

    def more_tokens(self, gap_s: float, num_tokens: int) -> None:
        """A further response left, `gap_s` after the one before."""
        self._gaps.append((gap_s, num_tokens))

    def ended(self, latency_s: float, error: ErrorKind | None) -> None:
        """A final response left."""
        if error is None:
            self._latencies.append(latency_s)
        else:
            self._errors.append(error)

    def refused(self, error: ErrorKind) -> None:
        """A request never became a stream."""
        self._errors.append(error)

    def push(self, stats: EngineStats, is_alive: bool, now_s: float) -> None:
        """Everything since the last push. From one thread."""
        self._set("nmoe_engine_alive", float(is_alive))
        if is_alive:
            self._series["nmoe_engine_heartbeats_total", ""].increment(1)
        self._push_gauges(stats)
        self._push_rates(stats, now_s)
        for key, total in _totals(stats).items():
            if total > (before := self._pushed.get(key, 0.0)):
                self._series[key].increment(total - before)
                self._pushed[key] = total
        self._push_observations()

    def _push_gauges(self, stats: EngineStats) -> None:
        used = 100.0 * stats.pages_used / stats.pages_total if stats.pages_total else 0.0
        self._set("nmoe_requests_running", stats.num_running)
        self._set("nmoe_requests_waiting", stats.num_waiting)
        self._set("nmoe_batch_size_current", sum(stats.running_per_rank))
        self._set("nmoe_kv_cache_utilization_percent", used)
        self._set("nmoe_step_seconds", stats.last_step_s)

    def _push_rates(self, stats: EngineStats, now_s: float) -> None:
        tokens = (stats.generation_tokens_total, stats.prompt_tokens_total)
        if self._last_push is not None and now_s > self._last_push[0]:
            elapsed = now_s - self._last_push[0]
            self._set("nmoe_decode_tokens_per_second", (tokens[0] - self._last_push[1]) / elapsed)
            self._set("nmoe_prefill_tokens_per_second", (tokens[1] - self._last_push[2]) / elapsed)
        self._last_push = (now_s, *tokens)

    def _push_observations(self) -> None:
        for kind in _drain(self._errors):
            self._series["nmoe_request_errors_total", kind.value].increment(1)
        for ttft_s in _drain(self._ttfts):
            self._series["nmoe_time_to_first_token_seconds", ""].observe(ttft_s)
        for latency_s in _drain(self._latencies):
            self._series["nmoe_request_latency_seconds", ""].observe(latency_s)
        gaps = _drain(self._gaps)
        if gaps:
            self._series["nmoe_inter_token_intervals_total", ""].increment(sum(count for _, count in gaps))
            self._series["nmoe_inter_token_seconds_total", ""].increment(sum(gap_s for gap_s, _ in gaps))
            for value in self._sample(gaps):
                self._series["nmoe_inter_token_latency_seconds", ""].observe(value)

    def _sample(self, gaps: list[tuple[float, int]]) -> list[float]:
        """Seconds a token; a gap weighs as many tokens as came behind it."""
        num_tokens = sum(count for _, count in gaps)
        if num_tokens <= ITL_SAMPLES_PER_PUSH:
            return [gap_s / count for gap_s, count in gaps for _ in range(count)]
        weights = [count for _, count in gaps]
        chosen = self._random.choices(gaps, weights, k=ITL_SAMPLES_PER_PUSH)
        return [gap_s / count for gap_s, count in chosen]

    def _set(self, name: str, value: float) -> None:
        self._series[name, ""].set(value)


class MetricsPusher:
    """The thread that pushes. `stats` and `is_alive` are asked for every push."""

    def __init__(
        self,
        metrics: Metrics,
        stats: Callable[[], EngineStats],
        is_alive: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._stats = stats
        self._is_alive = is_alive
        self._clock = clock
        self._stopping = threading.Event()
        # A daemon: where the server was killed a push never returns, and must not keep the process from ending.
        self._thread = threading.Thread(target=self._loop, name="metrics", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Push a last time and end the thread."""
        self._stopping.set()
        self._thread.join()

    def _loop(self) -> None:
        stopping = False
        while not stopping:
            stopping = self._stopping.wait(PUSH_INTERVAL_S)
            self._metrics.push(self._stats(), self._is_alive(), self._clock())


def _totals(stats: EngineStats) -> dict[tuple[str, str], float]:
    """The engine's counters, by name and label value."""
    return {
        ("nmoe_prompt_tokens_total", ""): stats.prompt_tokens_total,
        ("nmoe_generation_tokens_total", ""): stats.generation_tokens_total,
        ("nmoe_steps_total", ""): stats.steps_total,
        ("nmoe_preemptions_total", ""): stats.preemptions_total,
        **{("nmoe_requests_finished_total", reason): n for reason, n in stats.requests_finished_total.items()},
    }


def _drain(items: deque[T]) -> list[T]:
    """Take what is there; others go on appending."""
    return [items.popleft() for _ in range(len(items))]
