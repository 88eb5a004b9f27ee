"""The transport kernels with several ranks on one device or two, one after the other, against the plain references.

Barriers between phases are the host's here; what the barrier kernel itself does is tested apart, and ranks that run at
the same time in test_rdep_two_gpus.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nmoe_backend.kernels.rdep import rdep_local_ids_reference
from tests.kernels.rdep_ranks import HIDDEN, LOCAL, T_CAP, Ranks

pytestmark = pytest.mark.gpu
ONE_GPU = ["cuda:0"] * 4
PLACES = [
    pytest.param(ONE_GPU, False, id="one"),
    pytest.param(ONE_GPU, True, id="loopback"),
    pytest.param(["cuda:0", "cuda:1"] * 2, False, id="two", marks=pytest.mark.gpu2),
]


@pytest.mark.parametrize(("devices", "loopback"), PLACES)
@pytest.mark.parametrize(("row_dtype", "scales"), [(torch.float32, 0), (torch.float8_e4m3fn, 2)], ids=str)
def test_three_steps_of_an_exchange_equal_all_experts_in_one_place(row_dtype, scales, devices, loopback):
    """Ragged, an empty rank, and fewer tokens than the step before: stale slots must not come alive."""
    from nmoe_backend.kernels.rdep_gpu import rdep_combine, rdep_dispatch, rdep_give_back

    ranks = Ranks(devices, row_dtype, scales, loopback=loopback)
    for step, counts in enumerate(([6, 6, 6, 6], [3, 0, 5, 1], [0, 2, 6, 6])):
        counts = counts[: len(ranks.peers)]
        bucket = max(1, *counts, 0)
        tokens = ranks.tokens(counts, bucket, step)
        for peers, (x, scale, ids, weights, num_tokens) in zip(ranks.peers, tokens, strict=True):
            with ranks.phase(x.device):
                rdep_dispatch(peers, x, scale if scales else None, ids, weights, num_tokens)
        for rank, count in enumerate(counts):
            check_received(ranks, rank, count, bucket, tokens[rank])
        for rank, peers in enumerate(ranks.peers):
            rows, row_idx = ranks.expert_rows(rank, bucket)
            num_slots = ranks.layout.world_size * bucket
            half = num_slots // 2  # in two windows
            for slots in ([0, half], [half, num_slots]):
                window = torch.tensor(slots, dtype=torch.int32, device=rows.device)
                with ranks.phase(peers.own.device):
                    rdep_give_back(peers, rows, row_idx, bucket, window)
        for peers, count, (x, _, ids, weights, num_tokens) in zip(ranks.peers, counts, tokens, strict=True):
            shared = torch.randn(bucket, HIDDEN, device=x.device)
            out = torch.full((bucket, HIDDEN), 7.0, device=x.device)
            with ranks.phase(x.device):
                rdep_combine(peers, ids, num_tokens, shared, out)
            want = (x.float()[:, None] * ((ids + 1) * weights)[..., None]).sum(1) + shared
            torch.testing.assert_close(out[:count], want[:count], rtol=1e-5, atol=1e-4)
            assert (out[count:] == 7.0).all()


def check_received(ranks: Ranks, rank: int, count: int, bucket: int, token: tuple[Tensor, ...]) -> None:
    x, scale, ids, weights, _ = (value.cpu() for value in token)
    local = rdep_local_ids_reference(ids, ranks.layout.world_size, LOCAL)
    for owner in range(ranks.layout.world_size):
        view, src = (ranks.views[0], owner) if ranks.loopback else (ranks.views[owner], rank)
        found = {name: section[src].cpu() for name, section in view.items() if section.dim() > 1}
        assert torch.equal(found["ids"][:count], local[owner, :count])
        assert (found["ids"][count:bucket] == -1).all()
        visits = (local[owner, :count] >= 0).any(-1)
        sent, received = x[:count][visits], found["payload"][:count][visits]
        assert torch.equal(received.view(torch.uint8), sent.view(torch.uint8))
        assert torch.equal(found["weights"][:count][visits], weights[:count][visits])
        if ranks.layout.scales_per_row:
            assert torch.equal(found["scales"][:count][visits], scale[:count][visits])


@pytest.mark.parametrize(("devices", "loopback"), [place for place in PLACES if place.id != "loopback"])
def test_every_token_to_one_rank_drops_nothing(devices, loopback):
    from nmoe_backend.kernels.rdep_gpu import rdep_dispatch

    ranks = Ranks(devices)
    for peers, (x, _, ids, weights, num_tokens) in zip(ranks.peers, ranks.tokens([T_CAP] * 4, T_CAP, 5), strict=True):
        skewed = torch.tensor([4, 5, -1], dtype=torch.int32, device=x.device).expand_as(ids).contiguous()
        with ranks.phase(x.device):
            rdep_dispatch(peers, x, None, skewed, weights, num_tokens)
    assert (ranks.views[2]["ids"].cpu() == torch.tensor([0, 1, -1])).all()
    assert all((ranks.views[r]["ids"] == -1).all() for r in (0, 1, 3))


def test_a_barrier_whose_peers_came_signals_them_and_passes():
    from nmoe_backend.kernels.rdep_gpu import rdep_barrier

    ranks = Ranks(ONE_GPU)
    ranks.views[0]["flags"].copy_(torch.tensor([0, 1, 1, 2]))  # rank 3 is one barrier ahead
    rdep_barrier(ranks.peers[0], 1000)
    assert int(ranks.views[0]["epoch"]) == 1 and int(ranks.views[0]["error"]) == 0
    assert all(int(view["flags"][0]) == 1 for view in ranks.views)


def test_a_peer_that_does_not_come_is_named_to_all_ranks_within_the_bound():
    from nmoe_backend.kernels.rdep_gpu import rdep_barrier

    ranks = Ranks(ONE_GPU)
    ranks.views[0]["flags"].copy_(torch.tensor([0, 1, 0, 1]))
    rdep_barrier(ranks.peers[0], 1000)
    assert [int(view["error"]) for view in ranks.views] == [1 + 2] * 4
    for _ in range(1000):  # none of them waits any more
        rdep_barrier(ranks.peers[0], 2**31 - 1)
    assert int(ranks.views[0]["epoch"]) == 1001


def test_epochs_wrap_around():
    from nmoe_backend.kernels.rdep_gpu import rdep_barrier

    ranks = Ranks(ONE_GPU, loopback=True)
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
