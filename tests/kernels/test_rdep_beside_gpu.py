"""Dispatch and give_back beside the shared expert's GEMMs, in graphs, at a size where both are still running when the
next kernel is launched: what follows must find all of both.

One GPU in loopback as rank 0 of eight. A replay takes the next of three inputs by a counter on the device. Expert rows
and weights are small multiples of powers of two, so that sums are exact whatever their order: results are compared bit
for bit with plain torch, but for the GEMMs', which their own tests compare: here with those of single launches.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu
WORLD, LOCAL, TOP_K, TOKENS, HIDDEN, SHARED_SIZE, ROWS = 8, 32, 8, 384, 7168, 2048, 500
INPUTS, SPARE_SMS = 3, 44
FP8 = torch.float8_e4m3fn


class Layer:
    """A layer's exchange with a shared expert, launched in the order of layers/hopper_exchange.py."""

    def __init__(self) -> None:
        from nmoe_backend.kernels.rdep_gpu import RdepLayout, RdepPeers

        g = torch.Generator(device="cuda").manual_seed(0)
        self.layout = RdepLayout(
            world_size=WORLD, max_tokens=TOKENS, hidden_size=HIDDEN, top_k=TOP_K, num_local=LOCAL, row_dtype=FP8,
            scales_per_row=HIDDEN // 128, return_dtype=torch.bfloat16,
        )  # fmt: skip
        arena = torch.zeros(self.layout.offsets()["end"], dtype=torch.uint8, device="cuda")
        self.received = self.layout.views(arena)
        slots = torch.arange(WORLD, dtype=torch.int32, device="cuda")
        self.peers = RdepPeers(
            layout=self.layout, arenas=torch.full((WORLD,), arena.data_ptr(), device="cuda"), slots=slots, own=arena
        )

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device="cuda")

        self.inputs = {
            "x": draw(INPUTS, TOKENS, HIDDEN).to(FP8).view(torch.uint8),
            "scales": draw(INPUTS, HIDDEN // 128, TOKENS).abs(),
            "h": draw(INPUTS, TOKENS, SHARED_SIZE).to(FP8).view(torch.uint8),
            "ids": draw(INPUTS, TOKENS, WORLD * LOCAL).argsort(-1)[..., :TOP_K].to(torch.int32),
            "weights": torch.randint(1, 5, (INPUTS, TOKENS, TOP_K), generator=g, device="cuda") / 4,
        }
        self.w13, self.w13_scales = draw(2 * SHARED_SIZE, HIDDEN).to(FP8), draw(2 * SHARED_SIZE // 128, HIDDEN // 128)
        self.w2, self.w2_scales = draw(HIDDEN, SHARED_SIZE).to(FP8), draw(HIDDEN // 128, SHARED_SIZE // 128)
        self.h_scales = draw(SHARED_SIZE // 128, TOKENS).abs()
        self.rows = torch.randint(-2, 3, (ROWS, HIDDEN), generator=g, device="cuda").bfloat16()
        self.numbers = torch.randint(ROWS, (WORLD, TOKENS, TOP_K), generator=g, device="cuda", dtype=torch.int32)
        self.num_tokens = torch.tensor([TOKENS], dtype=torch.int32, device="cuda")
        self.count = torch.zeros(1, dtype=torch.int64, device="cuda")

    def given(self, which: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x, its scales [blocks, T], h, ids and weights of an input."""
        found = {name: values.index_select(0, which)[0] for name, values in self.inputs.items()}
        return found["x"].view(FP8), found["scales"], found["h"].view(FP8), found["ids"], found["weights"]

    def up(self, x: Tensor, scales: Tensor, spare_sms: int) -> Tensor:
        from nmoe_backend.kernels.block_fp8_gemm_sm90 import block_fp8_gemm

        out = torch.empty(TOKENS, 2 * SHARED_SIZE, dtype=torch.bfloat16, device="cuda")
        block_fp8_gemm(x, scales, self.w13, self.w13_scales, out, 132, spare_sms)
        return out

    def down(self, h: Tensor, spare_sms: int) -> Tensor:
        from nmoe_backend.kernels.block_fp8_gemm_sm90 import block_fp8_gemm

        out = torch.empty(TOKENS, HIDDEN, dtype=torch.bfloat16, device="cuda")
        block_fp8_gemm(h, self.h_scales, self.w2, self.w2_scales, out, 132, spare_sms)
        return out

    def step(self) -> tuple[Tensor, ...]:
        """gate_up, what arrived (payload, scales, ids), out."""
        from nmoe_backend.kernels.rdep_gpu import rdep_barrier, rdep_combine, rdep_dispatch, rdep_give_back

        x, scales, h, ids, weights = self.given(self.count % INPUTS)
        gate_up = self.up(x, scales, SPARE_SMS)
        rdep_dispatch(self.peers, x, scales.t(), ids, weights, self.num_tokens, beside=True)
        rdep_barrier(self.peers, 1_000_000)
        arrived = tuple(self.received[name].clone() for name in ("payload", "scales", "ids"))
        row_idx = self.row_idx(arrived[2])
        shared = self.down(h, SPARE_SMS)
        rdep_give_back(self.peers, self.rows, row_idx, TOKENS, beside=True)
        rdep_barrier(self.peers, 1_000_000)
        out = torch.empty(TOKENS, HIDDEN, dtype=torch.bfloat16, device="cuda")
        rdep_combine(self.peers, ids, self.num_tokens, shared, out)
        self.count += 1
        return gate_up.clone(), *arrived, out

    def row_idx(self, local_ids: Tensor) -> Tensor:
        return torch.where(local_ids >= 0, self.numbers, -1)


def expected(layer: Layer, which: int) -> tuple[Tensor, ...]:
    """The same in plain torch, but for the GEMMs; payload and scales of slots without a choice are 0."""
    x, scales, h, ids, weights = layer.given(torch.tensor([which], device="cuda"))
    rank = torch.arange(WORLD, device="cuda")[:, None, None]
    local_ids = torch.where(ids // LOCAL == rank, ids % LOCAL, -1)
    visits = (local_ids >= 0).any(-1)[..., None]
    total = torch.zeros(TOKENS, HIDDEN, device="cuda")
    for source in range(WORLD):
        row_idx = layer.row_idx(local_ids)[source]
        picked = layer.rows[row_idx.clamp(min=0)].float() * torch.where(row_idx >= 0, weights, 0.0)[..., None]
        total += picked.sum(1)
    return (
        layer.up(x, scales, 0),
        torch.where(visits, x.view(torch.uint8), 0),
        torch.where(visits, scales.t(), 0.0),
        local_ids.to(torch.int32),
        (total + layer.down(h, 0).float()).bfloat16(),
    )


def test_what_runs_beside_a_gemm_is_complete_for_what_follows() -> None:
    layer = Layer()
    with torch.inference_mode():
        want = [expected(layer, which) for which in range(INPUTS)]
        layer.step()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = layer.step()
        for replay in range(1, 201):
            graph.replay()
            gate_up, payload, scales, ids, out = want[replay % INPUTS]
            visits = (ids >= 0).any(-1)[..., None]
            assert torch.equal(found[0], gate_up), replay
            assert torch.equal(torch.where(visits, found[1].view(torch.uint8), 0), payload), replay
            assert torch.equal(torch.where(visits, found[2], 0.0), scales), replay
            assert torch.equal(found[3], ids), replay
            assert torch.equal(found[4], out), replay
    assert int(layer.received["error"]) == 0
