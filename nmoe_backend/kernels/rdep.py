"""RDEP transport in plain torch: who gets a token, the copy to one destination, and the sum at the source.

A receive buffer has a slot for each (source rank, token): `slot = src_rank * T_cap + token`, here the two leading dims
[W, T_cap]. A slot holds the token's row, the ids of the experts it wants *of this rank* (local numbering, -1 = none)
and their weights. A token whose ids are all -1 is not there: its row and weights are stale.

Worked example, 2 ranks with 2 experts each, T_cap 3; rank 1 has two tokens that want experts (0, 3) and (2, 3):
    local ids, to rank 0: [[0, -1], [-1, -1]]    to rank 1: [[-1, 1], [0, 1]]
    rank 0's buffer, source 1: token 0 for its expert 0; token 1 absent (-1, -1)
    rank 1's buffer, source 1: token 0 for its expert 1; token 1 for its experts 0 and 1
"""

from __future__ import annotations

import torch
from torch import Tensor


def rdep_local_ids_reference(topk_ids: Tensor, world_size: int, num_local: int) -> Tensor:
    """[T, K] global expert ids -> [W, T, K] int32: for each rank its local ids, -1 where the expert lives elsewhere."""
    first = torch.arange(world_size, device=topk_ids.device)[:, None, None] * num_local
    local = topk_ids - first
    return local.masked_fill_((local < 0) | (local >= num_local), -1).to(torch.int32)


def rdep_send_reference(
    x: Tensor, ids: Tensor, weights: Tensor, to_payload: Tensor, to_ids: Tensor, to_weights: Tensor, step_tokens: int
) -> None:
    """Writes T tokens into this source's slots of one destination and marks slots [T, step_tokens) as unused.

    x [T, D], ids [T, K] int32, weights [T, K] fp32; to_payload [T_cap, D], to_ids [T_cap, K], to_weights [T_cap, K].
    Slots from step_tokens on are not looked at in this step. The fixed-size copy of all rows is what needs no host
    synchronisation in plain torch; rows without an id are never read.
    """
    num_tokens = x.shape[0]
    if num_tokens < step_tokens:
        to_ids[num_tokens:step_tokens].fill_(-1)
    if num_tokens:
        to_payload[:num_tokens].copy_(x, non_blocking=True)
        to_ids[:num_tokens].copy_(ids, non_blocking=True)
        to_weights[:num_tokens].copy_(weights, non_blocking=True)


def rdep_combine_reference(returned: Tensor, visited: Tensor) -> Tensor:
    """returned [W, T_cap, D] fp32, visited [W, T] bool -> [T, D] fp32: the rows of the visited ranks, in rank order."""
    rows = returned[:, : visited.shape[1]].masked_fill(~visited[:, :, None], 0.0)
    total = rows[0]
    for row in rows[1:]:
        total += row
    return total
