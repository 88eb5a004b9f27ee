"""Ranks of an exchange for tests of the GPU transport: arenas on given devices, tokens, experts that multiply."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

T_CAP, HIDDEN, TOP_K, LOCAL = 6, 256, 3, 2


class Ranks:
    """The arenas of all ranks, one a device named (a device may be named often), and everybody's view of them. In
    loopback the first rank stands for all."""

    def __init__(
        self,
        devices: Sequence[str],
        row_dtype: torch.dtype = torch.float32,
        scales: int = 0,
        return_dtype: torch.dtype = torch.float32,
        loopback: bool = False,
    ) -> None:
        from nmoe_backend.kernels.rdep_gpu import RdepLayout, RdepPeers

        world = len(devices)
        self.layout = RdepLayout(
            world_size=world, max_tokens=T_CAP, hidden_size=HIDDEN, top_k=TOP_K, num_local=LOCAL,
            row_dtype=row_dtype, scales_per_row=scales, return_dtype=return_dtype,
        )  # fmt: skip
        self.loopback = loopback
        self.devices = [torch.device(name) for name in (devices[:1] if loopback else devices)]
        size = self.layout.offsets()["end"]
        buffers = [torch.zeros(size + 256, dtype=torch.uint8, device=device) for device in self.devices]
        arenas = [buffer[-buffer.data_ptr() % 256 :][:size] for buffer in buffers]
        self.views = [self.layout.views(arena) for arena in arenas]
        addresses = torch.tensor([arenas[0 if loopback else r].data_ptr() for r in range(world)])
        self.peers = []
        for rank, arena in enumerate(arenas):
            slots = torch.tensor(list(range(world)) if loopback else [rank] * world, dtype=torch.int32)
            view = RdepPeers(
                layout=self.layout, arenas=addresses.to(arena.device), slots=slots.to(arena.device), own=arena
            )
            self.peers.append(view)
        for view in self.views:  # whatever is not written must not matter
            view["payload"].view(torch.uint8).fill_(0x7F)
            view["returned"].fill_(float("nan"))
            view["weights"].fill_(float("nan"))
            view["ids"].fill_(-1)
        switch_peer_access_on(self.devices)

    def tokens(self, counts: Sequence[int], bucket: int, seed: int) -> list[tuple[Tensor, ...]]:
        """For each rank x, scales, ids, weights, num_tokens; rows from its count on are padding that holds anything."""
        g, layout = torch.Generator().manual_seed(seed), self.layout
        made = []
        for count, device in zip(counts, self.devices, strict=True):
            x = torch.randn(bucket, HIDDEN, generator=g).to(layout.row_dtype)
            ids = torch.rand(bucket, layout.world_size * LOCAL, generator=g).argsort(-1)[:, :TOP_K].to(torch.int32)
            weights = torch.rand(bucket, TOP_K, generator=g)
            scale = torch.rand(max(1, layout.scales_per_row), bucket, generator=g).t()
            num_tokens = torch.tensor([count], dtype=torch.int32)
            made.append(tuple(t.to(device) for t in (x, scale, ids, weights, num_tokens)))
        return made

    @contextmanager
    def phase(self, device: torch.device) -> Iterator[None]:
        """Kernels of a rank on its device; what they wrote, there and elsewhere, is visible everywhere at the end."""
        with torch.cuda.device(device):
            yield
            torch.cuda.synchronize()

    def expert_rows(self, rank: int, bucket: int) -> tuple[Tensor, Tensor]:
        """What a rank's experts make of what it received: expert e returns (e + 1) * x, its rows in any order."""
        view, layout = self.views[rank], self.layout
        first = [(src if self.loopback else rank) * LOCAL for src in range(layout.world_size)]
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


def switch_peer_access_on(devices: Sequence[torch.device]) -> None:
    """As DeviceRdep does: torch switches access on at the first copy from one to another."""
    for ours in set(devices):
        for theirs in set(devices) - {ours}:
            torch.zeros(1, device=theirs).copy_(torch.zeros(1, device=ours))
    for device in set(devices):
        torch.cuda.synchronize(device)
