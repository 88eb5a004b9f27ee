"""Decode-only steps of a padding table of operations, from static buffers: replays of CUDA graphs where a rank has a
GPU of its own.

A step is padded to the smallest bucket that holds the largest rank's rows, the same on every rank. The host writes five
columns into pinned memory and starts one copy; everything else (tokens, positions, cache rows, block tables, lengths,
their count) is computed on the device, inside the graph, so that planning never waits for the step before.

A padding row stands at position -1 of the scratch slot behind the last one: it has no context, writes no cache, visits
no expert, and its logits are not looked at. Rows come first, so the number of real ones says which are padding.

Graphs share one memory pool: they run one after the other, and what one leaves is read before the next replay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nmoe_backend.layers.batch import Batch
from nmoe_backend.model import DecoderModel
from nmoe_backend.parallel.ranks import RankContext
from nmoe_backend.runtime.batch import SlotState
from nmoe_backend.runtime.graphs import capture
from nmoe_backend.types import EngineLimits, RankPlan, StepPlan

_SLOTS, _STARTS, _PAGE_SLOTS, _PAGE_INDICES, _PAGES, _NUM_COLUMNS = range(6)
_STAGES = 2  # pinned buffers: the copy of the last step may still run while the next is written


def decode_buckets(max_batch_size: int) -> tuple[int, ...]:
    """Rows of the graphs: powers of two up to 64, then multiples of 64, and the limit itself."""
    sizes = [1, 2, 4, 8, 16, 32, *range(64, max_batch_size, 64)]
    return (*(size for size in sizes if size < max_batch_size), max_batch_size)


def is_decode_only(step: StepPlan) -> bool:
    """No rank of the step has a prefill token."""
    return all(plan.num_tokens == plan.num_decode for plan in step.ranks)


@dataclass(slots=True)
class _Stage:
    columns: Tensor  # [5, max_batch_size] int64, pinned where there is a GPU
    copied: torch.cuda.Event | None = None


class DecodeSteps:
    """Used by its rank's thread only, inside `RankContext.activate`. Changes the slots as their plans say."""

    def __init__(
        self,
        model: DecoderModel,
        caches: Sequence[Tensor],
        state: SlotState,
        limits: EngineLimits,
        context: RankContext,
        buckets: Sequence[int],
        logits: Tensor | None,
    ) -> None:
        """`logits`: where the sampler wants them."""
        self._model, self._caches, self._state, self._limits = model, caches, state, limits
        self._context = context
        self._buckets = tuple(sorted(buckets))
        self._logits = logits
        device, size = context.device, (_NUM_COLUMNS, limits.max_batch_size)
        pinned = device.type == "cuda"
        self._columns = torch.zeros(size, dtype=torch.int64, device=device)
        self._stages = [_Stage(torch.zeros(size, dtype=torch.int64, pin_memory=pinned)) for _ in range(_STAGES)]
        self._num_loads = 0
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def capture(self, progress: Callable[[str], None]) -> None:
        """A graph for each bucket, the largest first, each behind a run that compiles what it needs. All ranks of the
        group call it together."""
        graph = None
        for bucket in reversed(self._buckets):
            self._load(RankPlan())
            self._forward(bucket)
            if not (self._model.ops.captures and self._context.has_own_device):
                continue
            graph, logits = capture(self._context, partial(self._forward, bucket), graph)
            self._graphs[bucket] = graph, logits
            progress(f"decode graph of {bucket} rows")

    def run(self, step: StepPlan) -> Tensor:
        """Logits [rows, V] fp32 of this rank's rows, valid until the next step."""
        plan = step.ranks[self._context.rank]
        self._state.check(plan)
        rows = max(other.num_decode for other in step.ranks)
        bucket = next((size for size in self._buckets if size >= rows), 0)
        assert bucket, f"a step of {rows} rows; the largest that was prepared has {self._buckets[-1]}"
        self._load(plan)
        captured = self._graphs.get(bucket)
        if captured is None:
            return self._forward(bucket)[: plan.num_decode]
        graph, logits = captured
        graph.replay()
        return logits[: plan.num_decode]

    def _load(self, plan: RankPlan) -> None:
        """Start the step's columns on their way to the device."""
        limits, stage = self._limits, self._stages[self._num_loads % _STAGES]
        self._num_loads += 1
        if len(plan.new_pages) > limits.max_batch_size:
            raise AssertionError(
                f"a decode step announces {len(plan.new_pages)} pages for {plan.num_decode} rows; a row takes one"
            )
        if stage.copied is not None:
            stage.copied.synchronize()
        columns, rows, pages = stage.columns.numpy(), len(plan.slots), len(plan.new_pages)
        columns[_SLOTS, :rows] = plan.slots
        columns[_SLOTS, rows:] = limits.max_batch_size
        columns[_STARTS, :rows] = plan.starts
        columns[_STARTS, rows:] = -1
        columns[_PAGE_SLOTS] = limits.max_batch_size
        columns[_PAGE_INDICES:, :] = 0
        if pages:
            columns[_PAGE_SLOTS:, :pages] = tuple(zip(*plan.new_pages, strict=True))
        self._columns.copy_(stage.columns, non_blocking=True)
        if self._context.stream is not None:
            stage.copied = torch.cuda.Event()
            stage.copied.record(self._context.stream)

    def _forward(self, bucket: int) -> Tensor:
        """[bucket, V] fp32"""
        out = None if self._logits is None else self._logits[:bucket]
        return self._model.logits(self._model.forward(self._batch(bucket), self._caches), out)

    def _batch(self, bucket: int) -> Batch:
        """The step's input on the device; the same operations whatever the columns hold."""
        state, page_size = self._state, self._limits.page_size
        where = self._columns[_PAGE_SLOTS], self._columns[_PAGE_INDICES]
        state.block_tables.index_put_(where, self._columns[_PAGES].to(torch.int32))
        slots, starts = self._columns[_SLOTS, :bucket], self._columns[_STARTS, :bucket]
        tables = state.block_tables.index_select(0, slots)
        positions = starts.clamp(min=0)
        pages = tables.gather(1, (positions // page_size).unsqueeze(1)).squeeze(1)
        is_real = starts >= 0
        return Batch(
            token_ids=state.last_tokens.index_select(0, slots),
            positions=positions,
            cache_idx=torch.where(is_real, pages * page_size + positions % page_size, -1),
            num_decode=bucket,
            block_tables=tables,
            context_lens=starts + 1,
            prefill=(),
            prefill_tables=tables[:0],
            step_tokens=bucket,
            num_real=is_real.sum(dtype=torch.int32).view(1),
        )
