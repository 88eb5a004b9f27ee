"""Multi-head latent attention for one query token a sequence, over paged latents, in the absorbed form.

Since q_nope . (W_UK c) = (W_UK^T q_nope) . c, the query is taken into the latent space, attention runs over the cached
latents themselves (all heads share them), and W_UV is applied to the result (arXiv 2405.04434, section 2.1.2): nothing
is expanded per key.

Scores and softmax are fp32. Rows go in passes, so that at most PASS_TOKENS gathered tokens (or one row's) are held.
What lies beyond a row's length, in its last page or in the padding of its table, is never used, NaN included.
"""

from __future__ import annotations

import torch
from torch import Tensor

PASS_TOKENS = 1 << 18


def mla_decode_reference(
    q_nope: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    w_kv_b: Tensor,
    scale: float,
) -> Tensor:
    """q_nope [S, H, N], q_rope [S, H, R], cache [P, B, C + R], block_tables [S, n] int32 (n pages hold the longest row;
    entries beyond a row's own are any valid page), context_lens [S] int64 (the query's own token included),
    w_kv_b [H, N + V, C] -> [S, H, V]."""
    num_rows, num_pages = block_tables.shape
    nope_dim, latent_dim = q_nope.shape[-1], w_kv_b.shape[-1]
    w_uk, w_uv = w_kv_b[:, :nope_dim], w_kv_b[:, nope_dim:]
    q_latent = torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1)  # [S, H, C]
    query = torch.cat((q_latent, q_rope), dim=-1).float() * scale
    position = torch.arange(num_pages * cache.shape[1], device=cache.device)
    unused = position >= context_lens[:, None]  # [S, L]
    rows = max(1, PASS_TOKENS // max(1, position.shape[0]))
    parts = []
    for first in range(0, num_rows, rows):
        hidden = unused[first : first + rows]
        pages = block_tables[first : first + rows]
        keys = cache.index_select(0, pages.reshape(-1)).view(*hidden.shape, -1).float()
        keys.masked_fill_(hidden[:, :, None], 0.0)
        scores = torch.bmm(query[first : first + rows], keys.transpose(1, 2))  # [s, H, L]
        weights = scores.masked_fill_(hidden[:, None], float("-inf")).softmax(-1)
        parts.append(torch.bmm(weights, keys[..., :latent_dim]))
    attended = parts[0] if len(parts) == 1 else torch.cat(parts)
    out = torch.bmm(attended.to(q_nope.dtype).transpose(0, 1), w_uv.transpose(1, 2))  # [H, S, V]
    return out.transpose(0, 1)
