"""The expert exchange: against all experts in one place, under skew, poison, stalls, and with stale buffers."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from nmoe_backend.kernels.rdep import rdep_local_ids_reference
from nmoe_backend.layers.ops import ops_for
from nmoe_backend.parallel.ranks import COMPUTING_RANKS, RankContext, RankGroup
from nmoe_backend.parallel.rdep import Rdep, RdepHandle, RdepShape, moe_reference
from nmoe_backend.types import ConfigError, RankError, RankPlan, SamplingParams, SlotInit
from tests.gates.replica import Driver, Replica, hf_model, weight_bytes_of

EXPERTS, TOP_K, HIDDEN, INTER = 8, 3, 24, 20


@dataclass(frozen=True)
class _Experts:
    """One rank's experts on a device; notes how many rows it is given."""

    w13: Tensor
    w2: Tensor
    rows_seen: list[int]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        self.rows_seen.append(x.shape[0])
        return ops_for(x.device).experts(x, ids, weights, self.w13, self.w2)


class Exchange:
    """All ranks of an exchange in one thread: the phases run one after the other, so a test can look in between."""

    def __init__(self, world_size: int, max_tokens: int, pass_rows: int = 64, device: str = "cpu") -> None:
        self.contexts = RankGroup.create(world_size, [device] * world_size, 1.0)
        self.num_local = EXPERTS // world_size
        shape = RdepShape(
            max_tokens=max_tokens, hidden_size=HIDDEN, top_k=TOP_K, num_local=self.num_local, dtype=torch.float32,
            pass_rows=pass_rows,
        )  # fmt: skip
        self.rows_seen: list[int] = []
        ops = ops_for(torch.device(device)).rdep
        self.ranks = [Rdep(context, shape, ops) for context in self.contexts]
        generator = torch.Generator().manual_seed(3)
        self.w13 = torch.randn(EXPERTS, 2 * INTER, HIDDEN, generator=generator).to(device) * 0.2
        self.w2 = torch.randn(EXPERTS, HIDDEN, INTER, generator=generator).to(device) * 0.2

    def dispatch(self, tokens: list[tuple[Tensor, Tensor, Tensor]], order: list[int] | None = None) -> list[RdepHandle]:
        step_tokens = max(x.shape[0] for x, _, _ in tokens)
        handles = {}
        for rank in order or range(len(self.ranks)):
            handles[rank] = self.ranks[rank].dispatch(*tokens[rank], step_tokens)
        return [handles[rank] for rank in range(len(self.ranks))]

    def compute(self, step_tokens: int, order: list[int] | None = None) -> None:
        for rank in order or range(len(self.ranks)):
            own = slice(rank * self.num_local, (rank + 1) * self.num_local)
            self.ranks[rank].compute(_Experts(self.w13[own], self.w2[own], self.rows_seen), step_tokens)

    def run(self, tokens: list[tuple[Tensor, Tensor, Tensor]], order: list[int] | None = None) -> list[Tensor]:
        handles = self.dispatch(tokens, order)
        self.compute(max(x.shape[0] for x, _, _ in tokens), order)
        return [rank.combine(handle) for rank, handle in zip(self.ranks, handles, strict=True)]

    def reference(self, tokens: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        return [moe_reference(*token, self.w13, self.w2) for token in tokens]


def _tokens(counts: list[int], seed: int = 0, device: str = "cpu") -> list[tuple[Tensor, Tensor, Tensor]]:
    """Rows, distinct experts and weights of each rank's tokens."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for count in counts:
        x = torch.randn(count, HIDDEN, generator=generator)
        ids = torch.rand(count, EXPERTS, generator=generator).argsort(-1)[:, :TOP_K]
        made.append((x.to(device), ids.to(device), torch.rand(count, TOP_K, generator=generator).to(device)))
    return made


def _assert_equal(ours: list[Tensor], reference: list[Tensor]) -> None:
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pass_rows", [1, 5, 64])
@pytest.mark.parametrize("counts", [[7], [3, 9], [0, 5, 1, 0], [2, 0, 0, 0, 0, 0, 9, 1]], ids=str)
def test_exchange_equals_all_experts_in_one_place(counts, pass_rows, device):
    exchange = Exchange(len(counts), max_tokens=9, pass_rows=pass_rows, device=device)
    tokens = _tokens(counts, device=device)
    _assert_equal(exchange.run(tokens), exchange.reference(tokens))
    assert max(exchange.rows_seen) <= pass_rows
    chosen = torch.cat([ids.flatten() for _, ids, _ in tokens]).tolist()
    for times in (1, 2):
        rows = [count for rank in exchange.ranks for count in rank.expert_rows.tolist()]
        assert rows == [times * chosen.count(expert) for expert in range(EXPERTS)]
        exchange.run(tokens)


@pytest.mark.parametrize("owner", [0, 1])
@pytest.mark.parametrize("pass_rows", [5, 1000])
def test_every_token_to_one_rank_drops_nothing(owner, pass_rows, device):
    """All tokens of all ranks want three experts of one rank: W x T_cap rows there, in passes of `pass_rows`."""
    exchange = Exchange(2, max_tokens=6, pass_rows=pass_rows, device=device)
    first = owner * exchange.num_local
    experts = torch.tensor([first, first + 1, first + 2], device=device).expand(6, TOP_K)
    tokens = [(x, experts, weights) for x, _, weights in _tokens([6] * 2, device=device)]
    _assert_equal(exchange.run(tokens), exchange.reference(tokens))
    assert max(exchange.rows_seen) == min(pass_rows, 12)
    assert sum(exchange.rows_seen) == 12


def test_poison_in_one_receive_buffer_changes_exactly_the_rows_that_it_owns(device):
    exchange = Exchange(4, max_tokens=16, device=device)
    tokens = _tokens([16, 9, 0, 12], device=device)
    clean = exchange.run(tokens)
    for victim in range(4):
        handles = exchange.dispatch(tokens)
        exchange.ranks[victim].buffers.payload.add_(1.0)
        exchange.compute(16)
        poisoned = [rank.combine(handle) for rank, handle in zip(exchange.ranks, handles, strict=True)]
        for (_, ids, _), before, after in zip(tokens, clean, poisoned, strict=True):
            visited = (ids // exchange.num_local == victim).any(-1)
            assert ((before != after).any(-1) == visited).all()


def test_stale_rows_of_a_larger_step_do_not_come_alive(device):
    """Step 1 fills every slot; steps 2 and 3 have fewer tokens, on some ranks none, and other experts."""
    exchange = Exchange(4, max_tokens=16, device=device)
    exchange.run(_tokens([16] * 4, seed=1, device=device))
    for rank in exchange.ranks:
        rank.buffers.payload.fill_(float("nan"))
        rank.buffers.returned.fill_(float("nan"))
    for seed, counts in ((2, [3, 5, 0, 1]), (3, [16, 0, 2, 0]), (4, [0, 0, 0, 1])):
        exchange.rows_seen.clear()
        tokens = _tokens(counts, seed=seed, device=device)
        _assert_equal(exchange.run(tokens), exchange.reference(tokens))
        visits = sum(len(set((row // exchange.num_local).tolist())) for _, ids, _ in tokens for row in ids)
        assert sum(exchange.rows_seen) == visits


def test_result_is_bitwise_the_same_whatever_the_order_of_arrival():
    tokens = _tokens([8, 5, 8, 3])
    first = Exchange(4, max_tokens=8, pass_rows=5).run(tokens)
    second = Exchange(4, max_tokens=8, pass_rows=5).run(tokens, order=[2, 0, 3, 1])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_local_ids_of_the_worked_example():
    ids = rdep_local_ids_reference(torch.tensor([[0, 3], [2, 3]]), 2, 2)
    assert ids.tolist() == [[[0, -1], [-1, -1]], [[-1, 1], [0, 1]]]


def test_a_step_beyond_the_buffers_is_refused():
    exchange = Exchange(2, max_tokens=4)
    with pytest.raises(AssertionError, match="at most 4"):
        exchange.dispatch(_tokens([5, 1]))


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_a_rank_holds_only_its_own_experts(tiny_model, world_size):
    experts = sum(p.nbytes for name, p in tiny_model.named_parameters() if ".mlp.experts." in name)
    biases = sum(b.nbytes for name, b in tiny_model.named_buffers() if "e_score" in name)
    replicated = sum(p.nbytes for p in tiny_model.parameters()) - experts + biases
    replica = Replica(tiny_model, world_size)
    for worker in replica.workers:
        assert weight_bytes_of(worker._model) == replicated + experts // world_size
    replica.close()


def _one_token_step(replica: Replica) -> list:
    init = SlotInit(slot=0, sampling=SamplingParams(), prompt_ids=(5,))
    plan = RankPlan(
        slots=[0], starts=[0], lengths=[1], token_ids=[5], samples=[True], new_pages=[(0, 0, 0)], admitted=[init]
    )
    return replica.launch(plan)


def test_a_stalled_rank_stalls_the_step_and_then_every_rank_gets_rank_error(tiny_model):
    replica = Replica(tiny_model, 8, timeout_s=0.5)
    release = threading.Event()
    model = replica.workers[3]._model
    forward = model.forward

    def stalled(*args: object) -> Tensor:
        release.wait(60.0)
        return forward(*args)

    model.forward = stalled
    futures = _one_token_step(replica)
    others = [future.exception(timeout=30.0) for rank, future in enumerate(futures) if rank != 3]
    assert not futures[3].done()
    assert all(isinstance(error, RankError) for error in others)
    assert all("ranks [3] did not come within 0.5 s" in str(error) for error in others)
    release.set()
    assert isinstance(futures[3].exception(timeout=30.0), RankError)
    replica.close()


def test_abort_from_another_thread_releases_everybody_at_once(tiny_model):
    """As many ranks hang as may compute at a time; the others would wait a minute for their turn."""
    replica = Replica(tiny_model, 4, timeout_s=60.0)
    entered, release, hanging = threading.Semaphore(0), threading.Event(), []

    def hang(rank: int) -> None:
        hanging.append(rank)
        entered.release()
        release.wait(60.0)
        raise ValueError("never reached the barrier")

    for rank, worker in enumerate(replica.workers):
        worker._model.forward = lambda *_, rank=rank: hang(rank)
    futures = _one_token_step(replica)
    assert all(entered.acquire(timeout=30.0) for _ in range(COMPUTING_RANKS))
    replica.workers[2].abort()
    replica.workers[2].abort()
    waiting = [future for rank, future in enumerate(futures) if rank not in hanging]
    assert len(waiting) == 4 - COMPUTING_RANKS
    assert all(isinstance(future.exception(timeout=30.0), RankError) for future in waiting)
    release.set()
    assert all(isinstance(futures[rank].exception(timeout=30.0), ValueError) for rank in hanging)
    replica.close()


class _Graph:
    """Notes how many ranks had come to launch when it was launched."""

    def __init__(self, arrived: list[int]) -> None:
        self._arrived = arrived
        self.seen: list[int] = []

    def replay(self) -> None:
        self.seen.append(len(self._arrived))


def test_no_rank_launches_its_graph_before_all_are_about_to():
    contexts = RankGroup.create(4, ["cpu"] * 4, 30.0)
    arrived: list[int] = []
    graphs = [_Graph(arrived) for _ in contexts]

    def launch(context: RankContext) -> None:
        with context.activate():
            arrived.append(context.rank)
            context.replay(graphs[context.rank])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(launch, contexts))
    assert [graph.seen for graph in graphs] == [[4]] * 4


def test_a_rank_that_does_not_come_to_launch_is_named_and_nobody_launches():
    contexts = RankGroup.create(3, ["cpu"] * 3, 0.2)
    graph = _Graph([])

    def launch(context: RankContext) -> None:
        with context.activate():
            context.replay(graph)

    with ThreadPoolExecutor(2) as threads:
        futures = [threads.submit(launch, context) for context in contexts[:2]]
    errors = [future.exception() for future in futures]
    assert all(isinstance(error, RankError) for error in errors)
    assert any("ranks [2] did not come within 0.2 s" in str(error) for error in errors)
    assert graph.seen == []


def test_worst_skew_through_the_whole_model_gives_the_tokens_of_transformers(device):
    """A router bias that sends every token to the experts of rank 0 of 4, with passes smaller than the rows."""
    model = hf_model(seed=5)
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.copy_(torch.tensor([9.0, 9.0, 0, 0, 0, 0, 0, 0]))
    replica = Replica(model, 4, device=device, pass_rows=3)
    prompts = [[1, 2, 3, 4, 5], [6, 7], [8], [9] * 30, [10] * 3]
    results = Driver(replica).generate(prompts, num_tokens=6)
    received = replica.layer_contexts[0].exchange.rdep.buffers.ids
    assert (received[:, 0] >= 0).sum() > 0
    assert all((context.exchange.rdep.buffers.ids < 0).all() for context in replica.layer_contexts[1:])
    replica.close()
    for prompt, result in zip(prompts, results, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + result.tokens[:-1]])).logits[0]
        assert result.tokens == logits[len(prompt) - 1 :].argmax(-1).tolist()


@pytest.mark.parametrize(
    ("devices", "message"), [(["cpu"], "1 devices for 2 ranks"), (["cuda", "cuda"], "without a number")]
)
def test_devices_that_do_not_fit_the_ranks_are_an_error(devices, message):
    with pytest.raises(ConfigError, match=message):
        RankGroup.create(2, devices, 1.0)
