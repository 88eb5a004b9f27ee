"""Multi-head latent attention over many query tokens of one sequence, with expanded keys and values.

From the latents c of the keys (arXiv 2405.04434, eq. 9-11): k_nope = W_UK c, v = W_UV c for each head, where W_UK and
W_UV are the first N and the last V rows of the head's block of `w_kv_b`. A key is [k_nope, k_rope], k_rope being shared
by the heads. Causal: the last query sees every key, the one before it all but the last, ...

Two forms. Dense: keys are the queries' own tokens. Paged: keys are gathered from the cache, a prefix of `start` tokens
that was computed in earlier steps and the queries' own tokens, which were written before.

Scores and softmax are fp32. Queries go in blocks, so that the score matrix is [H, QUERY_BLOCK, keys] at most.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUERY_BLOCK = 256


def mla_prefill_reference(q_nope: Tensor, q_rope: Tensor, keys: Tensor, w_kv_b: Tensor, scale: float) -> Tensor:
    """q_nope [Tq, H, N], q_rope [Tq, H, R], keys [Tk, C + R] with Tk >= Tq, w_kv_b [H, N + V, C] -> [Tq, H, V]."""
    num_queries, num_heads, nope_dim = q_nope.shape
    num_keys = keys.shape[0]
    latent, k_rope = keys.split((w_kv_b.shape[-1], q_rope.shape[-1]), dim=-1)
    expanded = torch.matmul(latent, w_kv_b.transpose(1, 2)).float()  # [H, Tk, N + V]
    k_nope, value = expanded.split((nope_dim, w_kv_b.shape[1] - nope_dim), dim=-1)
    key = torch.cat((k_nope, k_rope.float().expand(num_heads, -1, -1)), dim=-1).transpose(1, 2)  # [H, N + R, Tk]
    query = torch.cat((q_nope, q_rope), dim=-1).float().transpose(0, 1)  # [H, Tq, N + R]
    position = torch.arange(num_keys, device=keys.device)
    out = torch.empty_like(value[:, :num_queries])
    for first in range(0, num_queries, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, num_queries)
        seen = num_keys - num_queries + last  # keys that the block's last query sees
        future = position[:seen] > position[seen - (last - first) : seen, None]
        scores = (query[:, first:last] @ key[:, :, :seen] * scale).masked_fill_(future, float("-inf"))
        out[:, first:last] = scores.softmax(-1) @ value[:, :seen]
    return out.transpose(0, 1).to(q_nope.dtype)


def mla_prefill_paged_reference(
    q_nope: Tensor, q_rope: Tensor, cache: Tensor, pages: Tensor, start: int, w_kv_b: Tensor, scale: float
) -> Tensor:
    """cache [P, B, C + R], pages [>= ceil((start + Tq) / B)] int32 of positions 0, 1, ...; `start` = position of the
    first query; the rest as in `mla_prefill_reference`."""
    num_keys = start + q_nope.shape[0]
    num_pages = -(-num_keys // cache.shape[1])
    keys = cache.index_select(0, pages[:num_pages]).flatten(0, 1)[:num_keys]
    return mla_prefill_reference(q_nope, q_rope, keys, w_kv_b, scale)
