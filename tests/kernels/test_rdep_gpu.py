"""The transport kernels with several ranks on one device, one after the other, against the plain references.

Barriers between phases are kernel order here; what the barrier kernel itself does is tested apart.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nmoe_backend.kernels.rdep import rdep_local_ids_reference

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
WORLD, T_CAP, HIDDEN, TOP_K, LOCAL = 4, 6, 256, 3, 2


class Ranks:
    """The arenas of all ranks and everybody's view of them; in loopback one rank stands for all."""

    def __init__(self, row_dtype=torch.float32, scales=0, return_dtype=torch.float32, loopback=False) -> None:
        from nmoe_backend.kernels.rdep_gpu import RdepLayout, RdepPeers

        self.layout = RdepLayout(
            world_size=WORLD, max_tokens=T_CAP, hidden_size=HIDDEN, top_k=TOP_K, num_local=LOCAL,
            row_dtype=row_dtype, scales_per_row=scales, return_dtype=return_dtype,
        )  # fmt: skip
        self.loopback = loopback
        size = self.layout.offsets()["end"]
        buffers = [torch.zeros(size + 256, dtype=torch.uint8, device=DEVICE) for _ in range(1 if loopback else WORLD)]
        arenas = [buffer[-buffer.data_ptr() % 256 :][:size] for buffer in buffers]
        self.views = [self.layout.views(arena) for arena in arenas]
        addresses = torch.tensor([arenas[0 if loopback else r].data_ptr() for r in range(WORLD)], device=DEVICE)
        self.peers = []
        for rank, arena in enumerate(arenas):
            slots = list(range(WORLD)) if loopback else [rank] * WORLD
            slots = torch.tensor(slots, dtype=torch.int32, device=DEVICE)
            self.peers.append(RdepPeers(layout=self.layout, arenas=addresses, slots=slots, own=arena))
        for view in self.views:  # whatever is not written must not matter
            view["payload"].view(torch.uint8).fill_(0x7F)
            view["returned"].fill_(float("nan"))
            view["weights"].fill_(float("nan"))
            view["ids"].fill_(-1)


def _tokens(counts: list[int], bucket: int, row_dtype: torch.dtype, scales: int, seed: int) -> list[tuple[Tensor, ...]]:
    g = torch.Generator().manual_seed(seed)
    made = []
    for count in counts:
        x = torch.randn(bucket, HIDDEN, generator=g).to(row_dtype)
        ids = torch.rand(bucket, WORLD * LOCAL, generator=g).argsort(-1)[:, :TOP_K].to(torch.int32)
        weights = torch.rand(bucket, TOP_K, generator=g)
        scale = torch.rand(max(1, scales), bucket, generator=g).t()
        num_tokens = torch.tensor([count], dtype=torch.int32)
        made.append(tuple(t.to(DEVICE) for t in (x, scale, ids, weights, num_tokens)))
    return made


def _expert_rows(view: dict[str, Tensor], bucket: int, first: list[int]) -> tuple[Tensor, Tensor]:
    """Expert e returns (e + 1) * x, its rows in any order; first[src]: the global id of local expert 0 for a source."""
    ids = view["ids"].clone()
    ids[:, bucket:] = -1
    chosen = (ids >= 0).nonzero()
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(9)).to(chosen.device)]
    src, token, k = chosen.unbind(1)
    row_idx = torch.full_like(ids, -1)
    row_idx[src, token, k] = torch.arange(len(chosen), dtype=torch.int32, device=ids.device)
    expert = ids[src, token, k] + torch.tensor(first, device=ids.device)[src]
    rows = (expert + 1)[:, None] * view["payload"][src, token].float()
    return torch.cat((rows, rows.new_full((1, HIDDEN), float("nan")))), row_idx


@pytest.mark.parametrize("loopback", [False, True])
@pytest.mark.parametrize(("row_dtype", "scales"), [(torch.float32, 0), (torch.float8_e4m3fn, 2)], ids=str)
def test_three_steps_of_an_exchange_equal_all_experts_in_one_place(row_dtype, scales, loopback):
    """Ragged, an empty rank, and fewer tokens than the step before: stale slots must not come alive."""
    from nmoe_backend.kernels.rdep_gpu import rdep_combine, rdep_dispatch, rdep_give_back

    ranks = Ranks(row_dtype, scales, loopback=loopback)
    for step, counts in enumerate(([6, 6, 6, 6], [3, 0, 5, 1], [0, 2, 6, 6])):
        counts = counts[: len(ranks.peers)]
        bucket = max(1, *counts, 0)
        tokens = _tokens(counts, bucket, row_dtype, scales, step)
        for peers, (x, scale, ids, weights, num_tokens) in zip(ranks.peers, tokens, strict=True):
            rdep_dispatch(peers, x, scale if scales else None, ids, weights, num_tokens)
        for rank, count in enumerate(counts):
            _check_received(ranks, rank, count, bucket, tokens[rank])
        for rank, peers in enumerate(ranks.peers):
            first = [(src if loopback else rank) * LOCAL for src in range(WORLD)]
            rdep_give_back(peers, *_expert_rows(ranks.views[rank], bucket, first), bucket)
        for peers, count, (x, _, ids, weights, num_tokens) in zip(ranks.peers, counts, tokens, strict=True):
            shared = torch.randn(bucket, HIDDEN, device=DEVICE)
            out = torch.full((bucket, HIDDEN), 7.0, device=DEVICE)
            rdep_combine(peers, ids, num_tokens, shared, out)
            want = (x.float()[:, None] * ((ids + 1) * weights)[..., None]).sum(1) + shared
            torch.testing.assert_close(out[:count], want[:count], rtol=1e-5, atol=1e-4)
            assert (out[count:] == 7.0).all()


