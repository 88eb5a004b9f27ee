"""One step's input as tensors: what every layer may know about the tokens that it sees."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillRow:
    """A chunk of one prompt: tokens [first, last) of the step are positions start, start + 1, ... of its sequence."""

    first: int
    last: int
    start: int
    pages: Tensor  # [n] int32: pages of positions [0, start + last - first)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillColumns:
    """The prefill rows of a padded step, whose number and lengths only the device knows.

    Row s < num_rows is the tokens [bounds[s], bounds[s + 1]) of the step, at positions starts[s], starts[s] + 1, ...
    """

    bounds: Tensor  # [S + 1] int32
    starts: Tensor  # [S] int32
    tables: Tensor  # [S, n] int32; entries beyond a row's own pages are any valid page
    num_rows: Tensor  # [1] int32
    max_keys: int  # keys of all rows, each row's in whole blocks of KEY_BLOCK: at most so many


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Decode tokens, one a row, then the prefill rows back to back, then padding. Read only.

    A table that wants steps of one size on all ranks (`LayerOps.pads_steps`) gets padding: tokens of any id at position
    0 that go to no cache row (-1). It gets `num_decode` decode rows of which the last ones may have no context: their
    tokens are prefill's or padding. Elsewhere there is no padding, and every decode row is one.
    """

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    cache_idx: Tensor  # [T] int64: page * B + offset, where the token's latents go
    num_decode: int
    block_tables: Tensor  # [num_decode, n] int32; entries beyond a row's own pages are any valid page
    context_lens: Tensor  # [num_decode] int64, the row's new token included; 0: no decode row
    prefill: tuple[PrefillRow, ...]  # without padding
    padded_prefill: PrefillColumns | None  # with padding; None: a decode step
    step_tokens: int  # the largest T of any rank in this step
    num_real: Tensor  # [1] int32: tokens from there on are padding

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]
