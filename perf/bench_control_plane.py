"""P8: what a step costs the host, by number of sequences; no model, no device.

    python -m perf.bench_control_plane                                 # the table, then one JSON line
    python -m perf.bench_control_plane --baseline perf/baselines/cpu.json [--check | --save]

Steady state over 8 ranks with a page size of 64: about 5 % of the sequences end in every step (by length and by stop
id) and as many arrive with a prompt of 256 tokens; penalties and three stop ids are set. Ranks are replaced by lists of
random tokens, sinks do nothing. One step of overlap, as in the engine. Timed: `add` of the arrivals, `schedule`,
`commit` with delivery to the sinks; `total` is their sum in one step, and what P8's goal is about. `engine` is the
whole loop with its nine threads, whose ranks answer at once: a step's wall time when the device costs nothing, the
arrivals' validation and the pretended ranks' own work included.
The garbage collector runs as it would in service.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import threading
import time
from itertools import count
from pathlib import Path

from nmoe_backend.engine import Engine
from nmoe_backend.scheduler import Scheduler
from nmoe_backend.types import (
    EngineLimits,
    FinishReason,
    RankOutput,
    RankPlan,
    Request,
    RequestError,
    SamplingParams,
    StepPlan,
    TokenLogprobs,
)
from perf.results import commit_id, machine, save_lines

NUM_RANKS = 8
SIZES = (64, 256, 1024, 2048)
GOAL_MS = 4.0
PROMPT_LEN = 256
STOP_IDS = (1, 2, 3)
VOCAB_SIZE = 129_280
WORSE = 1.05  # a p50 beyond this factor of the baseline fails --check


class NullSink:
    """The cheapest TokenSink."""

    __slots__ = ()

    def put(
        self, token_id: int, logprobs: TokenLogprobs | None = None, finish_reason: FinishReason | None = None
    ) -> None:
        pass

    def put_prompt_logprobs(self, logprobs: list[TokenLogprobs]) -> None:
        pass

    def put_embedding(self, embedding: list[float]) -> None:
        pass

    def close(self, finish_reason: FinishReason, error: RequestError | None = None) -> None:
        pass


class Workload:
    """Seeded requests and tokens. A token is a stop id once in 50; max_tokens is 1 to 60: lives of about 20 steps."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = random.Random(seed)
        self._ids = count()
        self._prompts = [tuple(self._rng.randrange(10, VOCAB_SIZE) for _ in range(PROMPT_LEN)) for _ in range(64)]
        self._tokens = [self._rng.choice(STOP_IDS) if self._rng.random() < 0.02 else 100 + i for i in range(20_000)]

    def request(self, now_s: float) -> Request:
        sampling = SamplingParams(
            max_tokens=self._rng.randrange(1, 61),
            temperature=0.7,
            repetition_penalty=1.1,
            presence_penalty=0.5,
            frequency_penalty=0.5,
            stop_token_ids=STOP_IDS[1:],
            seed=1,
        )
        prompt = self._prompts[self._rng.randrange(len(self._prompts))]
        return Request(request_id=next(self._ids), prompt_ids=prompt, sampling=sampling, arrival_s=now_s)

    def output(self, plan: RankPlan) -> RankOutput:
        num_sampled = sum(plan.samples)
        start = self._rng.randrange(len(self._tokens) - num_sampled)
        return RankOutput(token_ids=self._tokens[start : start + num_sampled])


def make_limits(num_sequences: int) -> EngineLimits:
    """Room for num_sequences and the few that wait for a plan's commit."""
    return EngineLimits(
        num_ranks=NUM_RANKS,
        num_pages=num_sequences * 2,
        page_size=64,
        max_batch_size=num_sequences // NUM_RANKS + 8,
        max_prefill_tokens=8192,
        max_seq_len=512,
        max_queue_size=num_sequences,
        itl_target_ms=1e6,
        rank_timeout_s=60.0,
        eos_token_ids=STOP_IDS[:1],
        vocab_size=VOCAB_SIZE,
    )


def time_scheduler(num_sequences: int, steps: int) -> dict[str, float]:
    """Milliseconds of each part of a step, p50 and p99, and the share of sequences that ended a step."""
    workload, scheduler, sink = Workload(), Scheduler(make_limits(num_sequences)), NullSink()
    under_way: tuple[StepPlan, list[RankOutput]] | None = None
    samples: dict[str, list[float]] = {"add": [], "schedule": [], "commit": [], "total": []}
    arrivals = 0
    warm_up = 60
    for step in range(warm_up + steps):
        fresh = [workload.request(0.0) for _ in range(num_sequences - scheduler.num_live)]
        started = time.perf_counter()
        for request in fresh:
            scheduler.add(request, sink)
        added = time.perf_counter()
        plan = scheduler.schedule()
        scheduled = time.perf_counter()
        assert plan is not None
        outputs = [workload.output(share) for share in plan.ranks]
        before_commit = time.perf_counter()
        if under_way is not None:
            scheduler.commit(under_way[0].step_id, under_way[1], 0.05)
        committed = time.perf_counter()
        under_way = (plan, outputs)
        if step >= warm_up:
            arrivals += len(fresh)
            parts = (added - started, scheduled - added, committed - before_commit)
            for name, seconds in zip(samples, (*parts, sum(parts)), strict=True):
                samples[name].append(seconds * 1e3)
    row: dict[str, float] = {"sequences": num_sequences, "turnover": round(arrivals / steps / num_sequences, 4)}
    for name, values in samples.items():
        row[f"{name}_p50_ms"] = round(statistics.median(values), 4)
        row[f"{name}_p99_ms"] = round(statistics.quantiles(values, n=100)[98], 4)
    return row


