"""The steps of a table of operations that wants padding, from static buffers: replays of CUDA graphs where a rank has a
GPU of its own.

A step is padded to a bucket (step_buckets.py), the same on every rank. The host writes its columns (step_columns.py)
and starts one copy; everything else (tokens, positions, cache rows, block tables, lengths, who is padding) is computed
on the device, inside the graph, so that planning never waits for the step before. Forward pass and head are one graph;
the sampler stays apart.

A step's tokens are the decode rows' one each, then the prefill rows' back to back, then padding, as in its plan. Only
the number of tokens that are computed is fixed in a graph, and where the decode rows end at the latest.

Graphs share one memory pool: they run one after the other. What they leave for the rank is in buffers of its own, valid
until the next step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from nmoe_backend.layers.batch import Batch, PrefillColumns
from nmoe_backend.model import DecoderModel
from nmoe_backend.parallel.ranks import RankContext
from nmoe_backend.runtime.batch import Forward, SlotState
from nmoe_backend.runtime.graphs import capture
from nmoe_backend.runtime.step_columns import StepColumns
from nmoe_backend.step_buckets import Bucket, choose_bucket, step_buckets
from nmoe_backend.types import EngineLimits, RankPlan, StepPlan


class StepGraphs:
    """Used by its rank's thread only, inside `RankContext.activate`. Changes the slots as their plans say."""

    def __init__(
        self,
        model: DecoderModel,
        caches: Sequence[Tensor],
        state: SlotState,
        limits: EngineLimits,
        context: RankContext,
        buckets: Sequence[Bucket] = (),
        logits: Tensor | None = None,
    ) -> None:
        """`buckets`: the steps that are prepared; left out, all that an engine needs. `logits` [max_batch_size, V]
        fp32: where the sampler wants them."""
        self._model, self._caches, self._state, self._limits = model, caches, state, limits
        self._context = context
        self._buckets = tuple(sorted(buckets or step_buckets(limits)))
        device, rows = context.device, limits.max_batch_size
        size = rows + limits.max_prefill_tokens
        self._columns = StepColumns(limits, device)
        self._indices = torch.arange(size + 1, device=device)
        self._hidden = torch.zeros(size, model.spec.hidden_size, dtype=caches[0].dtype, device=device)
        self._logits = torch.zeros(rows, model.spec.vocab_size, device=device) if logits is None else logits
        self._graphs: dict[Bucket, torch.cuda.CUDAGraph] = {}

    def capture(self, progress: Callable[[str], None]) -> None:
        """Runs that compile and load what the steps need, then a graph for each bucket; the largest first, so that the
        smaller ones fit into its memory. All ranks of the group call it together."""
        began, before = time.monotonic(), self._taken()
        self._columns.load(RankPlan(), self._context.stream)
        # Those of a size take the same kernels.
        sizes = {(bucket.tokens, bucket.rows): bucket for bucket in self._buckets}
        for bucket in reversed(sizes.values()):
            started = time.monotonic()
            self._forward(bucket)
            if self._context.device.type == "cuda":
                torch.cuda.synchronize(self._context.device)
            progress(f"step of {bucket}: run {time.monotonic() - started:.1f} s")
        if not (self._model.ops.captures and self._context.has_own_device):
            return
        self._free_runs()
        graph = None
        for bucket in reversed(self._buckets):
            started = time.monotonic()
            graph, _ = capture(self._context, partial(self._forward, bucket), graph)
            self._graphs[bucket] = graph
            progress(f"step of {bucket}: captured {time.monotonic() - started:.1f} s")
        device, allocated = (now - then for now, then in zip(self._taken(), before, strict=True))
        progress(
            f"{len(self._graphs)} graphs: {time.monotonic() - began:.1f} s, {device / 1e9:.2f} GB, "
            f"{(device - allocated) / 1e9:.2f} of them the driver's"
        )

    def _free_runs(self) -> None:
        """Gives back what the runs took, which the graphs do not use: they have memory of their own. By one rank for
        all, because it frees the memory of all devices, and none may be captured meanwhile."""
        self._context.meet()
        if self._context.rank == 0:
            torch.cuda.empty_cache()
        self._context.meet()

    def _taken(self) -> tuple[int, int]:
        """Bytes of the device that are in use, and what torch's allocator holds of them."""
        device = self._context.device
        if device.type != "cuda":
            return 0, 0
        free, total = torch.cuda.mem_get_info(device)
        return total - free, torch.cuda.memory_reserved(device)

    def run(self, step: StepPlan) -> Forward:
        """Of this rank's rows. Hidden states are there for a step with prefill only."""
        plan = step.ranks[self._context.rank]
        self._state.check(plan)
        bucket = choose_bucket(self._buckets, step)
        self._columns.load(plan, self._context.stream)
        graph = self._graphs.get(bucket)
        if graph is None:
            self._forward(bucket)
        else:
            self._context.replay(graph)
        num_sampled = sum(plan.samples)
        return Forward(hidden=self._hidden[: plan.num_tokens], logits=self._logits[:num_sampled])

    def _forward(self, bucket: Bucket) -> None:
        """The logits of the tokens that rows sample from, and with prefill the hidden states of all."""
        self._announce_pages()
        if not bucket.tokens:
            hidden = self._model.forward(self._decode_batch(bucket), self._caches)
            self._model.logits(hidden, self._logits[: bucket.rows])
            return
        hidden = self._model.forward(self._mixed_batch(bucket), self._caches)
        self._hidden[: bucket.size].copy_(hidden)
        num_heads = min(bucket.size, self._limits.max_batch_size)
        sampled = hidden.index_select(0, self._columns.device.sampled[:num_heads])
        self._model.logits(sampled, self._logits[:num_heads])

    def _announce_pages(self) -> None:
        columns = self._columns.device
        where = columns.page_slots, columns.page_indices
        self._state.block_tables.index_put_(where, columns.pages.to(torch.int32))

    def _decode_batch(self, bucket: Bucket) -> Batch:
        """One token a row, padding behind them."""
        columns, state, page_size = self._columns.device, self._state, self._limits.page_size
        slots, positions = columns.slots[: bucket.rows], columns.starts[: bucket.rows]
        tables = state.block_tables.index_select(0, slots)
        pages = tables.gather(1, (positions // page_size).unsqueeze(1)).squeeze(1)
        lengths = columns.lengths[: bucket.rows]  # 1, and 0 of padding
        return Batch(
            token_ids=state.last_tokens.index_select(0, slots),
            positions=positions,
            cache_idx=torch.where(lengths > 0, pages * page_size + positions % page_size, -1),
            num_decode=bucket.rows,
            block_tables=tables,
            context_lens=torch.where(lengths > 0, positions + 1, 0),
            prefill=(),
            padded_prefill=None,
            step_tokens=bucket.rows,
            num_real=columns.counts[:1].to(torch.int32),
        )

    def _mixed_batch(self, bucket: Bucket) -> Batch:
        """Row and position of each token from the rows' lengths."""
        columns, state, page_size = self._columns.device, self._state, self._limits.page_size
        num_decode, last_row = columns.counts[:1], self._limits.max_batch_size - 1
        token = self._indices[: bucket.size]
        ends = columns.lengths.cumsum(0)
        is_real = token < ends[-1:]
        row = torch.searchsorted(ends, token, right=True).clamp(max=last_row)
        slots = columns.slots[row]
        positions = torch.where(is_real, columns.starts[row] + token - (ends - columns.lengths)[row], 0)
        pages = state.block_tables[slots, positions // page_size]
        prompt = columns.tokens[(token - num_decode).clamp(0, bucket.tokens - 1)]
        decoding = token[: bucket.rows] < num_decode
        return Batch(
            token_ids=torch.where(token < num_decode, state.last_tokens[slots], prompt),
            positions=positions,
            cache_idx=torch.where(is_real, pages * page_size + positions % page_size, -1),
            num_decode=bucket.rows,
            block_tables=state.block_tables.index_select(0, columns.slots[: bucket.rows]),
            context_lens=torch.where(decoding, columns.starts[: bucket.rows] + 1, 0),
            prefill=(),
            padded_prefill=self._prefill_columns(bucket, ends),
            step_tokens=bucket.size,
            num_real=ends[-1:].to(torch.int32),
        )

    def _prefill_columns(self, bucket: Bucket, ends: Tensor) -> PrefillColumns:
        """The rows behind the decode rows, moved to the front."""
        columns, num_rows = self._columns.device, self._limits.max_batch_size
        num_decode = columns.counts[:1]
        row = (self._indices[:num_rows] + num_decode).clamp(max=num_rows - 1)
        edge = (self._indices[: num_rows + 1] + num_decode).clamp(max=num_rows)
        return PrefillColumns(
            bounds=torch.cat((ends.new_zeros(1), ends))[edge].to(torch.int32),
            starts=columns.starts[row].to(torch.int32),
            tables=self._state.block_tables.index_select(0, columns.slots[row]),
            num_rows=columns.counts[1:].to(torch.int32),
            max_keys=bucket.keys,
        )
