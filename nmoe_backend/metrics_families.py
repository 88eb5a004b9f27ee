"""Every metric family that the engine exports, declared once; docs/metrics.md describes them and is held to this list.

Beside our own names stand those that others read: `nv_trt_llm_*` (Triton's ORCA headers; the Gateway API Inference
Extension's engine `triton-tensorrt-llm`) and `vllm:*` (the same extension's default engine, and autoscalers).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nmoe_backend.types import ErrorKind

Kind = Literal["counter", "gauge", "histogram"]

_LATENCY_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)  # 2 s is the objective
_QUEUE_BUCKETS = (0.001, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ITL_BUCKETS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.25,
    0.5,
    1.0,
    2.5,
)  # 0.1 s is the objective
_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricSpec:
    """One family. With `label`, a series for each of `label_values`, or for each rank or GPU of the server."""

    name: str
    kind: Kind
    help: str
    label: str = ""
    label_values: tuple[str, ...] | Literal["ranks", "gpus"] = ()
    buckets: tuple[float, ...] = ()
    constant_labels: tuple[str, ...] = ()  # on every series, with the value that the server has for them


_PER_RANK: Literal["ranks"] = "ranks"


def _gauge(name: str, text: str) -> MetricSpec:
    return MetricSpec(name=name, kind="gauge", help=text)


def _per_rank(name: str, kind: Kind, text: str) -> MetricSpec:
    return MetricSpec(name=name, kind=kind, help=text, label="rank", label_values=_PER_RANK)


def _counter(name: str, text: str, label: str = "", label_values: tuple[str, ...] = ()) -> MetricSpec:
    return MetricSpec(name=name, kind="counter", help=text, label=label, label_values=label_values)


def _histogram(name: str, text: str, buckets: tuple[float, ...]) -> MetricSpec:
    return MetricSpec(name=name, kind="histogram", help=text, buckets=buckets)


def _trt_llm(name: str, text: str, label: str, label_values: tuple[str, ...]) -> MetricSpec:
    return MetricSpec(
        name=name, kind="gauge", help=text, label=label, label_values=label_values, constant_labels=("model", "version")
    )


def _vllm(name: str, text: str, *labels: str) -> MetricSpec:
    return MetricSpec(name=name, kind="gauge", help=text, constant_labels=("model_name", *labels))


SPECS = (
    _gauge("nmoe_engine_alive", "1 while the engine's heartbeat is young, 0 after a failure: restart the server then"),
    _counter("nmoe_engine_heartbeats_total", "Four a second while the engine is alive: `nmoe serve` watches it"),
    # Load
    _gauge("nmoe_requests_running", "Requests that hold a slot of a rank"),
    _gauge("nmoe_requests_waiting", "Queue depth: requests that wait for their first step or for readmission"),
    _gauge("nmoe_batch_size_current", "Sequences that steps serve now, all ranks: those that hold a slot"),
    _gauge("nmoe_kv_cache_utilization_percent", "KV pages in use, percent of all ranks' pages"),
    MetricSpec(
        name="nmoe_gpu_utilization_percent",
        kind="gauge",
        help="Percent of time in which a kernel ran (NVML), once a second; gpu is the CUDA ordinal, or none on a CPU",
        label="gpu",
        label_values="gpus",
    ),
    _counter("nmoe_preemptions_total", "Sequences that gave their pages back and were recomputed later"),
    # Throughput
    _gauge("nmoe_decode_tokens_per_second", "Generated tokens a second over the last push interval"),
    _gauge("nmoe_prefill_tokens_per_second", "Computed prompt tokens a second over the last push interval"),
    _counter("nmoe_prompt_tokens_total", "Prompt tokens computed, recomputation after a preemption included"),
    _counter("nmoe_generation_tokens_total", "Tokens generated"),
    # Steps
    _gauge("nmoe_step_seconds", "Duration of the last step"),
    _gauge("nmoe_step_predicted_seconds", "What the step-time model said of the step planned last"),
    _histogram("nmoe_step_duration_seconds", "Durations of steps: the newest 64 a push", _STEP_BUCKETS),
    _counter("nmoe_steps_total", "Steps"),
    _counter("nmoe_busy_seconds_total", "Time in which a step ran, summed over replicas: exact sum of step durations"),
    # Ranks and experts
    _per_rank("nmoe_rank_sequences", "gauge", "Sequences that hold a slot of this rank"),
    _per_rank("nmoe_rank_kv_cache_utilization_percent", "gauge", "KV pages in use, percent of this rank's pages"),
    _per_rank("nmoe_rank_prefill_backlog_tokens", "gauge", "Tokens that admitted sequences of this rank still feed"),
    _per_rank("nmoe_expert_rows_total", "counter", "Rows that this rank's experts computed, all layers"),
    _gauge("nmoe_expert_imbalance_ratio", "Rows of the busiest expert over the mean of all; 1 is even"),
    _counter("nmoe_moe_overflow_total", "Steps with a kernel's error word; no row is ever dropped: stays 0"),
    # Requests
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
    _histogram("nmoe_queue_seconds", "Arrival to the first step, of requests that got a token", _QUEUE_BUCKETS),
    _histogram("nmoe_time_to_first_token_seconds", "Arrival to first response with a token", _TTFT_BUCKETS),
    _histogram("nmoe_inter_token_latency_seconds", "Time a token, sampled: at most 500 a second", _ITL_BUCKETS),
    _histogram("nmoe_request_latency_seconds", "Arrival to final response, errors left out", _LATENCY_BUCKETS),
    _counter("nmoe_inter_token_intervals_total", "Intervals between tokens that left: exact count of the histogram"),
    _counter("nmoe_inter_token_seconds_total", "Sum of the intervals between tokens that left: exact"),
    # Coalescing
    _gauge("nmoe_tokens_per_response", "Tokens a response over the last push interval in which one left"),
    _counter("nmoe_responses_total", "Responses with at least one token"),
    _counter("nmoe_response_tokens_total", "Tokens in them: those that reached clients"),
    # What others read
    _trt_llm("nv_trt_llm_request_metrics", "Requests", "request_type", ("active", "waiting", "scheduled", "max")),
    _trt_llm(
        "nv_trt_llm_kv_cache_block_metrics",
        "KV pages",
        "kv_cache_block_type",
        ("max", "free", "used", "tokens_per", "fraction"),
    ),
    _trt_llm("nv_trt_llm_runtime_memory_metrics", "Bytes of this process", "memory_type", ("cpu", "gpu")),
    _vllm("vllm:num_requests_running", "As nmoe_requests_running"),
    _vllm("vllm:num_requests_waiting", "As nmoe_requests_waiting"),
    _vllm("vllm:kv_cache_usage_perc", "KV pages in use, [0, 1]"),
    _vllm("vllm:cache_config_info", "1; labels: tokens a page, all pages", "block_size", "num_gpu_blocks"),
)
