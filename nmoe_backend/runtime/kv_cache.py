"""The paged KV cache of one rank: one tensor [P, B, width] a layer. Which page belongs to whom is the control plane's.

All layers are paged alike: page p of a sequence is page p in every layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nmoe_backend.layers.attention import cache_specs
from nmoe_backend.models.spec import ModelSpec
from nmoe_backend.types import ConfigError


class KVCache:
    """Allocates at load and never again. Used by its rank's thread only."""

    def __init__(
        self, spec: ModelSpec, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        if num_pages < 1 or not 16 <= page_size <= 64:
            raise ConfigError(
                f"got num_pages={num_pages}, page_size={page_size}; need at least one page of 16 to 64 tokens. "
                "Set num_pages (0 sizes it from free memory) and kv_layout.page_size."
            )
        self.num_pages = num_pages
        self.page_size = page_size
        self.layers: tuple[Tensor, ...] = tuple(
            torch.zeros(num_pages, page_size, layer.width, dtype=dtype, device=device) for layer in cache_specs(spec)
        )

    def close(self) -> None:
        """Release the memory. Idempotent."""
        self.layers = ()
