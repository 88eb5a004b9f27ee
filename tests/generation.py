"""Helpers for tests that generate: a config around a checkpoint, a sink that collects, a started engine.

Shared by the gates and by the live-server tests, where they produce the expected ("offline") tokens.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from nmoe_backend import warmup
from nmoe_backend.config import ServeConfig
from nmoe_backend.orchestrator import Orchestrator
from nmoe_backend.types import FinishReason, Request, RequestError, SamplingParams, TokenLogprobs

GREEDY = SamplingParams(temperature=0.0, max_tokens=16)
_ids = itertools.count(1)


def serve_config(directory: Path, checkpoint: Path, num_ranks: int = 2, **keys: object) -> ServeConfig:
    """A ServeConfig through the real TOML reader; `keys` are top-level scalars, `page_size` goes to [kv_layout]."""
    page_size = keys.pop("page_size", 16)
    values: dict[str, object] = {
        "model_path": str(checkpoint),
        "device": "cpu",
        "dtype": "float32",
        "max_batch_size": 64,
        "max_prefill_tokens": 256,
        "num_pages": 512,
        "max_seq_len": 512,
        "rank_timeout_s": 60.0,
        **keys,
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    lines += ["[kv_layout]", f"page_size = {page_size}", "[[replicas]]", "replica_id = 0"]
    gpus = [0] * num_ranks if values["device"] == "cuda" else list(range(num_ranks))  # one GPU: virtual ranks
    lines += [f"gpus = {gpus}"]
    path = directory / "config.toml"
    path.write_text("\n".join(lines))
    return ServeConfig.from_toml(path)


@contextmanager
def engine_of(config: ServeConfig, progress: Callable[[str], None] = lambda line: None) -> Iterator[Orchestrator]:
    """A started engine, closed at the end whatever happens."""
    engine = warmup.start(config, progress)
    try:
        yield engine
    finally:
        engine.close()


@dataclass
class Collected:
    """A TokenSink that keeps everything."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    embedding: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: RequestError | None = None
    done: threading.Event = field(default_factory=threading.Event)
    first: threading.Event = field(default_factory=threading.Event)

    def put(
        self, token_id: int, logprobs: TokenLogprobs | None = None, finish_reason: FinishReason | None = None
    ) -> None:
        assert not self.done.is_set(), "a token after the end"
        self.token_ids.append(token_id)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        self.first.set()
        if finish_reason is not None:
            self.close(finish_reason)

    def put_prompt_logprobs(self, logprobs: list[TokenLogprobs]) -> None:
        assert not self.prompt_logprobs and not self.token_ids, "prompt logprobs come once, before the first token"
        self.prompt_logprobs = list(logprobs)

    def put_embedding(self, embedding: list[float]) -> None:
        self.embedding = list(embedding)

    def close(self, finish_reason: FinishReason, error: RequestError | None = None) -> None:
        assert not self.done.is_set(), "ended twice"
        self.finish_reason, self.error = finish_reason, error
        self.done.set()

    def result(self, timeout_s: float = 120.0) -> Collected:
        """Wait for the end."""
        assert self.done.wait(timeout_s), "the request did not end"
        return self


def request_of(prompt_ids: Iterable[int], sampling: SamplingParams = GREEDY, **fields: object) -> Request:
    """A request with an id of its own."""
    return Request(
        request_id=next(_ids),
        prompt_ids=tuple(prompt_ids),
        sampling=sampling,
        arrival_s=time.monotonic(),
        **fields,  # type: ignore[arg-type]
    )


def generate(engine: Orchestrator, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[Collected]:
    """All prompts at once, each with the same parameters; waits for all."""
    sinks = []
    for prompt in prompts:
        sinks.append(Collected())
        engine.submit(request_of(prompt, sampling), sinks[-1])
    return [sink.result() for sink in sinks]


def tokens(collected: Iterable[Collected]) -> list[list[int]]:
    """Their token ids."""
    return [one.token_ids for one in collected]


__all__ = ["GREEDY", "Collected", "engine_of", "generate", "replace", "request_of", "serve_config", "tokens"]
