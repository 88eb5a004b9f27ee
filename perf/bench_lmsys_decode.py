"""P1 and P2: decode steps of one rank of eight in loopback, DeepSeek-V3 at full size, through the production worker.

    python -m perf.bench_lmsys_decode --commit HASH [--parts goals deterministic batch context skew] [--output FILE]

Random fp8 weights of all 61 layers (load_format = "dummy"), 32 local experts, a KV cache of random latents; sequences
decode --steps tokens each around a context, greedy, one step launched while the one before runs, as the engine does. A
step is one graph replay from static buffers, then the sampler.

parts      goals: --rows at --context, with a breakdown. deterministic: the same with `deterministic = true`, the
           product's default, against the TOML. batch: 1 ... 256 rows at --context. context: 1k ... 128k, with as many
           rows, a power of two up to 64, as 8,256 pages hold. skew: --rows with a bias that makes every token choose
           the first expert of each rank that it visits, so that one local expert has half of all rows.
raw        rows / wall time of a step.
corrected  raw with NVLink put back, for loopback moves the exchange's bytes at HBM speed: what bench_rdep.py measured
           between two GPUs (nvlink.py) or, with --nvlink, each layer's bytes that would leave the GPU at so many GB/s
           less their time in HBM. Projected, as are all figures of eight GPUs.
idle       share of the time in which the GPU waits for the host between steps, an upper bound (step_clock.py).
breakdown  what each kernel adds to a step, from the profiler (CUPTI), summed by operation: device_trace.py.
memory_gb  of the GPU while the worker lives (device), of it held by torch, and the sum that the doctor prints (budget).
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from nmoe_backend import models, warmup
from nmoe_backend.config import ServeConfig
from nmoe_backend.runtime.worker import Worker
from nmoe_backend.step_buckets import Bucket
from nmoe_backend.types import RankPlan, SamplingParams, SlotInit, StepPlan
from perf import results
from perf.device_trace import trace
from perf.nvlink import nvlink_correction
from perf.step_clock import clocked_workers

LONG_CONTEXTS = {"max_batch_size": 64, "max_prefill_tokens": 256, "max_seq_len": 131200, "num_pages": 8256}
GOALS = {  # part and rows -> name, goal, GPUs that the line counts
    ("goals", 256): ("P1", 4500.0, 1),
    ("goals", 32): ("P2", 8000.0, 8),
    ("deterministic", 256): ("P1_deterministic", 4500.0, 1),
    ("deterministic", 32): ("P2_deterministic", 8000.0, 8),
}
PARTS = ("goals", "batch", "skew", "deterministic", "context")  # in the order in which they run
IN_DETAIL = ("goals", "deterministic", "skew")  # --steps steps and a breakdown; of the others a few steps
BATCH_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256)
CONTEXTS = tuple(1024 << power for power in range(8))
SWEEP_STEPS = 30
HBM_BYTES_S = 4.2e12
WARM_STEPS = 10
TRACED_STEPS = 4
# First match wins: part of a kernel's name -> operation.
OPERATIONS = (
    ("mla_decode", "attention"),
    ("_merge_kernel", "attention"),  # of pieces of contexts
    ("_attend_kernel", "attention"),
    ("_expand_keys_kernel", "keys expanded"),
    ("_gather_keys_kernel", "keys gathered"),
    ("_combine_kernel", "combine"),
    ("_absorb_kernel", "absorb products"),
    ("_expand_kernel", "absorb products"),
    ("_gemm_kernel", "dense fp8 GEMMs"),
    ("_expert_kernel", "expert GEMMs"),
    ("_rms_norm", "norms"),
    ("_rope_cache", "rope + cache write"),
    ("_swiglu", "swiglu + quantise"),
    ("_logits_kernel", "router"),
    ("_router", "router"),
    ("_dispatch", "dispatch"),
    ("_barrier", "barriers"),
    ("_count_kernel", "expert row index"),
    ("_place_kernel", "expert row index"),
    ("_gather_kernel", "gather rows"),
    ("_give_back", "give back"),
    ("_stats_kernel", "sampler"),
    ("_draw_kernel", "sampler"),
    ("_record_kernel", "sampler"),
    ("nvjet", "head"),
    ("gemm", "head"),
    ("cutlass", "head"),
)


class Decode:
    """Sequences that decode side by side on one worker, driven by hand-written plans."""

    def __init__(self, worker: Worker, config: ServeConfig, rows: int, start: int, end: int) -> None:
        """Positions [start, end)."""
        self.worker, self.rows, self._position, self._step_id = worker, rows, start, 0
        page_size = config.kv_layout.page_size
        per_row = -(-end // page_size)
        pages = torch.randperm(config.num_pages, generator=torch.Generator().manual_seed(0))
        self._page_size, self._pages = page_size, pages[: rows * per_row].view(rows, per_row).tolist()
        state, device = worker._state, worker._context.device
        with worker._context.activate():  # on the stream of the steps
            state.block_tables[:rows, :per_row] = torch.tensor(self._pages, dtype=torch.int32, device=device)
            state.last_tokens[:rows] = torch.arange(rows, device=device) * 101 + 7
        self._admitted = [
            SlotInit(slot=slot, sampling=SamplingParams(temperature=0.0, ignore_eos=True, seed=slot), prompt_ids=(1,))
            for slot in range(rows)
        ]

    def plan(self) -> StepPlan:
        """The next step; now and then a row enters a page that is announced with it."""
        at, rows = self._position, self.rows
        entered = at // self._page_size if at % self._page_size == 0 else None
        new_pages = [] if entered is None else [(row, entered, self._pages[row][entered]) for row in range(rows)]
        plan = RankPlan(
            slots=list(range(rows)),
            starts=[at] * rows,
            lengths=[1] * rows,
            num_decode=rows,
            samples=[True] * rows,
            new_pages=new_pages,
            admitted=self._admitted,
        )
        self._admitted, self._position, self._step_id = [], at + 1, self._step_id + 1
        return StepPlan(step_id=self._step_id, ranks=(plan,))

    def run(self, steps: int) -> tuple[float, list[int]]:
        """Seconds a step, and the last step's tokens."""
        began, before = time.perf_counter(), None
        for _ in range(steps):
            launched = self.worker.execute(self.plan())
            if before is not None:
                before.wait(60.0)
            before = launched
        output = before.wait(60.0)
        if output.error_word:
            raise SystemExit(f"error word {output.error_word:#x}: a barrier gave up")
        return (time.perf_counter() - began) / steps, list(output.token_ids)


