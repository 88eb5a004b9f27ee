"""Write the step's latents into the paged cache.

A page holds B tokens; a token is C latent values followed by R rotated key values. Token t goes to row
`cache_idx[t] = page * B + offset` of the cache seen as [P * B, C + R]. No two tokens of a step share a row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kv_write_reference(cache: Tensor, cache_idx: Tensor, latent: Tensor, k_rope: Tensor) -> None:
    """cache [P, B, C + R], cache_idx [T] int64, latent [T, C], k_rope [T, R]; writes in place."""
    cache.view(-1, cache.shape[-1]).index_copy_(0, cache_idx, torch.cat((latent, k_rope), dim=-1))
