"""RDEP between GPUs: one rank's arena, its peers' addresses, and the order of the three phases (rdep_gpu.py says what
each does).

Owns the rank's arena: one allocation for the life of the rank, zeroed, that peers write to directly. Two ways to wait:
* captured in a graph: a kernel that spins on flags in the arenas, bounded by `max_spins`; past the bound the error word
  of every arena is set, and the host that reads it with the step's ids ends the replica. It needs a GPU of its own for
  each rank: a kernel that spins on a peer of the same GPU may keep that peer from running.
* otherwise: the host's barrier, behind a synchronisation of the devices.

Loopback: one GPU stands for one of `num_ranks` ranks. All addresses are its own and slots are 0 ... num_ranks - 1, so
that it sends and receives the rows of a balanced rank. What comes out is no model's answer: for measurements only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nmoe_backend.kernels.rdep_gpu import (
    RdepLayout,
    RdepPeers,
    rdep_barrier,
    rdep_combine,
    rdep_dispatch,
    rdep_give_back,
)
from nmoe_backend.parallel.ranks import RankContext
from nmoe_backend.types import ConfigError

BUFFERS = "rdep"
_SPINS_PER_S = 4_000_000  # a poll takes 0.25 us
_MAX_SPINS = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceBuffers:
    """What a rank publishes."""

    arena: Tensor  # uint8
    probe: Tensor  # one byte, written to switch peer access on


class DeviceRdep:
    """Used by its rank's thread only."""

    def __init__(self, context: RankContext, layout: RdepLayout, *, loopback: bool, max_wait_s: float) -> None:
        self.layout = layout
        self._context = context
        self._loopback = loopback
        self._max_spins = min(_MAX_SPINS, round(max_wait_s * _SPINS_PER_S))
        self._found: RdepPeers | None = None
        device = context.device
        arena = torch.zeros(layout.offsets()["end"], dtype=torch.uint8, device=device)
        self.received = layout.views(arena)
        self.received["ids"].fill_(-1)
        self.buffers = DeviceBuffers(arena=arena, probe=torch.zeros(1, dtype=torch.uint8, device=device))
        context.publish(BUFFERS, self.buffers)

    @property
    def error_word(self) -> Tensor:
        """[1] int32, 0 unless a barrier gave up: 1 + the rank that it missed."""
        return self.received["error"]

    def dispatch(
        self, rows: tuple[Tensor, Tensor], choice: tuple[Tensor, Tensor], num_real: Tensor, *, beside: bool = False
    ) -> None:
        """rows: values [T, D], scales [T, D / 128]; choice: ids [T, K] int32 global, weights [T, K]; num_real [1].
        beside: it runs beside the kernel ahead, which lets it start."""
        rdep_dispatch(self._peers(), *rows, *choice, num_real, beside=beside)

    def barrier(self) -> None:
        """What any rank wrote before it is visible to all ranks after it."""
        if torch.cuda.is_current_stream_capturing():
            rdep_barrier(self._peers(), self._max_spins)
        else:
            self._context.barrier()

    def give_back(
        self,
        rows: Tensor,
        row_idx: Tensor,
        step_tokens: int,
        window_slots: Tensor | None = None,
        *,
        beside: bool = False,
    ) -> None:
        """rows [X, D] of my experts, weighted and added per received token, to their sources; `beside` as above."""
        rdep_give_back(self._peers(), rows, row_idx, step_tokens, window_slots, beside=beside)

    def combine(self, topk_ids: Tensor, num_real: Tensor, shared: Tensor | None, out: Tensor) -> None:
        """out [T, D]: what came back, in rank order, and shared [T, D]."""
        rdep_combine(self._peers(), topk_ids, num_real, shared, out)

    def _peers(self) -> RdepPeers:
        """Looked up at the first dispatch: all ranks are built by then."""
        if self._found is None:
            world, device = self.layout.world_size, self._context.device
            if self._loopback:
                everybody = (self.buffers,) * world
                slots = torch.arange(world, dtype=torch.int32, device=device)
            else:
                everybody = self._context.peers(BUFFERS)
                slots = torch.full((world,), self._context.rank, dtype=torch.int32, device=device)
            for peer in everybody:
                self._reach(peer)
            addresses = [peer.arena.data_ptr() for peer in everybody]
            arenas = torch.tensor(addresses, dtype=torch.int64, device=device)
            self._found = RdepPeers(layout=self.layout, arenas=arenas, slots=slots, own=self.buffers.arena)
        return self._found

    def _reach(self, peer: DeviceBuffers) -> None:
        ours, theirs = self.buffers.probe, peer.probe
        if ours.device == theirs.device:
            return
        if not torch.cuda.can_device_access_peer(ours.device, theirs.device):
            raise ConfigError(
                f"{ours.device} cannot write to the memory of {theirs.device}. The ranks of a replica need GPUs joined "
                "by NVLink or on one PCIe root: choose other gpus."
            )
        theirs.copy_(ours)  # torch switches access on at the first copy; both bytes are 0
