"""The ranks of one replica: which device each has, how they wait for each other, where their peers' buffers are.

Owns the rendezvous of one replica. Rank, device and stream are explicit: a `RankContext` is handed to whatever a rank
builds, and nothing here is global, so several replicas (and eight ranks) live in one process.

Invariants:
* Every rank passes the same sequence of barriers in a step, whether it has tokens or not.
* A wait is bounded. When a rank does not come in time, or any rank aborts, all of them get RankError, now and ever
  after: the state of a half-done step is unknown, so a group is never repaired.
* What a rank wrote, to its own or its peers' memory, before a barrier is visible to all ranks after it. On CUDA the
  host waits for every device of the group first: peers may share a device, where a kernel that spins on a peer could
  keep that peer from running.
* On the CPU at most COMPUTING_RANKS ranks run at a time; the others wait for their turn, at the start of a step and
  after each barrier. All eight at once hand the interpreter's lock to and fro at every operation: a decode step of
  8 ranks x 8 rows of the tiny model takes 28 ms that way on 2 cores, and 16 ms with two at a time or with one. Two: a
  larger model then uses more than one core, and a rank that hangs does not keep the others from saying so.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from nmoe_backend.types import ConfigError, RankError

COMPUTING_RANKS = 2


class RankGroup:
    """What the ranks of a replica share. `buffers`: each rank fills its own row at load and clears it at close."""

    def __init__(self, devices: Sequence[torch.device], timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.cuda_devices = tuple(sorted({d.index for d in devices if d.type == "cuda"}))
        self.rendezvous = threading.Barrier(len(devices))
        self.turns = threading.Semaphore(len(devices) if self.cuda_devices else COMPUTING_RANKS)
        self.arrivals = [0] * len(devices)  # barriers that each rank has reached; each rank writes its own entry
        self.buffers: list[dict[str, Any]] = [{} for _ in devices]

    @classmethod
    def create(
        cls, world_size: int, devices: Sequence[torch.device | str], timeout_s: float
    ) -> tuple[RankContext, ...]:
        """One context per rank; ranks may share a device. `timeout_s` bounds every wait for a peer."""
        if world_size < 1 or len(devices) != world_size:
            raise ConfigError(f"got {len(devices)} devices for {world_size} ranks. Name one device for each rank.")
        resolved = tuple(_resolve(device) for device in devices)
        if len({device.type for device in resolved}) != 1:
            raise ConfigError(f"got devices {[str(d) for d in resolved]}; ranks must be all on cuda or all on cpu.")
        group = cls(resolved, timeout_s)
        return tuple(RankContext(group, rank, world_size, device) for rank, device in enumerate(resolved))

    def abort(self) -> None:
        """Wake everybody who waits for a peer or for a turn; from now on every wait fails. Idempotent."""
        self.rendezvous.abort()
        self.turns.release(len(self.buffers))  # wakes the waiters; who computes no longer matters

    def missing_ranks(self) -> list[int]:
        """Ranks behind the barrier that the furthest rank has reached."""
        furthest = max(self.arrivals)
        return [rank for rank, count in enumerate(self.arrivals) if count < furthest]


class RankContext:
    """One rank's place in its group. Used by that rank's thread, except `abort`."""

    def __init__(self, group: RankGroup, rank: int, world_size: int, device: torch.device) -> None:
        self._group = group
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def activate(self) -> Iterator[None]:
        """Run a step as this rank: its turn, device and stream, no autograd. An error frees the peers."""
        self._take_turn()
        try:
            with torch.cuda.stream(self.stream), torch.inference_mode():
                yield
        except BaseException:
            self.abort()
            raise
        finally:
            self._group.turns.release()

    def barrier(self) -> None:
        """Wait for all ranks, inside `activate`. Raises RankError in every rank when one is late or aborted."""
        for device in self._group.cuda_devices:
            torch.cuda.synchronize(device)
        self.meet()

    def meet(self) -> None:
        """Wait for the other ranks' threads, inside `activate`; whatever their devices do. Raises like `barrier`."""
        group = self._group
        group.arrivals[self.rank] += 1
        group.turns.release()
        try:
            group.rendezvous.wait(group.timeout_s)
        except threading.BrokenBarrierError:
            raise self._failure(f"barrier {group.arrivals[self.rank]}") from None
        self._take_turn()

    def replay(self, graph: torch.cuda.CUDAGraph) -> None:
        """Launch a captured step, inside `activate`; the ranks call it together. Raises like `barrier`.

        Its kernels wait for the peers' and nobody launches before all are about to: a peer's thread that first had to
        free memory, which its driver does only while no GPU that maps it is busy, would wait for a kernel that waits
        for that peer.
        """
        if self.world_size > 1:
            self.meet()
        graph.replay()

    @property
    def timeout_s(self) -> float:
        """Bound on every wait for a peer."""
        return self._group.timeout_s

    @property
    def has_own_device(self) -> bool:
        """A GPU that no other rank of the group is on: what captured steps need."""
        return self.device.type == "cuda" and len(self._group.cuda_devices) == self.world_size

    def abort(self) -> None:
        """From any thread: every rank that waits, or comes to wait, gets RankError. Idempotent."""
        self._group.abort()

    def publish(self, name: str, buffers: object) -> None:
        """Make this rank's buffers reachable for its peers, under a name that all ranks use."""
        if name in self._group.buffers[self.rank]:
            raise AssertionError(f"rank {self.rank} publishes {name!r} twice; a rank builds one model in a group")
        self._group.buffers[self.rank][name] = buffers

    def peers(self, name: str) -> tuple[Any, ...]:
        """All ranks' buffers of that name, by rank, this one's own included. Needs all ranks to have published."""
        missing = [rank for rank, published in enumerate(self._group.buffers) if name not in published]
        if missing:
            raise RankError(f"ranks {missing} have no {name!r} buffers. Load every rank before the first step.")
        return tuple(published[name] for published in self._group.buffers)

    def close(self) -> None:
        """Drop this rank's published buffers. Idempotent."""
        self._group.buffers[self.rank].clear()

    def _take_turn(self) -> None:
        group = self._group
        if not group.turns.acquire(timeout=group.timeout_s) or group.rendezvous.broken:
            raise self._failure("its turn to compute")

    def _failure(self, waited_for: str) -> RankError:
        self.abort()
        group = self._group
        return RankError(
            f"rank {self.rank} of {self.world_size} waited for {waited_for}: the group was aborted, or ranks "
            f"{group.missing_ranks()} did not come within {group.timeout_s:g} s. Look for the first error of those "
            "ranks; the replica must be restarted."
        )


def _resolve(device: torch.device | str) -> torch.device:
    resolved = torch.device(device)
    if resolved.type == "cuda" and resolved.index is None:
        raise ConfigError("got device 'cuda' without a number; ranks need an explicit one. Write cuda:0, cuda:1, ...")
    return resolved
