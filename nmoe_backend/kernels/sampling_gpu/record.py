"""What the next step must know of the tokens just chosen. Grid: (N / 128,)."""

# A jit function has no types that mypy knows; launchers are typed.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nmoe_backend.kernels.sampling_gpu.table import EDITS, HAS_PENALTIES, HAS_PHRASES, SlotTables, StepRows, whole

_BLOCK = 128


@triton.jit(do_not_specialize=["num_rows"])
def _record_kernel(  # noqa: PLR0913
    token_ids_ptr,
    slots_ptr,
    positions_ptr,
    rows_ptr,
    last_tokens_ptr,
    counts_ptr,
    history_ptr,
    num_rows,
    V,
    history_len,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots_ptr + row, mask=row < num_rows, other=-1)
    is_real = slot >= 0
    token = tl.load(token_ids_ptr + row, mask=is_real, other=0)
    tl.store(last_tokens_ptr + slot, token, mask=is_real)
    edits = whole(rows_ptr, slot, EDITS)
    count = counts_ptr + slot * V + token  # a slot occurs once in a step
    has_penalties = (edits & HAS_PENALTIES) != 0
    tl.store(count, tl.load(count, mask=has_penalties, other=0) + 1, mask=has_penalties)
    has_phrases = (edits & HAS_PHRASES) != 0
    position = tl.load(positions_ptr + row, mask=has_phrases, other=0)
    tl.store(history_ptr + slot * history_len + position, token.to(tl.int32), mask=has_phrases)


def record(token_ids: Tensor, step: StepRows, tables: SlotTables, last_tokens: Tensor) -> None:
    """token_ids [N] int64 -> last_tokens [> S] int64 by slot, counts of slots with penalties, history of those with
    bad words of several tokens."""
    num_rows = step.slots.shape[0]
    _record_kernel[(triton.cdiv(num_rows, _BLOCK),)](
        token_ids, step.slots, step.positions, tables.rows, last_tokens, tables.counts, tables.history, num_rows,
        tables.counts.shape[1], tables.history.shape[1], _BLOCK, num_warps=4,
    )  # fmt: skip
