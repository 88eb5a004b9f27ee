"""RDEP: routed experts split over the ranks, tokens sent to the experts by writing into the owner's memory.

Expert e lives on rank e // num_local_experts and nowhere else. A step of a layer has three phases, in this order on
every rank, those without tokens included:

    dispatch   the source writes each token's row into the receive buffer of every rank, with the ids of the experts
               that it wants there, and marks the slots that it does not use
    (barrier)
    compute    the owner runs its experts over the rows that want them, in passes of `pass_rows` rows, and writes one
               fp32 row per (token, rank) into the source's return buffer
    (barrier)
    combine    the source adds the rows of the ranks that a token visited, in rank order

Invariants:
* Slots are fixed, `src_rank * max_tokens + token`: nothing is sorted or counted to find a place, and nothing can
  overflow. All experts of all tokens on one rank is just more passes.
* `step_tokens`, the largest token count of any rank in the step, is the same number on every rank. Slots of a source
  below it are written or marked in every layer, slots from it on are not looked at: stale rows never come alive.
* The second barrier also protects the receive buffers (an owner has read them before anybody sends the next layer's
  rows), the first one the return buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nmoe_backend.parallel.ranks import RankContext

BUFFERS = "rdep"


@dataclass(frozen=True, kw_only=True, slots=True)
class RdepOps:
    """The operations of the exchange; what each does stands at its reference in kernels/."""

    local_ids: Callable[[Tensor, int, int], Tensor]
    send: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int], None]
    combine: Callable[[Tensor, Tensor], Tensor]


class Experts(Protocol):
    """A rank's own experts, however their weights are kept."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [X, D], ids [X, K] int32 local (-1 = none), weights [X, K] fp32 -> [X, D] fp32"""


@dataclass(frozen=True, kw_only=True, slots=True)
class RdepShape:
    """Sizes of the exchange, equal on every rank of a group."""

    max_tokens: int  # T_cap: tokens that a rank feeds in a step, at most
    hidden_size: int
    top_k: int
    num_local: int  # experts of a rank
    dtype: torch.dtype  # of a sent row
    pass_rows: int  # received rows that the experts see at once; bounds their intermediate memory


@dataclass(frozen=True, kw_only=True, slots=True)
class RdepBuffers:
    """One rank's side, in its own memory: peers write `payload`, `ids`, `weights` and `returned`."""

    payload: Tensor  # [W, T_cap, D] by source rank
    ids: Tensor  # [W, T_cap, K] int32, local expert ids, -1 = none
    weights: Tensor  # [W, T_cap, K] fp32
    returned: Tensor  # [W, T_cap, D] fp32, by the rank that computed it


@dataclass(frozen=True, kw_only=True, slots=True)
class RdepHandle:
    """What the source keeps between dispatch and combine."""

    visited: Tensor  # [W, T] bool


class Rdep:
    """One rank's end of the exchange; its buffers serve all layers in turn. Used by that rank's thread only."""

    def __init__(self, context: RankContext, shape: RdepShape, ops: RdepOps) -> None:
        self._context = context
        self._ops = ops
        self._peers: tuple[RdepBuffers, ...] = ()  # looked up at the first dispatch: all ranks are built by then
        self._slots: list[tuple[Tensor, Tensor, Tensor]] = []  # this source's slots in each peer's buffers
        self.shape = shape
        slots = (context.world_size, shape.max_tokens)
        device = context.device
        self.buffers = RdepBuffers(
            payload=torch.zeros(*slots, shape.hidden_size, dtype=shape.dtype, device=device),
            ids=torch.full((*slots, shape.top_k), -1, dtype=torch.int32, device=device),
            weights=torch.zeros(*slots, shape.top_k, dtype=torch.float32, device=device),
            returned=torch.zeros(*slots, shape.hidden_size, dtype=torch.float32, device=device),
        )
        self.expert_rows = torch.zeros(shape.num_local, dtype=torch.int64, device=device)  # computed since load
        context.publish(BUFFERS, self.buffers)

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: Experts, step_tokens: int) -> Tensor:
        """x [T, D], topk_ids [T, K] global, topk_weights [T, K] fp32, this rank's experts -> [T, D] fp32.

        T may be 0: the rank then serves its peers' tokens only. Raises RankError when a peer fails or is late.
        """
        handle = self.dispatch(x, topk_ids, topk_weights, step_tokens)
        self._context.barrier()
        self.compute(experts, step_tokens)
        self._context.barrier()
        return self.combine(handle)

    def dispatch(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, step_tokens: int) -> RdepHandle:
        """Phase 1, before the first barrier."""
        num_tokens = x.shape[0]
        if not num_tokens <= step_tokens <= self.shape.max_tokens:
            raise AssertionError(
                f"rank {self._context.rank}: {num_tokens} tokens in a step of {step_tokens}, at most "
                f"{self.shape.max_tokens}; the plan exceeds the limits that the buffers were sized for"
            )
        if not self._peers:
            self._peers = self._context.peers(BUFFERS)
            rank = self._context.rank
            self._slots = [(peer.payload[rank], peer.ids[rank], peer.weights[rank]) for peer in self._peers]
        ids = self._ops.local_ids(topk_ids, self._context.world_size, self.shape.num_local)
        for local_ids, slots in zip(ids.unbind(0), self._slots, strict=True):
            self._ops.send(x, local_ids, topk_weights, *slots, step_tokens)
        return RdepHandle(visited=(ids >= 0).any(-1))

    def compute(self, experts: Experts, step_tokens: int) -> None:
        """Phase 2, between the barriers: this rank's experts over every row that wants one of them."""
        received = self.buffers
        wanted = (received.ids[:, :step_tokens] >= 0).any(-1)
        sources, tokens = wanted.nonzero(as_tuple=True)  # ascending by source, then token
        for first in range(0, sources.shape[0], self.shape.pass_rows):
            source = sources[first : first + self.shape.pass_rows]
            token = tokens[first : first + self.shape.pass_rows]
            ids = received.ids[source, token]
            rows = experts.forward(received.payload[source, token], ids, received.weights[source, token])
            self.expert_rows += torch.bincount(ids.flatten() + 1, minlength=self.shape.num_local + 1)[1:]
            self._give_back(source, token, rows)

    def _give_back(self, source: Tensor, token: Tensor, rows: Tensor) -> None:
        """rows [X, D] fp32 of (source, token), sources ascending, each into its source's return buffer."""
        first = 0
        counts = torch.bincount(source, minlength=self._context.world_size).tolist()
        for peer, count in zip(self._peers, counts, strict=True):
            last = first + count
            if count:
                returned = peer.returned[self._context.rank]
                device = returned.device
                returned.index_copy_(0, token[first:last].to(device), rows[first:last].to(device))
            first = last

    def combine(self, handle: RdepHandle) -> Tensor:
        """Phase 3, after the second barrier: [T, D] fp32."""
        return self._ops.combine(self.buffers.returned, handle.visited)


def moe_reference(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """The same result with all experts in one place and no exchange: one token and one expert at a time.

    x [T, D], topk_ids [T, K], topk_weights [T, K] fp32, w13 [E, 2 I, D], w2 [E, D, I] of all experts -> [T, D] fp32.
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for token in range(x.shape[0]):
        for choice in range(topk_ids.shape[1]):
            expert = int(topk_ids[token, choice])
            gate, up = (w13[expert] @ x[token]).chunk(2)
            out[token] += topk_weights[token, choice] * (w2[expert] @ (torch.nn.functional.silu(gate) * up)).float()
    return out
