"""Gate: a replica on two GPUs, through the production path: its ranks are two graphs that wait for each other.

Tokens: exactly those of two virtual ranks on one GPU, which take the same steps without graphs, behind the host's
barrier. All requests of a run arrive at once, and prefill is not cut by measured times, so both runs take the same
steps: greedy tokens may depend on how many rows a step has (docs/kernels.md).
Deaths: a rank that raises, hangs, or leaves its graph out ends the other within `rank_timeout_s`.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from nmoe_backend import warmup
from nmoe_backend.config import ServeConfig
from nmoe_backend.engine import Engine
from nmoe_backend.models import load_spec
from nmoe_backend.runtime.worker import Worker
from nmoe_backend.types import PendingOutput, RankOutput, StepPlan
from scripts.make_tiny_checkpoint import make_checkpoint
from tests.generation import GREEDY, Collected, replace, request_of

pytestmark = pytest.mark.gpu2
TOML = """
model_path = "{checkpoint}"
device = "cuda"
max_batch_size = 8
max_prefill_tokens = 128
max_seq_len = 1024
num_pages = 128
itl_target_ms = 1e6
rank_timeout_s = {timeout_s}
[kv_layout]
page_size = 64
[[replicas]]
replica_id = 0
gpus = {gpus}
"""
ON_TWO, ON_ONE = [0, 1], [0, 0]
Fault = Callable[[Worker, StepPlan], PendingOutput]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("slim"), preset="slim", dtype="fp8")


class Nothing:
    """What a rank that launched nothing says of its step."""

    def __init__(self, plan: StepPlan, rank: int) -> None:
        self._output = RankOutput(token_ids=[40] * len(plan.ranks[rank].slots))

    def wait(self, timeout_s: float) -> RankOutput:
        return self._output


class Faulty:
    """A rank that fails in its own way once it is told to."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.fault: Fault | None = None

    def execute(self, plan: StepPlan) -> PendingOutput:
        return self.worker.execute(plan) if self.fault is None else self.fault(self.worker, plan)

    def __getattr__(self, name: str) -> object:
        return getattr(self.worker, name)


@contextmanager
def engine_on(
    gpus: list[int], checkpoint: Path, folder: Path, timeout_s: float = 60.0
) -> Iterator[tuple[Engine, list[Faulty]]]:
    """A started engine and its ranks, which work until they are told otherwise."""
    toml = folder / f"ranks-{len(set(gpus))}.toml"
    toml.write_text(TOML.format(checkpoint=checkpoint, gpus=gpus, timeout_s=timeout_s))
    config = ServeConfig.from_toml(toml)
    workers, limits = warmup.build_workers(config, config.replicas[0], load_spec(config.model_path), print)
    ranks = [Faulty(worker) for worker in workers]
    engine = Engine(ranks, limits)
    engine.start()
    try:
        yield engine, ranks
    finally:
        engine.close()


def submit(engine: Engine, prompts: list[list[int]], max_tokens: int) -> list[Collected]:
    """All at once: the engine's thread sees none of them before the last."""
    sinks = [Collected() for _ in prompts]
    with engine._cond:
        for prompt, sink in zip(prompts, sinks, strict=True):
            engine.submit(request_of(prompt, replace(GREEDY, max_tokens=max_tokens, ignore_eos=True)), sink)
    return sinks


def prompts_of(lengths: list[int]) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(30, 1000) for _ in range(length)] for length in lengths]


def test_two_gpus_give_the_tokens_of_two_virtual_ranks(checkpoint: Path, tmp_path: Path) -> None:
    """24 prompts of 1 to 400 tokens for 16 slots: steps of every bucket, ragged and with an empty rank."""
    lengths = [1, 2, 400, 17, 130, 64, 65, 5, 300, 3, 90, 200, 1, 250, 33, 8, 70, 129, 12, 380, 40, 2, 100, 55]
    found = {}
    for gpus in (ON_TWO, ON_ONE):
        with engine_on(gpus, checkpoint, tmp_path) as (engine, ranks):
            assert all(bool(rank.worker._steps._graphs) == (gpus is ON_TWO) for rank in ranks)
            many = submit(engine, prompts_of(lengths), 100)
            found[len(set(gpus))] = [sink.result().token_ids for sink in many]
            alone = submit(engine, prompts_of([150]), 200)
            found[len(set(gpus))] += [sink.result().token_ids for sink in alone]
    assert found[2] == found[1]
    assert len({tuple(tokens) for tokens in found[2]}) > len(lengths) // 2, "answers that all repeat prove little"


def test_ten_thousand_decode_steps_on_two_gpus_repeat_bit_for_bit(checkpoint: Path, tmp_path: Path) -> None:
    with engine_on(ON_TWO, checkpoint, tmp_path) as (engine, _):
        runs = []
        for _ in range(10):
            sinks = submit(engine, prompts_of([20] * 4), 1000)
            runs.append([sink.result(300).token_ids for sink in sinks])
        assert engine.stats().steps_total >= 10 * 999
    assert all(run == runs[0] for run in runs)


def raises(worker: Worker, plan: StepPlan) -> PendingOutput:
    raise ValueError("a bug in the middle of a step")


def leaves_its_graph_out(worker: Worker, plan: StepPlan) -> PendingOutput:
    with worker._context.activate():
        worker._context.meet()  # as if to launch
    return Nothing(plan, 1)


class Hangs:
    def __init__(self) -> None:
        self.until = threading.Event()

    def __call__(self, worker: Worker, plan: StepPlan) -> PendingOutput:
        assert self.until.wait(60.0)
        return Nothing(plan, 1)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (raises, "rank 1, step"),
        (Hangs(), "ranks [1] did not come within 6 s"),
        (leaves_its_graph_out, "rank 1 did not come to a barrier"),
    ],
    ids=["raises", "hangs", "leaves its graph out"],
)
def test_a_rank_that_dies_in_a_step_ends_the_other_within_the_bound(
    checkpoint: Path, tmp_path: Path, fault: Fault, said: str
) -> None:
    timeout_s = 6.0
    with engine_on(ON_TWO, checkpoint, tmp_path, timeout_s) as (engine, ranks):
        assert [len(sink.result().token_ids) for sink in submit(engine, prompts_of([5, 6]), 10)] == [10, 10]
        sinks = submit(engine, prompts_of([5, 6]), 900)
        assert all(sink.first.wait(30.0) for sink in sinks)
        ranks[1].fault = fault
        began_s = time.monotonic()
        errors = [str(sink.result(3 * timeout_s).error) for sink in sinks]
        took_s = time.monotonic() - began_s
        if isinstance(fault, Hangs):
            fault.until.set()
        assert all(said in error for error in errors), errors
        assert took_s < timeout_s + 1.0
        assert not engine.is_alive()
    for device in range(2):
        torch.cuda.synchronize(device)  # nothing spins any more
    assert time.monotonic() - began_s < 2 * timeout_s