Table = dict[str, dict[str, float]]  # name -> launches and us of a step


def breakdown(traced: Mapping[str, tuple[int, float]], steps: int) -> tuple[Table, Table]:
    """Operation -> launches and microseconds of a step, sampler included; and the same by kernel."""
    operations: dict[str, dict[str, float]] = defaultdict(lambda: {"launches": 0.0, "us": 0.0})
    kernels = {}
    for name, (count, total_us) in traced.items():
        operation = next((found for part, found in OPERATIONS if part in name), "other")
        operations[operation]["launches"] += count / steps
        operations[operation]["us"] += total_us / steps
        kernels[name[:80]] = {"launches": count / steps, "us": total_us / steps}
    return dict(operations), kernels


def moe_layers(worker: Worker) -> list[Any]:
    """The layers' MoE modules."""
    return [layer._ffn for layer in worker._model._layers if hasattr(layer._ffn, "_exchange")]


def exchange_bytes(worker: Worker, rows: int) -> tuple[float, float]:
    """Ranks that a token visits (of the last layer's choices), and the bytes a layer that would leave the GPU."""
    exchange = moe_layers(worker)[-1]._exchange
    layout = exchange.rdep.layout
    visited = (exchange.rdep.received["ids"][:, :rows] >= 0).any(-1).sum().item() / rows
    there = layout.hidden_size + 4 * layout.scales_per_row + 8 * layout.top_k
    back = layout.hidden_size * layout.return_dtype.itemsize
    away = visited * (layout.world_size - 1) / layout.world_size
    return visited, rows * away * (there + back)


