"""P5: the expert exchange between two GPUs at the message sizes of a group of eight, and the same in loopback.

    python -m perf.bench_rdep [--commit HASH] [--tokens 1 32 256 ...] [--output FILE] [--save]

Each of the two GPUs plays rank 0 of eight. What rank 0 sends to ranks 1 to 7 goes to the one real peer, each copy to
the slots of the rank that it stands for, so both links carry, in both directions at once, exactly the rows of a
balanced rank of eight: 7 of 8 copies leave the GPU, 1 stays. The peer's experts are those of all the ranks that it
stands for, and its results come back into the slots of those ranks. A barrier raises 7 flags there and one here. In a
node of eight a GPU's links end in a switch, so seven peers share the bandwidth that one has here; what waiting for the
slowest of eight costs is not in these figures.

Loopback is the same with the GPU as its own peer: what the decode and prefill benchmarks run. In a step the shared
expert's GEMMs run while rows travel (layers/hopper_exchange.py); `moe` is a layer with them, launched as there. What it
takes longer between two GPUs than in loopback is the correction that perf/nvlink.py adds to their steps for each MoE
layer.

Routing: `random` logits through the router (3.97 ranks a token: what random weights give, and so the other
benchmarks); `spread`: eight of the 128 experts of four groups, any with the same chance (3.6). Rows are fp8 with 56
scales, results bf16; expert rows lie sorted by expert, as the GEMMs leave them.

Timing: graphs of n and of 2 n calls a GPU, each replayed by a thread a GPU at the same time; the difference of their
medians / n, where n calls take half a millisecond or n is 10; the slower GPU counts. (A graph of few short calls is
over before the host has launched the next one: what it takes is the host's time.) `layer`: dispatch, barrier,
give_back, barrier, combine. GB/s: bytes that leave a GPU / time. `copy`: Tensor.copy_ of as many bytes to the peer,
both directions at once; below 1,024 tokens it is the host that is timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from nmoe_backend import environ
from nmoe_backend.kernels.block_fp8_gemm_sm90 import block_fp8_gemm
from nmoe_backend.kernels.rdep_gpu import (
    RdepLayout,
    RdepPeers,
    rdep_barrier,
    rdep_combine,
    rdep_dispatch,
    rdep_give_back,
)
from nmoe_backend.kernels.router import router_reference
from nmoe_backend.kernels.swiglu_rows_gpu import swiglu_rows
from nmoe_backend.layers.hopper_ops import SPARE_SMS
from nmoe_backend.parallel.ranks import RankContext, RankGroup
from nmoe_backend.runtime.graphs import capture
from perf import results

TOKENS = (1, 32, 256, 1024, 4096, 8192)
WORLD, HIDDEN, TOP_K, LOCAL, GROUPS, TOPK_GROUPS = 8, 7168, 8, 32, 8, 4
SHARED_SIZE, BLOCK = 2048, 128
BUDGET_S = 0.15  # of replays of one graph
FEWEST_CALLS, LONG_US = 10, 500.0
MAX_SPINS = 40_000_000  # ten seconds
GOAL_TOKENS, COPY_TOKENS = 256, 4096


def choose(routing: str, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Expert ids [T, K] int32 and weights [T, K] fp32 on the CPU."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, WORLD * LOCAL, generator=g)
    if routing == "spread":
        group = torch.rand(tokens, GROUPS, generator=g).argsort(-1)[:, :TOPK_GROUPS]
        expert = torch.rand(tokens, TOPK_GROUPS * LOCAL, generator=g).argsort(-1)[:, :TOP_K]
        ids = group.gather(1, expert // LOCAL) * LOCAL + expert % LOCAL
        return ids.to(torch.int32), logits[:, :TOP_K].softmax(-1)
    ids, weights = router_reference(logits, torch.zeros(WORLD * LOCAL), TOP_K, GROUPS, TOPK_GROUPS, True, 1.0)
    return ids.to(torch.int32), weights


class SharedExpert:
    """Its two GEMMs, each of which leaves SMs to the next kernel and lets it start, and what lies between them."""

    def __init__(self, device: torch.device, tokens: int) -> None:
        def fp8(rows: int, columns: int) -> tuple[Tensor, Tensor]:
            values = torch.randn(rows, columns, device=device).to(torch.float8_e4m3fn)
            return values, torch.rand(rows // BLOCK, columns // BLOCK, device=device)

        self._w13, self._w2 = fp8(2 * SHARED_SIZE, HIDDEN), fp8(HIDDEN, SHARED_SIZE)
        self._x = torch.randn(tokens, HIDDEN, device=device).to(torch.float8_e4m3fn), self._scales(HIDDEN, tokens)
        self._h = torch.empty(tokens, SHARED_SIZE, dtype=torch.float8_e4m3fn, device=device)
        self._h_scales = self._scales(SHARED_SIZE, tokens)
        self._gate_up = torch.empty(tokens, 2 * SHARED_SIZE, dtype=torch.bfloat16, device=device)
        self.out = torch.empty(tokens, HIDDEN, dtype=torch.bfloat16, device=device)
        self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count

    def _scales(self, size: int, tokens: int) -> Tensor:
        return torch.rand(size // BLOCK, -(-tokens // 16) * 16, device=self._w13[0].device)[:, :tokens]

    def up(self) -> None:
        block_fp8_gemm(*self._x, *self._w13, self._gate_up, self._num_sms, SPARE_SMS)

    def down(self) -> None:
        swiglu_rows(self._gate_up, self._h, self._h_scales)
        block_fp8_gemm(self._h, self._h_scales, *self._w2, self.out, self._num_sms, SPARE_SMS)


class Transport:
    """One GPU's end: arena, inputs and the operations. Used by its thread, inside `activate`."""

    def __init__(self, context: RankContext, routing: str, tokens: int) -> None:
        device = context.device
        self.context, self.tokens = context, tokens
        self._layout = RdepLayout(
            world_size=WORLD, max_tokens=tokens, hidden_size=HIDDEN, top_k=TOP_K, num_local=LOCAL,
            row_dtype=torch.float8_e4m3fn, scales_per_row=HIDDEN // 128, return_dtype=torch.bfloat16,
        )  # fmt: skip
        self.arena = torch.zeros(self._layout.offsets()["end"], dtype=torch.uint8, device=device)
        self._received = self._layout.views(self.arena)
        self._received["ids"].fill_(-1)
        ids, self._weights = (value.to(device) for value in choose(routing, tokens, context.rank))
        self._ids, self.visits = ids, int(sum(len(set(row)) for row in (ids // LOCAL).tolist()))
        self.visits_away = int(sum(len(set(row) - {0}) for row in (ids // LOCAL).tolist()))
        x = torch.randn(tokens, HIDDEN, device=device)
        self._x, self._scales = x.to(torch.float8_e4m3fn), torch.rand(HIDDEN // 128, tokens, device=device).t()
        self.out = torch.empty(tokens, HIDDEN, dtype=torch.bfloat16, device=device)
        self.shared = SharedExpert(device, tokens)
        self._num_tokens = torch.tensor([tokens], dtype=torch.int32, device=device)
        context.publish("bench", self)

    def connect(self) -> None:
        """Everybody's arena is there: rank 0 of eight is this GPU, all others are the peer (or this one, alone)."""
        everybody = self.context.peers("bench")
        peer = everybody[1 - self.context.rank] if len(everybody) > 1 else self
        self.peer_arena = peer.arena
        peer.arena[:1].copy_(self.arena[:1])  # switches peer access on
        addresses = [self.arena.data_ptr(), *[peer.arena.data_ptr()] * (WORLD - 1)]
        self._peers = RdepPeers(
            layout=self._layout,
            arenas=torch.tensor(addresses, device=self.arena.device),
            slots=torch.arange(WORLD, dtype=torch.int32, device=self.arena.device),
            own=self.arena,
        )

    def prepare_rows(self) -> None:
        """Behind a dispatch of all: the rows of this GPU's experts, as the GEMMs leave them."""
        ids = self._received["ids"].flatten()
        order = torch.where(ids >= 0, ids, LOCAL).argsort(stable=True)
        count = int((ids >= 0).sum())
        index = torch.full_like(ids, -1)
        index[order[:count]] = torch.arange(count, dtype=torch.int32, device=ids.device)
        self._row_idx = index.view(self._received["ids"].shape)
        self._rows = torch.randn(count, HIDDEN, dtype=torch.bfloat16, device=ids.device)

    def dispatch(self, *, beside: bool = False) -> None:
        rdep_dispatch(self._peers, self._x, self._scales, self._ids, self._weights, self._num_tokens, beside=beside)

    def give_back(self, *, beside: bool = False) -> None:
        rdep_give_back(self._peers, self._rows, self._row_idx, self.tokens, beside=beside)

    def combine(self) -> None:
        rdep_combine(self._peers, self._ids, self._num_tokens, self.shared.out, self.out)

    def barrier(self) -> None:
        rdep_barrier(self._peers, MAX_SPINS)

    def layer(self) -> None:
        self.dispatch()
        self.barrier()
        self.give_back()
        self.barrier()
        self.combine()

    def moe(self) -> None:
        self.shared.up()
        self.dispatch(beside=True)
        self.barrier()
        self.shared.down()
        self.give_back(beside=True)
        self.barrier()
        self.combine()

    @property
    def sent_bytes(self) -> dict[str, int]:
        """Of a call, that leave the GPU in a group of eight."""
        there = HIDDEN + 4 * (HIDDEN // 128) + 8 * TOP_K
        return {"dispatch": self.visits_away * there, "give_back": self.visits_away * 2 * HIDDEN}


class Group:
    """Two GPUs, or one in loopback; a thread each."""

    def __init__(self, devices: Sequence[str], routing: str, tokens: int) -> None:
        self._contexts = RankGroup.create(len(devices), devices, 60.0)
        self._threads = ThreadPoolExecutor(len(devices))
        self.ends: list[Transport] = self.all(lambda context: Transport(context, routing, tokens))
        self.each(Transport.connect)
        self.each(Transport.dispatch)
        self.each(Transport.prepare_rows)
        self.each(Transport.give_back)
        self.each(Transport.combine)

    def all(self, run: Callable[[RankContext], Any]) -> list[Any]:
        """At the same time; each device is idle at the end."""

        def one(context: RankContext) -> Any:
            with context.activate():
                result = run(context)
                torch.cuda.synchronize(context.device)
                return result

        return list(self._threads.map(one, self._contexts))

    def each(self, run: Callable[[Transport], Any]) -> list[Any]:
        return self.all(lambda context: run(self.ends[context.rank]))

    def time_us(self, operation: Callable[[Transport], None]) -> float:
        """Of one call: a graph of twice as many less one of so many that the host's launch of it does not count."""
        many = max(FEWEST_CALLS, round(FEWEST_CALLS * LONG_US / self._graph_us(operation, FEWEST_CALLS)))
        return (self._graph_us(operation, 2 * many) - self._graph_us(operation, many)) / many

    def _graph_us(self, operation: Callable[[Transport], None], calls: int) -> float:
        """Of a replay, behind a barrier that lets the GPUs begin together; the slower GPU's median."""

        def run(end: Transport) -> None:
            end.barrier()
            for _ in range(calls):
                operation(end)

        graphs = self.each(lambda end: capture(end.context, lambda: run(end))[0])
        first = max(self._replay(graphs, 3))
        return max(self._replay(graphs, max(5, min(50, round(BUDGET_S * 1e6 / first)))))

    def _replay(self, graphs: Sequence[torch.cuda.CUDAGraph], replays: int) -> list[float]:
        """Median microseconds of a replay, by GPU."""

        def run(end: Transport) -> float:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
            events[0].record()
            for event in events[1:]:
                graphs[end.context.rank].replay()
                event.record()
            torch.cuda.synchronize(end.context.device)
            times = [1e3 * a.elapsed_time(b) for a, b in itertools.pairwise(events)]
            return statistics.median(times[1:])

        return self.each(run)

    def copy_us(self, num_bytes: int, repeats: int = 20) -> float:
        """Of a copy_ to the peer, both directions at once."""

        def run(end: Transport) -> float:
            source, target = end.arena[:num_bytes], end.peer_arena[:num_bytes]
            target.copy_(source)
            end.context.meet()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            for _ in range(repeats):
                target.copy_(source)
            events[1].record()
            torch.cuda.synchronize(end.context.device)
            return 1e3 * events[0].elapsed_time(events[1]) / repeats

        return max(self.each(run))

    def close(self) -> None:
        self._threads.shutdown()


def measure(devices: Sequence[str], routing: str, tokens: int) -> dict[str, Any]:
    """Microseconds of each operation, and what it sends."""
    group = Group(devices, routing, tokens)
    operations = [
        Transport.dispatch, Transport.give_back, Transport.combine, Transport.barrier, Transport.layer, Transport.moe,
    ]  # fmt: skip
    found: dict[str, Any] = {f"{op.__name__}_us": group.time_us(op) for op in operations}
    sent = group.ends[0].sent_bytes
    found["visits"] = group.ends[0].visits / tokens
    if len(devices) > 1:
        for name, num_bytes in sent.items():
            found[f"{name}_gb_s"] = num_bytes / found[f"{name}_us"] / 1e3
        both = sum(sent.values())
        found["moved_bytes"] = both
        found["moved_gb_s"] = both / (found["dispatch_us"] + found["give_back_us"]) / 1e3
        found["copy_gb_s"] = both / group.copy_us(both) / 1e3
    errors = [int(end._received["error"]) for end in group.ends]
    group.close()
    if any(errors):
        raise SystemExit(f"error words {errors}: a barrier gave up")
    return found


def report(entry: dict[str, Any]) -> None:
    """One line for two GPUs, one for loopback."""
    for place in ("two_gpus", "loopback"):
        found = entry[place]
        line = f"{entry['routing']:7s} {entry['tokens']:5d} {place:9s}"
        for name in ("dispatch", "give_back", "combine", "barrier", "layer", "moe"):
            line += f" {found[f'{name}_us']:9.1f}"
        if place == "two_gpus":
            line += f" {found['dispatch_gb_s']:8.0f} {found['give_back_gb_s']:8.0f} {found['moved_gb_s']:8.0f}"
            line += f" {found['copy_gb_s']:8.0f}"
        print(line, flush=True)


def goal_lines(entries: Sequence[dict[str, Any]], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """P5, and what perf/nvlink.py reads."""
    random = {entry["tokens"]: entry for entry in entries if entry["routing"] == "random"}
    if not {GOAL_TOKENS, COPY_TOKENS} <= random.keys():
        return {}
    goal, copied = random[GOAL_TOKENS]["two_gpus"], random[COPY_TOKENS]["two_gpus"]
    line = results.goal_line(
        round(goal["layer_us"], 1),
        "us",
        "<= 60 us a layer at 256 tokens a GPU, a barrier <= 3 us, >= 85 % of copy bandwidth at 4,096",
        args,
        raw=round(goal["layer_us"], 1),
        method=f"perf/bench_rdep.py: two GPUs, each as rank 0 of eight, {goal['visits']:.2f} ranks a token; "
        "moe_us: with the shared expert, launched as in a step, which corrects P1 to P3; "
        "layer_us_spread: 3.6 ranks a token, between two GPUs",
    )
    line |= {
        "barrier_us": round(goal["barrier_us"], 2),
        "share_of_copy": round(copied["moved_gb_s"] / copied["copy_gb_s"], 3),
        **{
            name: {
                str(tokens): {place: round(entry[place][name], 1) for place in ("two_gpus", "loopback")}
                for tokens, entry in sorted(random.items())
            }
            for name in ("layer_us", "moe_us")
        },
        "layer_us_spread": {
            str(entry["tokens"]): round(entry["two_gpus"]["layer_us"], 1)
            for entry in entries
            if entry["routing"] == "spread"
        },
    }
    return {"P5": line}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line a place and size, writes the document as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="tokens a GPU")
    parser.add_argument("--routing", nargs="+", choices=("random", "spread"), default=["random", "spread"])
    results.add_arguments(parser)
    args = results.parse(parser, argv)
    for name, value in environ.cuda_settings().items():
        environ.export(name, value)  # before CUDA starts
    results.require_gpu(2)
    entries: list[dict[str, Any]] = []
    names = ("dispatch", "give_back", "combine", "barrier", "layer us", "moe us", "GB/s", "GB/s", "moved", "copy")
    print(f"{'':23s}" + "".join(f" {name:>9s}" for name in names))
    for tokens in args.tokens:
        for routing in args.routing:
            began_s = time.monotonic()
            two, one = (measure(devices, routing, tokens) for devices in (["cuda:0", "cuda:1"], ["cuda:0"]))
            entry = {"tokens": tokens, "routing": routing, "two_gpus": two, "loopback": one}
            entry |= {"correction_us": two["moe_us"] - one["moe_us"], "took_s": time.monotonic() - began_s}
            entries.append(entry)
            report(entry)
            lines = goal_lines(entries, args)
            results.write(results.document("rdep", args, method=__doc__ or "", results=entries, goals=lines), args)
    print(json.dumps(goal_lines(entries, args)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
