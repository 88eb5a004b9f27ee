"""The transport between GPUs that run at the same time: each rank's step is one graph, replayed by its own thread. All
GPUs that are there take part, two at least.

Reference: all experts in one place, in plain torch on the CPU. Values are small multiples of powers of two, so that
every sum is exact whatever its order, and rows travel as fp8 with scales and come back as bf16 without a rounding:
results are compared bit for bit. A step takes the next of eight inputs by a counter on the device; between them the
ranks are full, ragged and empty, and all tokens go to one rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from nmoe_backend.parallel.ranks import RankContext, RankGroup
from nmoe_backend.runtime.graphs import capture
from tests.kernels.rdep_ranks import HIDDEN, LOCAL, T_CAP, TOP_K

pytestmark = pytest.mark.gpu2
WORLD = min(8, max(2, torch.cuda.device_count()))
DEVICES = [f"cuda:{rank}" for rank in range(WORLD)]
COUNTS = [(6, 6), (3, 5), (0, 6), (6, 0), (0, 0), (1, 2), (6, 6), (5, 6)]  # tokens of even and odd ranks, by input
SKEWED = 6  # the input whose tokens all go to rank 1
REPLAYS = 10_000
MAX_WAIT_S = 1.0


def inputs(rank: int) -> dict[str, Tensor]:
    """Of one rank, [8, ...] each, on the CPU."""
    g = torch.Generator().manual_seed(rank)
    many = len(COUNTS), T_CAP

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, (*many, *shape), generator=g).float()

    ids = torch.rand(*many, WORLD * LOCAL, generator=g).argsort(-1)[..., :TOP_K]
    ids[SKEWED] = torch.tensor([LOCAL, LOCAL + 1, -1])
    return {
        "x": draw(-2, 2, HIDDEN),
        "scales": draw(0, 1, HIDDEN // 128).exp2(),
        "ids": ids.to(torch.int32),
        "weights": draw(1, 2, TOP_K) / 2,
        "shared": draw(-3, 3, HIDDEN),
        "num_tokens": torch.tensor([[counts[rank % 2]] for counts in COUNTS], dtype=torch.int32),
    }


def expected(rank: int) -> Tensor:
    """[8, T, D]: expert e returns (e + 1) * x; rows of padding are 0."""
    given = inputs(rank)
    x = given["x"] * given["scales"].repeat_interleave(128, -1)
    factor = torch.where(given["ids"] >= 0, (given["ids"] + 1) * given["weights"], 0.0).sum(-1, keepdim=True)
    is_padding = torch.arange(T_CAP) >= given["num_tokens"]
    return (x * factor + given["shared"]).masked_fill(is_padding[..., None], 0.0)


def checksum(before: Tensor, out: Tensor) -> Tensor:
    """Every bit of every step so far, int64 with wrap-around."""
    return before * 31 + (out * 2).to(torch.int64)


class Exchange:
    """One rank. Built and used by its thread, inside `activate`."""

    def __init__(self, context: RankContext) -> None:
        from nmoe_backend.kernels.rdep_gpu import RdepLayout
        from nmoe_backend.parallel.rdep_device import DeviceRdep

        layout = RdepLayout(
            world_size=WORLD, max_tokens=T_CAP, hidden_size=HIDDEN, top_k=TOP_K, num_local=LOCAL,
            row_dtype=torch.float8_e4m3fn, scales_per_row=HIDDEN // 128, return_dtype=torch.bfloat16,
        )  # fmt: skip
        self.rdep = DeviceRdep(context, layout, loopback=False, max_wait_s=MAX_WAIT_S)
        self.rdep.received["payload"].view(torch.uint8).fill_(0x7F)  # NaN: what is not written must not matter
        self.rdep.received["returned"].fill_(float("nan"))
        device = context.device
        self._rank = context.rank
        self._inputs = {name: value.to(device) for name, value in inputs(context.rank).items()}
        self._inputs["x"] = self._inputs["x"].to(torch.float8_e4m3fn).view(torch.uint8)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.out = torch.zeros(T_CAP, HIDDEN, device=device)
        self.sum = torch.zeros(T_CAP, HIDDEN, dtype=torch.int64, device=device)

    def step(self) -> None:
        which = self.count % len(COUNTS)
        given = {name: value.index_select(0, which)[0] for name, value in self._inputs.items()}
        choice, x = (given["ids"], given["weights"]), given["x"].view(torch.float8_e4m3fn)
        self.rdep.dispatch((x, given["scales"]), choice, given["num_tokens"])
        self.rdep.barrier()
        self.rdep.give_back(*self._experts(), T_CAP)
        self.rdep.barrier()
        self.out.zero_()
        self.rdep.combine(given["ids"], given["num_tokens"], given["shared"], self.out)
        self.sum.copy_(checksum(self.sum, self.out))
        self.count += 1

    def _experts(self) -> tuple[Tensor, Tensor]:
        """A row for every choice of every slot, also of those that nobody wants."""
        received, ids = self.rdep.received, self.rdep.received["ids"]
        x = received["payload"].float() * received["scales"].repeat_interleave(128, -1)
        rows = x[:, :, None] * (ids + 1 + self._rank * LOCAL)[..., None]
        numbers = torch.arange(ids.numel(), dtype=torch.int32, device=ids.device).view(ids.shape)
        return rows.view(-1, HIDDEN), torch.where(ids >= 0, numbers, -1)


class Group:
    """The ranks, each with its thread."""

    def __init__(self) -> None:
        self.contexts = RankGroup.create(WORLD, DEVICES, timeout_s=30.0)
        self._threads = ThreadPoolExecutor(WORLD)
        self.exchanges = self.all(lambda context: Exchange(context))

    def all(self, run: Callable[[RankContext], object], ranks: range = range(WORLD)) -> list:
        def one(context: RankContext) -> object:
            with context.activate():
                result = run(context)
                context.stream.synchronize()
                return result

        return list(self._threads.map(one, [self.contexts[rank] for rank in ranks]))

    def capture(self) -> None:
        self.all(lambda context: self.exchanges[context.rank].step())
        self.graphs = self.all(lambda context: capture(context, self.exchanges[context.rank].step)[0])

    def replay(self, times: int, ranks: range = range(WORLD)) -> None:
        def run(context: RankContext) -> None:
            for _ in range(times):
                self.graphs[context.rank].replay()

        self.all(run, ranks)

    def errors(self) -> list[int]:
        return [int(exchange.rdep.error_word) for exchange in self.exchanges]

    def close(self) -> None:
        self._threads.shutdown()


@pytest.fixture
def group() -> Iterator[Group]:
    made = Group()
    yield made
    made.close()


@pytest.mark.parametrize("captured", [False, True])
def test_ranks_on_gpus_of_their_own_equal_all_experts_in_one_place(group: Group, captured: bool) -> None:
    want = [expected(rank) for rank in range(WORLD)]
    if captured:
        group.capture()  # whose first run was the first input's step
    for index in range(int(captured), 2 * len(COUNTS)):
        if captured:
            group.replay(1)
        else:
            group.all(lambda context: group.exchanges[context.rank].step())
        for rank, exchange in enumerate(group.exchanges):
            assert torch.equal(exchange.out.cpu(), want[rank][index % len(COUNTS)]), (rank, index)
    assert group.errors() == [0] * WORLD


def test_ten_thousand_replays_neither_hang_nor_drift(group: Group) -> None:
    group.capture()
    want = [expected(rank) for rank in range(WORLD)]
    sums = [checksum(torch.zeros(T_CAP, HIDDEN, dtype=torch.int64), one[0]) for one in want]
    for first in range(1, REPLAYS + 1, REPLAYS // 10):
        group.replay(REPLAYS // 10)
        for index in range(first, first + REPLAYS // 10):
            sums = [checksum(total, one[index % len(COUNTS)]) for total, one in zip(sums, want, strict=True)]
        for exchange, total in zip(group.exchanges, sums, strict=True):
            assert torch.equal(exchange.sum.cpu(), total), f"a step before {first + REPLAYS // 10} went wrong"
    assert group.errors() == [0] * WORLD
    assert [int(exchange.rdep.received["epoch"]) for exchange in group.exchanges] == [2 * REPLAYS] * WORLD


def test_a_rank_that_never_replays_is_named_in_every_arena_within_the_bound(group: Group) -> None:
    group.capture()
    group.replay(3)
    began_s = time.monotonic()
    group.replay(100, range(1))  # rank 0 alone: the first barrier waits, none of the other 199
    took_s = time.monotonic() - began_s
    assert group.errors() == [1 + 1] * WORLD
    assert took_s < 2 * MAX_WAIT_S
    group.replay(1, range(1, WORLD))  # nor do the late ones wait
    assert group.errors() == [1 + 1] * WORLD