@contextmanager
def hot_experts(worker: Worker) -> Iterator[None]:
    """Every token chooses the first expert of each rank that it visits: a bias of 1 puts it above all others."""
    layers = moe_layers(worker)
    first = [layer._router._bias[:: layer._exchange.rdep.layout.num_local] for layer in layers]
    with worker._context.activate():
        torch._foreach_add_(first, 1.0)
    yield
    with worker._context.activate():
        torch._foreach_add_(first, -1.0)


def rates(worker: Worker, tokens: int, step_s: float, nvlink_gb_s: float | None) -> dict[str, Any]:
    """What a step of so many tokens comes to, raw and corrected; it was the last one that ran."""
    visited, moved = exchange_bytes(worker, tokens)
    if nvlink_gb_s is None:
        layer_s = nvlink_correction(tokens)
    else:
        layer_s = moved * (1 / (nvlink_gb_s * 1e9) - 2 / HBM_BYTES_S)
    corrected_s = step_s + len(moe_layers(worker)) * layer_s
    return {
        "step_ms": step_s * 1e3,
        "corrected_step_ms": corrected_s * 1e3,
        "raw_tok_s_gpu": tokens / step_s,
        "corrected_tok_s_gpu": tokens / corrected_s,
        "ranks_a_token_visits": visited,
        "exchange_bytes_a_layer": moved,
    }


def measure(
    worker: Worker, config: ServeConfig, rows: int, context: int, args: argparse.Namespace, *, in_detail: bool
) -> dict[str, Any]:
    """One entry of the results."""
    steps = args.steps if in_detail else SWEEP_STEPS
    start = context - steps // 2 - WARM_STEPS
    decode = Decode(worker, config, rows, start, start + WARM_STEPS + steps + TRACED_STEPS)
    decode.run(WARM_STEPS)
    with clocked_workers() as clock:
        step_s, tokens = decode.run(steps)
    result = {"rows": rows, "context": context} | rates(worker, rows, step_s, args.nvlink)
    result |= {"distinct_tokens": len(set(tokens)), "idle_share": clock.idle_share()}
    if in_detail:
        traced = trace(lambda: decode.run(TRACED_STEPS))
        result["operations_us"], result["kernels_us"] = breakdown(traced, TRACED_STEPS)
    return result


@contextmanager
def built(config: ServeConfig, buckets: Sequence[Bucket]) -> Iterator[Worker]:
    """A loaded worker whose KV cache holds random latents; its memory is free again afterwards."""
    spec = models.load_spec(config.model_path)
    workers, _ = warmup.build_workers(config, config.replicas[0], spec, print, buckets)
    try:
        with workers[0]._context.activate():
            for layer in workers[0]._kv_cache.layers:
                layer.normal_()
        yield workers[0]
    finally:
        workers[0].close()
        workers.clear()
        gc.collect()
        torch.cuda.empty_cache()


def decode_steps(rows: Iterable[int]) -> list[Bucket]:
    """Only these are captured."""
    return [Bucket(tokens=0, keys=0, rows=size) for size in sorted(rows)]


