"""P3 and P7: prefill steps of one rank of eight in loopback, DeepSeek-V3 at full size, through the production worker.

    python -m perf.bench_prefill --commit HASH [--parts goals decode long] [--output FILE] [--save]

The worker is that of bench_lmsys_decode.py, with the same buffers from the same TOML; `long` has one of its own, with
room for 131,072 tokens of one sequence. A step is one graph replay from static buffers, then the sampler, and is
launched while the one before runs.

parts      goals: prompts of --prompt tokens, one behind the other, fill steps of exactly --tokens tokens, as the
           scheduler fills them: a prompt that does not fit goes on in the next step (of 6,000 tokens are three whole
           ones). decode: 64 rows at 2,000, for P7. long: one sequence of 131,072 tokens, chunk by chunk, each timed by
           itself (--chunks: only these).
raw        prefill tokens / wall time of a step.
corrected  as in bench_lmsys_decode.py: with NVLink put back, as P5 measured it or at --nvlink GB/s. Projected.
idle       share of the time in which the GPU waits for the host between steps, an upper bound (step_clock.py).
breakdown  kernel times of a step, from the profiler (CUPTI), summed by operation.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from nmoe_backend.config import ServeConfig
from nmoe_backend.runtime.worker import Worker
from nmoe_backend.step_buckets import Bucket
from nmoe_backend.types import KEY_BLOCK, PendingOutput, RankPlan, SamplingParams, SlotInit, StepPlan
from perf import results
from perf.bench_lmsys_decode import breakdown, built, measure, rates
from perf.device_trace import trace
from perf.step_clock import clocked_workers

PARTS = ("goals", "decode", "long")
LONG, LONG_CHUNK = 131072, 8192
LONG_ROOM = {"max_batch_size": 64, "max_prefill_tokens": 8192, "max_seq_len": LONG, "num_pages": 2176}
GOAL_TOKENS_S = 10000.0
WARM_STEPS, TRACED_STEPS = 3, 3
DECODE_ROWS, DECODE_CONTEXT = 64, 2000
WAIT_S = 60.0


class Prompts:
    """Prompts that follow each other through the slots of one worker, driven by hand-written plans."""

    def __init__(self, worker: Worker, config: ServeConfig, length: int) -> None:
        self.worker, self._length, self._step_id = worker, length, 0
        self._page_size, per_slot = config.kv_layout.page_size, -(-length // config.kv_layout.page_size)
        generator = torch.Generator().manual_seed(0)
        self._num_slots = min(config.max_batch_size, config.num_pages // per_slot)
        pages = torch.randperm(config.num_pages, generator=generator)[: self._num_slots * per_slot]
        self._pages = pages.view(self._num_slots, per_slot).tolist()
        self._prompt = torch.randint(100, 100_000, (length,), generator=generator).tolist()
        self._slot, self._start = 0, 0  # where the next step goes on

    def plan(self, tokens: int) -> StepPlan:
        """The next tokens."""
        rows, admitted, new_pages, left = [], [], [], tokens
        while left:
            slot, start = self._slot, self._start
            length = min(left, self._length - start)
            rows.append((slot, start, length))
            if start == 0:
                sampling = SamplingParams(temperature=0.0, ignore_eos=True, seed=slot)
                admitted.append(SlotInit(slot=slot, sampling=sampling, prompt_ids=tuple(self._prompt)))
            first, end = -(-start // self._page_size), -(-(start + length) // self._page_size)
            new_pages += [(slot, index, self._pages[slot][index]) for index in range(first, end)]
            left -= length
            ends = start + length == self._length
            self._slot, self._start = ((slot + 1) % self._num_slots, 0) if ends else (slot, start + length)
        plan = RankPlan(
            slots=[slot for slot, _, _ in rows],
            starts=[start for _, start, _ in rows],
            lengths=[length for _, _, length in rows],
            token_ids=[token for _, start, length in rows for token in self._prompt[start : start + length]],
            samples=[start + length == self._length for _, start, length in rows],
            new_pages=new_pages,
            admitted=admitted,
        )
        self._step_id += 1
        return StepPlan(step_id=self._step_id, ranks=(plan,))

    def run(self, tokens: int, steps: int) -> float:
        """Seconds a step, each launched while the one before runs."""
        began, before = time.perf_counter(), None
        for _ in range(steps):
            launched = self.worker.execute(self.plan(tokens))
            if before is not None:
                _finish(before)
            before = launched
        _finish(before)
        return (time.perf_counter() - began) / steps


def _finish(step: PendingOutput | None) -> None:
    output = step.wait(WAIT_S) if step is not None else None
    if output is not None and output.error_word:
        raise SystemExit(f"error word {output.error_word:#x}: a barrier gave up")


def prefill_entry(worker: Worker, config: ServeConfig, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """Steps of so many tokens."""
    prompts = Prompts(worker, config, args.prompt)
    prompts.run(tokens, WARM_STEPS)
    with clocked_workers() as clock:
        step_s = prompts.run(tokens, args.steps)
    entry = {"tokens": tokens, "prompt": args.prompt} | rates(worker, tokens, step_s, args.nvlink)
    entry["idle_share"] = clock.idle_share()
    traced = trace(lambda: prompts.run(tokens, TRACED_STEPS))
    entry["operations_us"], entry["kernels_us"] = breakdown(traced, TRACED_STEPS)
    return entry


def long_entry(worker: Worker, config: ServeConfig, chunks: Sequence[int]) -> dict[str, Any]:
    """One sequence of 131,072 tokens; where chunks are left out, their latents are the random ones of the cache."""
    prompts = Prompts(worker, config, LONG)
    seconds = {}
    for chunk in range(LONG // LONG_CHUNK):
        plan = prompts.plan(LONG_CHUNK)
        if chunk not in chunks and chunk:  # the first one admits the sequence
            with worker._context.activate():
                worker._state.fill(plan, 0)  # its pages
            continue
        torch.cuda.synchronize()
        began = time.perf_counter()
        _finish(worker.execute(plan))
        seconds[chunk] = time.perf_counter() - began
    return {"tokens": LONG_CHUNK, "sequence": LONG, "chunk_s": seconds, "all_s": sum(seconds.values())}


def run_parts(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Entries as they are measured."""
    config = ServeConfig.from_toml(results.P1_CONFIG)
    buckets = [Bucket(tokens, max(8192, 2 * tokens), 0) for tokens in args.tokens] if "goals" in args.parts else []
    if "decode" in args.parts:
        buckets.append(Bucket(0, 0, DECODE_ROWS))
    if buckets:
        with built(config, buckets) as worker:
            for tokens in args.tokens if "goals" in args.parts else ():
                found = prefill_entry(worker, config, tokens, args)
                yield {"part": "goals"} | found | {"memory_gb": results.memory_gb(config)}
            if "decode" in args.parts:
                found = measure(worker, config, DECODE_ROWS, DECODE_CONTEXT, args, in_detail=True)
                yield {"part": "decode"} | found | {"memory_gb": results.memory_gb(config)}
    if "long" in args.parts:
        config = ServeConfig.from_toml(results.P1_CONFIG, LONG_ROOM)
        keys = LONG + config.max_batch_size * KEY_BLOCK
        with built(config, [Bucket(LONG_CHUNK, keys, config.max_batch_size)]) as worker:
            yield {"part": "long"} | long_entry(worker, config, args.chunks) | {"memory_gb": results.memory_gb(config)}


