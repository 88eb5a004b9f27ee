"""From a config to an engine that answers: load, allocate, start, check tokens from every rank.

The only place where control plane and device meet. Each stage is announced with its time, so that a slow start explains
itself. When a stage fails, what was started is closed and the error goes up.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from nmoe_backend import environ, memory, preflight
from nmoe_backend.config import ReplicaConfig, ServeConfig, engine_limits
from nmoe_backend.engine import Engine
from nmoe_backend.layers.context import LayerContext
from nmoe_backend.layers.table import TableRequest
from nmoe_backend.model import DecoderModel
from nmoe_backend.models import load_spec
from nmoe_backend.models.checkpoint import Checkpoint
from nmoe_backend.models.spec import ModelSpec
from nmoe_backend.orchestrator import Orchestrator
from nmoe_backend.parallel.ranks import RankContext, RankGroup
from nmoe_backend.runtime.dummy_weights import dummy_rank_weights
from nmoe_backend.runtime.kv_cache import KVCache
from nmoe_backend.runtime.sampler import build_sampler
from nmoe_backend.runtime.weight_reader import ReadMeter
from nmoe_backend.runtime.weights import load_rank_weights
from nmoe_backend.runtime.worker import Worker
from nmoe_backend.step_buckets import FEWEST_TOKENS, Bucket
from nmoe_backend.types import (
    EngineLimits,
    FinishReason,
    RankError,
    Request,
    RequestError,
    SamplingParams,
    TokenLogprobs,
)

Progress = Callable[[str], None]

WARMUP_TOKENS = 4  # per rank: one prefill and three decode steps
WARMUP_TIMEOUT_S = 600.0  # a cold kernel cache compiles in here


def start(config: ServeConfig, progress: Progress = print) -> Orchestrator:
    """An orchestrator whose every rank has produced a checked token. `progress` gets one line a stage.

    Raises ConfigError for what cannot work (GPUs, memory, roles: before anything is allocated; checkpoint), RankError
    when the warm-up fails.
    """
    preflight.require_machine(config)
    spec = load_spec(config.model_path)
    with ExitStack() as on_failure:
        engines = []
        for replica in config.replicas:
            engines.append(_start_replica(config, replica, spec, progress))
            on_failure.callback(engines[-1].close)
        orchestrator = Orchestrator(engines)
        on_failure.pop_all()
    return orchestrator


def _start_replica(config: ServeConfig, replica: ReplicaConfig, spec: ModelSpec, progress: Progress) -> Engine:
    workers, limits = build_workers(config, replica, spec, progress)
    engine = Engine(workers, limits)
    with ExitStack() as on_failure:
        on_failure.callback(engine.close)
        engine.start()
        with _stage(progress, f"replica {replica.replica_id}: warm-up and check of one token a rank"):
            _warm_up(engine, limits)
        on_failure.pop_all()
    return engine


def build_workers(
    config: ServeConfig, replica: ReplicaConfig, spec: ModelSpec, progress: Progress, buckets: Sequence[Bucket] = ()
) -> tuple[list[Worker], EngineLimits]:
    """The replica's ranks, loaded, their steps captured. `buckets`: see StepGraphs."""
    devices = _devices(config, replica)
    dtype = _dtype(config)
    if config.device == "cpu":  # the ranks' threads share the cores; more would only queue
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // replica.world_size))
    contexts = RankGroup.create(replica.world_size, devices, config.rank_timeout_s)
    name = f"replica {replica.replica_id}"
    with ThreadPoolExecutor(replica.world_size, thread_name_prefix="nmoe-load") as pool:
        with _stage(progress, f"{name}: weights on {replica.world_size} ranks") as notes:
            load = _weights_of(config, spec, lambda line: progress(f"{name}: weights: {line}"), notes)
            models = list(pool.map(lambda context: _load_model(config, replica, spec, context, dtype, load), contexts))
        num_pages = _num_pages(config, replica, devices)
        limits = engine_limits(config, num_pages, replica)
        if models[0].ops.pads_steps:  # the smallest step with prefill computes so many, there or not
            limits = replace(limits, min_chunk=FEWEST_TOKENS, pads_steps=True)
        with _stage(progress, f"{name}: {num_pages} KV pages a rank"):
            workers = list(
                pool.map(lambda model, at: _build_worker(model, at, limits, dtype, buckets), models, contexts)
            )
        with _stage(progress, f"{name}: steps"):
            # All ranks prepare the same steps; one of them says so.
            shown = [progress, *[_silent] * (len(workers) - 1)]
            list(pool.map(lambda worker, tell: worker.capture(tell), workers, shown))
    return workers, limits


def _silent(line: str) -> None:
    pass


def _devices(config: ServeConfig, replica: ReplicaConfig) -> list[torch.device]:
    """One device a rank. With device = "cpu" the numbers are rank names only."""
    if config.device == "cpu":
        return [torch.device("cpu")] * replica.world_size
    return [torch.device("cuda", gpu) for gpu in replica.gpus]


def _dtype(config: ServeConfig) -> torch.dtype:
    """The compute dtype; "auto" is the checkpoint's own, where fp8 and fp16 compute in bf16."""
    return torch.float32 if memory.compute_bytes(config, memory.model_dims(config)) == 4 else torch.bfloat16


Load = Callable[..., dict[str, Tensor]]  # a rank's weights: load_rank_weights but for its first argument