def _check_received(ranks: Ranks, rank: int, count: int, bucket: int, token: tuple[Tensor, ...]) -> None:
    x, scale, ids, weights, _ = token
    local = rdep_local_ids_reference(ids, WORLD, LOCAL)
    for owner in range(WORLD):
        view, src = (ranks.views[0], owner) if ranks.loopback else (ranks.views[owner], rank)
        assert torch.equal(view["ids"][src, :count], local[owner, :count])
        assert (view["ids"][src, count:bucket] == -1).all()
        visits = (local[owner, :count] >= 0).any(-1)
        sent, received = x[:count][visits], view["payload"][src, :count][visits]
        assert torch.equal(received.view(torch.uint8), sent.view(torch.uint8))
        assert torch.equal(view["weights"][src, :count][visits], weights[:count][visits])
        if ranks.layout.scales_per_row:
            assert torch.equal(view["scales"][src, :count][visits], scale[:count][visits])


def test_every_token_to_one_rank_drops_nothing():
    from nmoe_backend.kernels.rdep_gpu import rdep_dispatch

    ranks = Ranks()
    for peers, (x, _, ids, weights, num_tokens) in zip(
        ranks.peers, _tokens([T_CAP] * WORLD, T_CAP, torch.float32, 0, 5), strict=True
    ):
        skewed = torch.tensor([4, 5, -1], dtype=torch.int32, device=DEVICE).expand_as(ids).contiguous()
        rdep_dispatch(peers, x, None, skewed, weights, num_tokens)
    assert (ranks.views[2]["ids"] == torch.tensor([0, 1, -1], device=DEVICE)).all()
    assert all((ranks.views[r]["ids"] == -1).all() for r in (0, 1, 3))


def test_a_barrier_whose_peers_came_signals_them_and_passes():
    from nmoe_backend.kernels.rdep_gpu import rdep_barrier

    ranks = Ranks()
    ranks.views[0]["flags"].copy_(torch.tensor([0, 1, 1, 2]))  # rank 3 is one barrier ahead
    rdep_barrier(ranks.peers[0], 1000)
    assert int(ranks.views[0]["epoch"]) == 1 and int(ranks.views[0]["error"]) == 0
    assert all(int(view["flags"][0]) == 1 for view in ranks.views)


def test_a_peer_that_does_not_come_is_named_to_all_ranks_within_the_bound():
    from nmoe_backend.kernels.rdep_gpu import rdep_barrier

    ranks = Ranks()
    ranks.views[0]["flags"].copy_(torch.tensor([0, 1, 0, 1]))
    rdep_barrier(ranks.peers[0], 1000)
    assert [int(view["error"]) for view in ranks.views] == [1 + 2] * WORLD
    for _ in range(1000):  # none of them waits any more
        rdep_barrier(ranks.peers[0], 2**31 - 1)
    assert int(ranks.views[0]["epoch"]) == 1001


def test_epochs_wrap_around():
    from nmoe_backend.kernels.rdep_gpu import rdep_barrier

    ranks = Ranks(loopback=True)
    ranks.views[0]["epoch"].fill_(2**31 - 2)
    ranks.views[0]["flags"].fill_(2**31 - 2)
    for _ in range(4):
        rdep_barrier(ranks.peers[0], 1000)
    assert int(ranks.views[0]["error"]) == 0 and int(ranks.views[0]["epoch"]) == -(2**31) + 2


@pytest.mark.slow
def test_slots_beyond_2_to_the_31_elements_are_found():
    """8 ranks x 40,000 slots x 7,168 values: the last slot of the last source is at element 2.29e9."""
    from nmoe_backend.kernels.rdep_gpu import RdepLayout, RdepPeers, rdep_combine, rdep_dispatch, rdep_give_back

    layout = RdepLayout(
        world_size=8, max_tokens=40000, hidden_size=7168, top_k=8, num_local=32, row_dtype=torch.float8_e4m3fn,
        scales_per_row=56, return_dtype=torch.bfloat16,
    )  # fmt: skip
    arena = torch.zeros(layout.offsets()["end"], dtype=torch.uint8, device="cuda")
    addresses = torch.full((8,), arena.data_ptr(), device="cuda")
    slots = torch.arange(8, dtype=torch.int32, device="cuda")
    peers = RdepPeers(layout=layout, arenas=addresses, slots=slots, own=arena)
    x = torch.randn(40000, 7168, device="cuda").to(torch.float8_e4m3fn)
    ids = torch.full((40000, 8), -1, dtype=torch.int32, device="cuda")
    ids[-1, 0] = 255
    weights, scales = torch.ones(40000, 8, device="cuda"), torch.rand(40000, 56, device="cuda")
    num_tokens = torch.tensor([40000], dtype=torch.int32, device="cuda")
    rdep_dispatch(peers, x, scales, ids, weights, num_tokens)
    view = layout.views(arena)
    assert torch.equal(view["payload"][7, -1].view(torch.uint8), x[-1].view(torch.uint8))
    assert view["ids"][7, -1].tolist() == [31] + [-1] * 7 and torch.equal(view["scales"][7, -1], scales[-1])
    row_idx = torch.full((8, 40000, 8), -1, dtype=torch.int32, device="cuda")
    row_idx[7, -1, 0] = 0
    rows = torch.randn(1, 7168, device="cuda").bfloat16()
    rdep_give_back(peers, rows, row_idx, 40000)
    out = torch.empty(40000, 7168, dtype=torch.bfloat16, device="cuda")
    rdep_combine(peers, ids, num_tokens, None, out)
    assert torch.equal(out[-1], rows[0]) and (out[:-1] == 0).all()