def report(entry: dict[str, Any]) -> None:
    """One entry."""
    if entry["part"] == "long":
        chunks = ", ".join(f"{chunk}: {seconds:.2f}" for chunk, seconds in entry["chunk_s"].items())
        print(f"one sequence of {LONG} tokens: {entry['all_s']:.1f} s; by chunk of {LONG_CHUNK}: {chunks}", flush=True)
        return
    size = f"{entry['rows']} decode rows" if entry["part"] == "decode" else f"{entry['tokens']} tokens"
    print(
        f"{size}: step {entry['step_ms']:.2f} ms = {entry['raw_tok_s_gpu']:.0f} tok/s/GPU raw, "
        f"{entry['corrected_tok_s_gpu']:.0f} corrected (projected); a token visits {entry['ranks_a_token_visits']:.2f} "
        f"ranks; idle {entry['idle_share']:.2%}; GB {entry['memory_gb']}"
    )
    total = sum(one["us"] for one in entry["operations_us"].values())
    for name, one in sorted(entry["operations_us"].items(), key=lambda item: -item[1]["us"]):
        print(f"  {name:38s} {one['launches']:7.0f} launches {one['us'] / 1e3:8.3f} ms {one['us'] / total:6.1%}")
    print(f"  {'sum of kernels':38s} {'':16s} {total / 1e3:8.3f} ms", flush=True)


def goal_lines(entries: Sequence[dict[str, Any]], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """P3: the best of the step sizes. P7: the worst of prefill and decode. The last chunk of the long sequence. Each
    where it was measured."""
    prefill = [entry for entry in entries if entry["part"] == "goals"]
    decode = [entry for entry in entries if entry["part"] == "decode"]
    lines = {}
    nvlink = "as P5 measured it" if args.nvlink is None else f"from {args.nvlink:g} GB/s"
    if prefill:
        best = max(prefill, key=lambda entry: entry["corrected_tok_s_gpu"])
        lines["P3"] = results.goal_line(
            round(best["corrected_tok_s_gpu"]),
            "tokens/s/GPU, projected",
            GOAL_TOKENS_S,
            args,
            raw=round(best["raw_tok_s_gpu"]),
            method=f"perf/bench_prefill.py, {args.steps} steps of {best['tokens']} tokens, prompts of {args.prompt}: "
            f"one GPU in loopback, NVLink {nvlink}",
        )
    if prefill and decode:
        worst = max(entry["idle_share"] for entry in (*prefill, *decode))
        sizes = " and ".join(f"{entry['tokens']:,}" for entry in prefill)
        lines["P7"] = results.goal_line(
            round(100 * worst, 2),
            "% idle",
            "<= 3",
            args,
            method=f"perf/bench_prefill.py: the worst of steps of {sizes} prefill tokens and of {DECODE_ROWS} decode "
            f"rows at {DECODE_CONTEXT:,}; waits for a launch, an upper bound (perf/step_clock.py)",
        )
    for seconds in (entry["chunk_s"] for entry in entries if entry["part"] == "long"):
        last = LONG // LONG_CHUNK - 1
        if last in seconds:
            lines["prefill_131072"] = results.goal_line(
                round(seconds[last], 2), "s", "none", args, method="perf/bench_prefill.py, long: one sequence of "
                f"{LONG:,} tokens in chunks of {LONG_CHUNK:,}, the last of chunks {', '.join(map(str, seconds))}",
            )  # fmt: skip
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Prints each entry and writes the document as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["goals", "decode"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 6000])
    parser.add_argument("--prompt", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--chunks", type=int, nargs="+", default=list(range(LONG // LONG_CHUNK)))
    parser.add_argument("--nvlink", type=float, help="GB/s between two GPUs, instead of what was measured")
    results.add_arguments(parser)
    args = results.parse(parser, argv)
    results.require_gpu()
    return results.write_all("prefill", args, __doc__ or "", run_parts(args), report, goal_lines)


if __name__ == "__main__":
    sys.exit(main())
