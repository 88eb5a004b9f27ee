"""What the host says of a padded step: one flat buffer of int64 columns, written in pinned memory, copied once.

Columns of rows, in the plan's order, end with padding rows: the scratch slot behind the last one, no tokens. Columns of
pages end with entries that write page 0 into the scratch slot's table. A step without prefill copies no prompt tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from nmoe_backend.types import EngineLimits, RankPlan

_STAGES = 2  # pinned buffers: the copy of the last step may still run while the next is written

Array = TypeVar("Array", Tensor, np.ndarray)


@dataclass(frozen=True, slots=True)
class _Columns(Generic[Array]):
    """Views of a flat buffer, on the device or on the host."""

    counts: Array  # [2] decode rows, prefill rows
    slots: Array  # [R] R = max_batch_size
    starts: Array  # [R] position of the row's first token
    lengths: Array  # [R] 0: padding
    sampled: Array  # [R] for each token that will be sampled, the one before it among the step's tokens
    page_slots: Array  # [P]
    page_indices: Array  # [P] in the slot's block table
    pages: Array  # [P]
    tokens: Array  # [T] prompt tokens, T = max_prefill_tokens


class StepColumns:
    """Used by its rank's thread only. `device`: what the graphs read; `load` fills it, in stream order."""

    def __init__(self, limits: EngineLimits, device: torch.device) -> None:
        rows, tokens = limits.max_batch_size, limits.max_prefill_tokens
        # A chunk enters at most one page that it does not fill and did not begin.
        self._max_pages = rows + tokens // limits.page_size
        self._scratch_slot = rows
        self._sizes = (2, *[rows] * 4, *[self._max_pages] * 3, tokens)
        self._num_fixed = sum(self._sizes) - tokens
        self._buffer = torch.zeros(sum(self._sizes), dtype=torch.int64, device=device)
        self._on_gpu = device.type == "cuda"
        self._stages = [
            torch.zeros(sum(self._sizes), dtype=torch.int64, pin_memory=self._on_gpu) for _ in range(_STAGES)
        ]
        self._views = [_Columns(*np.split(stage.numpy(), np.cumsum(self._sizes)[:-1])) for stage in self._stages]
        self._copied: list[torch.cuda.Event | None] = [None] * _STAGES
        self._num_loads = 0
        self.device: _Columns[Tensor] = _Columns(*self._buffer.split(self._sizes))

    def load(self, plan: RankPlan, stream: torch.cuda.Stream | None) -> None:
        """Start the plan's columns on their way to the device. AssertionError: it announces more pages than it can."""
        num_rows, num_pages, num_tokens = len(plan.slots), len(plan.new_pages), len(plan.token_ids)
        if num_pages > self._max_pages:
            raise AssertionError(
                f"a step of {num_rows} rows and {num_tokens} prefill tokens announces {num_pages} pages; the tokens of "
                f"a step enter at most {self._max_pages}"
            )
        stage = self._num_loads % _STAGES
        self._num_loads += 1
        copied = self._copied[stage]
        if copied is not None:
            copied.synchronize()
        columns = self._views[stage]
        columns.counts[:] = plan.num_decode, num_rows - plan.num_decode
        for column, values, padding in (
            (columns.slots, plan.slots, self._scratch_slot),
            (columns.starts, plan.starts, 0),
            (columns.lengths, plan.lengths, 0),
            (columns.sampled, sampled_tokens(plan), 0),
        ):
            column[: len(values)] = values
            column[len(values) :] = padding
        columns.page_slots[num_pages:] = self._scratch_slot
        columns.page_indices[num_pages:] = columns.pages[num_pages:] = 0
        if num_pages:
            entries = np.array(plan.new_pages, dtype=np.int64)
            columns.page_slots[:num_pages], columns.page_indices[:num_pages], columns.pages[:num_pages] = entries.T
        if num_tokens:
            columns.tokens[:num_tokens] = plan.token_ids
        used = self._num_fixed + num_tokens
        self._buffer[:used].copy_(self._stages[stage][:used], non_blocking=True)
        if stream is not None:
            self._copied[stage] = copied = torch.cuda.Event()
            copied.record(stream)


def sampled_tokens(plan: RankPlan) -> Sequence[int]:
    """Of each row that samples, the index of its last token in the step."""
    if plan.num_decode == len(plan.slots):
        return range(plan.num_decode)
    found, end = [], 0
    for length, samples in zip(plan.lengths, plan.samples, strict=True):
        end += length
        if samples:
            found.append(end - 1)
    return found