def rows_at(context: int, config: ServeConfig) -> int:
    """The largest power of two of rows whose context, and a page to grow into, fits the pages."""
    pages = context // config.kv_layout.page_size + 1
    most = min(config.max_batch_size, config.num_pages // pages)
    return 1 << (most.bit_length() - 1)


def run_parts(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Entries as they are measured."""

    def entries(part: str, config: ServeConfig, worker: Worker, shapes: Iterable[tuple[int, int]]) -> Iterator[Any]:
        with hot_experts(worker) if part == "skew" else nullcontext():
            for rows, context in shapes:
                found = measure(worker, config, rows, context, args, in_detail=part in IN_DETAIL)
                yield {"part": part} | found | {"memory_gb": results.memory_gb(config)}

    short, wanted = ServeConfig.from_toml(results.P1_CONFIG), [part for part in PARTS if part in args.parts]
    at_context = [(rows, args.context) for rows in args.rows]
    sweep = [(rows, args.context) for rows in BATCH_ROWS]
    one_worker = [part for part in wanted if part in ("goals", "batch", "skew")]
    if one_worker:
        with built(short, decode_steps({*args.rows, *(BATCH_ROWS if "batch" in wanted else ())})) as worker:
            for part in one_worker:
                yield from entries(part, short, worker, sweep if part == "batch" else at_context)
    if "deterministic" in wanted:
        config = ServeConfig.from_toml(results.P1_CONFIG, {"deterministic": True})
        with built(config, decode_steps(args.rows)) as worker:
            yield from entries("deterministic", config, worker, at_context)
    if "context" in wanted:
        long = ServeConfig.from_toml(results.P1_CONFIG, LONG_CONTEXTS)
        shapes = [(rows_at(context, long), context) for context in CONTEXTS]
        with built(long, decode_steps({rows for rows, _ in shapes})) as worker:
            yield from entries("context", long, worker, shapes)


def report(result: dict[str, Any]) -> None:
    """One entry."""
    print(
        f"{result['part']:13s} {result['rows']:4d} sequences at {result['context']:6d}: "
        f"step {result['step_ms']:6.2f} ms = {result['raw_tok_s_gpu']:5.0f} tok/s/GPU raw, "
        f"{result['corrected_tok_s_gpu']:5.0f} corrected (projected); a token visits "
        f"{result['ranks_a_token_visits']:.2f} ranks; {result['distinct_tokens']} distinct tokens; "
        f"GB {result['memory_gb']}",
        flush=True,
    )
    if "operations_us" not in result:
        return
    total = sum(entry["us"] for entry in result["operations_us"].values())
    for name, entry in sorted(result["operations_us"].items(), key=lambda item: -item[1]["us"]):
        print(f"  {name:38s} {entry['launches']:7.0f} launches {entry['us'] / 1e3:8.3f} ms {entry['us'] / total:6.1%}")
    print(f"  {'sum of kernels':38s} {'':16s} {total / 1e3:8.3f} ms; idle {result['idle_share']:.2%}", flush=True)


def goal_lines(entries: Sequence[dict[str, Any]], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """P1 and P2, and both with deterministic sums, where they were measured."""
    lines = {}
    nvlink = "as P5 measured it" if args.nvlink is None else f"from {args.nvlink:g} GB/s"
    for entry in entries:
        if (entry["part"], entry["rows"]) not in GOALS:
            continue
        name, goal, gpus = GOALS[entry["part"], entry["rows"]]
        lines[name] = results.goal_line(
            round(entry["corrected_tok_s_gpu"] * gpus),
            "tokens/s/GPU, projected" if gpus == 1 else "tokens/s/node, projected",
            goal,
            args,
            raw=round(entry["raw_tok_s_gpu"] * gpus),
            method=f"perf/bench_lmsys_decode.py, {entry['part']}, {args.steps} steps: one GPU in loopback, NVLink "
            f"{nvlink}; greedy, ctx {args.context}",
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Prints each entry and writes the document as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["goals"])
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 32])
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--nvlink", type=float, help="GB/s between two GPUs, instead of what was measured")
    results.add_arguments(parser)
    args = results.parse(parser, argv)
    results.require_gpu()
    return results.write_all("lmsys_decode", args, __doc__ or "", run_parts(args), report, goal_lines)


if __name__ == "__main__":
    sys.exit(main())