class InstantRank:
    """A types.Rank (and its own PendingOutput's maker) that answers at once and notes when it was called."""

    def __init__(self, rank_idx: int) -> None:
        self._rank_idx = rank_idx
        self._workload = Workload(rank_idx)
        self.called_s: list[float] = []

    def execute(self, plan: StepPlan) -> InstantOutput:
        self.called_s.append(time.perf_counter())
        return InstantOutput(self._workload.output(plan.ranks[self._rank_idx]))

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


class InstantOutput:
    """A types.PendingOutput that is there."""

    def __init__(self, output: RankOutput) -> None:
        self._output = output

    def wait(self, timeout_s: float) -> RankOutput:
        return self._output


class RefillingSink(NullSink):
    """Submits the next request when its own ends, so that the load stays constant until `stop` is set."""

    __slots__ = ("_engine", "_stop", "_workload")

    def __init__(self, engine: Engine, workload: Workload, stop: threading.Event) -> None:
        self._engine, self._workload, self._stop = engine, workload, stop

    def put(
        self, token_id: int, logprobs: TokenLogprobs | None = None, finish_reason: FinishReason | None = None
    ) -> None:
        if finish_reason is not None and not self._stop.is_set():
            self._engine.submit(self._workload.request(0.0), self)


def time_engine(num_sequences: int, steps: int) -> float:
    """Mean milliseconds of a step (single ones say nothing: a plan is launched while another is committed)."""
    ranks = [InstantRank(idx) for idx in range(NUM_RANKS)]
    engine = Engine(ranks, make_limits(num_sequences))
    engine.start()
    workload, stop, warm_up = Workload(), threading.Event(), 60
    for _ in range(num_sequences):
        engine.submit(workload.request(0.0), RefillingSink(engine, workload, stop))
    while len(ranks[0].called_s) <= warm_up + steps and engine.is_alive():
        time.sleep(0.1)
    stop.set()
    engine.drain(60.0)
    engine.close()
    return round((ranks[0].called_s[warm_up + steps] - ranks[0].called_s[warm_up]) / steps * 1e3, 4)


def measure(steps: int) -> dict[str, object]:
    """The benchmark's result, as it stands in the baseline under "P8"."""
    rows = [{**time_scheduler(size, steps), "engine_mean_ms": time_engine(size, steps)} for size in SIZES]
    return {
        "name": "P8",
        "goal": f"<= {GOAL_MS:g} ms p50",
        "value": rows[-1]["total_p50_ms"],
        "unit": "ms",
        "commit": commit_id(),
        "machine": machine(),
        "method": f"perf/bench_control_plane.py, p50 of {steps} steps after 60, total at {SIZES[-1]} sequences",
        "rows": rows,
    }


def print_table(rows: list[dict[str, float]]) -> None:
    columns = ("schedule", "commit", "add", "total")
    print("sequences  turnover  " + "  ".join(f"{name + ' p50/p99 ms':>19}" for name in columns) + "  engine mean ms")
    for row in rows:
        cells = [f"{row[f'{name}_p50_ms']:9.3f} {row[f'{name}_p99_ms']:9.3f}" for name in columns]
        print(
            f"{row['sequences']:9.0f}  {row['turnover']:8.1%}  " + "  ".join(cells) + f"{row['engine_mean_ms']:16.3f}"
        )


def compare(result: dict[str, object], baseline: dict[str, object]) -> list[str]:
    """A line for each p50 that is more than 5 % worse than the baseline's."""
    old_rows = {row["sequences"]: row for row in baseline["rows"]}  # type: ignore[attr-defined]
    worse = []
    for row in result["rows"]:  # type: ignore[attr-defined]
        for name in ("schedule_p50_ms", "commit_p50_ms", "total_p50_ms"):
            old = old_rows.get(row["sequences"], {}).get(name)
            if old is not None and row[name] > WORSE * old:
                worse.append(f"{row['sequences']} sequences, {name}: {row[name]} was {old}")
    return worse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--baseline", type=Path, help="JSON file whose P8 entry is compared with (or written: --save)")
    parser.add_argument("--check", action="store_true", help="exit 1 when a p50 is > 5 %% worse than the baseline")
    parser.add_argument("--save", action="store_true", help="write this result into the baseline file")
    options = parser.parse_args()
    if (options.check or options.save) and options.baseline is None:
        parser.error("--check and --save need --baseline FILE")
    result = measure(options.steps)
    print_table(result["rows"])  # type: ignore[arg-type]
    status = 0
    known = json.loads(options.baseline.read_text()) if options.baseline and options.baseline.exists() else {}
    if "P8" in known and not options.save:
        worse = compare(result, known["P8"])
        print("\n".join(worse) if worse else "no p50 is more than 5 % worse than the baseline")
        if worse:
            print("(on a shared or throttling machine 5 % is within the noise: run it again before believing it)")
        status = int(options.check and bool(worse))
    elif options.check:
        print(f"{options.baseline} holds no P8 to check against: write one with --save")
        status = 1
    if options.save:
        save_lines(options.baseline, {"P8": result})
    print(json.dumps(result))
    return status


if __name__ == "__main__":
    sys.exit(main())