def _weights_of(config: ServeConfig, spec: ModelSpec, say: Progress, notes: list[Callable[[], str]]) -> Load:
    """What loads a rank's weights; `notes` gets who tells how much was read."""
    if config.load_format == "dummy":
        return partial(dummy_rank_weights, spec)
    meter = ReadMeter(say)
    notes.append(meter.summary)
    return partial(load_rank_weights, Checkpoint(config.model_path, spec), on_read=meter)


def _load_model(
    config: ServeConfig, replica: ReplicaConfig, spec: ModelSpec, context: RankContext, dtype: torch.dtype, load: Load
) -> DecoderModel:
    keep_quantized = config.device == "cuda"  # dequantised, DeepSeek-V3 would fit no GPU; memory.py counts the same way
    request = TableRequest(
        spec=spec,
        max_tokens=memory.tokens_per_step(config),
        dtype=dtype,
        keep_quantized=keep_quantized,
        loopback_ranks=replica.loopback_ranks,
        deterministic=config.deterministic,
    )
    layer_context = LayerContext.create(context, request, environ.debug_switches())
    weights = load(
        rank=context.rank,
        world_size=replica.expert_ranks,
        device=context.device,
        dtype=dtype,
        keep_quantized=keep_quantized,
    )
    model = DecoderModel(spec, weights, layer_context)
    weights.clear()  # some were copied into one with others: those bytes are for the KV cache
    if context.device.type == "cuda":
        torch.cuda.empty_cache()
    return model


def _build_worker(
    model: DecoderModel, context: RankContext, limits: EngineLimits, dtype: torch.dtype, buckets: Sequence[Bucket]
) -> Worker:
    kv_cache = KVCache(model.spec, limits.num_pages, limits.page_size, dtype, context.device)
    sampler = build_sampler(model.ops, limits, context)
    return Worker(model, kv_cache, sampler, limits, context, buckets)


def _num_pages(config: ServeConfig, replica: ReplicaConfig, devices: Sequence[torch.device]) -> int:
    """Pages of a rank, the same on all: what the tightest of them holds now that the weights are loaded."""
    available = min(
        memory.available_bytes(config, *_free_and_total(device)) // devices.count(device) for device in set(devices)
    )
    dims = memory.model_dims(config)
    return memory.resolve_num_pages(config, dims, replica, available=available, loaded=True)


def _free_and_total(device: torch.device) -> tuple[int, int]:
    """Bytes of the device's memory; on the CPU of the machine's."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free, total
    total, available = memory.host_memory_bytes()
    return available, total


@contextmanager
def _stage(progress: Progress, what: str) -> Iterator[list[Callable[[], str]]]:
    """Announces a stage, and again with its time when it is done, and with what the notes say then."""
    progress(f"{what} ...")
    began = time.monotonic()
    notes: list[Callable[[], str]] = []
    yield notes
    progress(", ".join([f"{what}: {time.monotonic() - began:.1f} s", *[note() for note in notes]]))


class _Check:
    """The sink of a warm-up request: every token must be an id of the vocabulary with a finite logprob."""

    def __init__(self, vocab_size: int) -> None:
        self.done = threading.Event()
        self.num_tokens = 0
        self.problem = ""
        self._vocab_size = vocab_size

    def put(
        self, token_id: int, logprobs: TokenLogprobs | None = None, finish_reason: FinishReason | None = None
    ) -> None:
        self.num_tokens += 1
        if not 0 <= token_id < self._vocab_size or logprobs is None or not math.isfinite(logprobs.logprob):
            self.problem = f"token {token_id} with {logprobs}"
        if finish_reason is not None:
            self.done.set()

    def put_prompt_logprobs(self, logprobs: list[TokenLogprobs]) -> None:
        self.problem = "prompt logprobs that nobody asked for"

    def put_embedding(self, embedding: list[float]) -> None:
        self.problem = "an embedding that nobody asked for"

    def close(self, finish_reason: FinishReason, error: RequestError | None = None) -> None:
        self.problem = f"{finish_reason}: {error}"
        self.done.set()


def _warm_up(engine: Engine, limits: EngineLimits) -> None:
    """One request a rank at a time, with the longest chunk of a step: runs every code path's first time, and gives the
    step-time model its first points."""
    prompt_len = max(1, min(limits.max_prefill_tokens, limits.max_seq_len - WARMUP_TOKENS))
    sampling = SamplingParams(temperature=0.0, max_tokens=WARMUP_TOKENS, ignore_eos=True, num_logprobs=0)
    prompt = tuple(itertools.islice(itertools.cycle(range(min(limits.vocab_size, 512))), prompt_len))
    checks = [_Check(limits.vocab_size) for _ in range(limits.num_ranks)]
    for index, check in enumerate(checks):
        request = Request(request_id=-1 - index, prompt_ids=prompt, sampling=sampling, arrival_s=time.monotonic())
        engine.submit(request, check)
    deadline = time.monotonic() + WARMUP_TIMEOUT_S
    for check in checks:
        ended = check.done.wait(max(0.0, deadline - time.monotonic()))
        if not ended or check.problem or check.num_tokens != WARMUP_TOKENS:
            raise RankError(
                f"warm-up: got {check.num_tokens} of {WARMUP_TOKENS} tokens "
                f"({check.problem or 'no end in time' if not ended else check.problem or 'too few'}). "
                "Set NMOE_DEBUG_FINITE=1 to find the operation that goes wrong; check the checkpoint's files."
            )
