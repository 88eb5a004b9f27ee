"""`Sampler` of the kernels: all state on the device, a step is one copy of a few columns and one graph replay.

The host writes slots, positions and lines of the grammars' bitmask into pinned memory, and a slot's row of parameters
when a sequence takes it. It looks at which slots a step has only to choose the variant: what no row of the step needs
is not launched. Graphs are captured for each variant and bucket of rows; where ranks share a GPU the same kernels are
launched one by one. Rows of padding have slot -1.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nmoe_backend.kernels.sampling_gpu import table
from nmoe_backend.kernels.sampling_gpu.draw import draw
from nmoe_backend.kernels.sampling_gpu.edits import EditRows, edit_logits
from nmoe_backend.kernels.sampling_gpu.logprobs import LogprobRows, logprobs
from nmoe_backend.kernels.sampling_gpu.record import record
from nmoe_backend.kernels.sampling_gpu.stats import RowStats, raw_stats, row_stats
from nmoe_backend.kernels.sampling_gpu.truncation import Candidates, draw_truncated
from nmoe_backend.parallel.ranks import RankContext
from nmoe_backend.runtime.grammar_masks import GrammarMasks, StepMasks
from nmoe_backend.runtime.graphs import capture
from nmoe_backend.runtime.output import LogprobColumns, SampledTokens
from nmoe_backend.runtime.sampler_slots import NO_TOKEN, SlotNeeds
from nmoe_backend.types import MAX_TOP_LOGPROBS, EngineLimits, SlotInit

_SLOTS, _POSITIONS, _MASK_ROWS, _NUM_COLUMNS = range(4)
_NOT_ADMITTED = -1  # instead of a slot's variant
_STAGES = 2  # pinned buffers: the copy of the last step may still run while the next is written


class Variant(enum.IntEnum):
    """What a step launches; each contains the one before it."""

    PLAIN = 0  # greedy rows and draws from the whole vocabulary
    TRUNCATED = 1  # top_k, top_p, min_p
    FULL = 2  # edits and log-probabilities


@dataclass(slots=True)
class _Stage:
    columns: Tensor  # [3, max_batch_size] int64, pinned where there is a GPU
    rows: Tensor  # [max_batch_size, NUM_COLUMNS] int64, likewise
    copied: torch.cuda.Event | None = None


class KernelSampler:
    """See the module and sampler.py."""

    def __init__(self, limits: EngineLimits, context: RankContext, *, captures: bool) -> None:
        """`captures`: whether steps are graphs, which want a GPU that no other rank is on."""
        size, vocab_size, device = limits.max_batch_size, limits.vocab_size, context.device
        self._context, self._device, self._vocab_size, self._captures = context, device, vocab_size, captures
        self._pinned = device.type == "cuda"
        self._buckets = _buckets(size)
        # What the host knows of the slots.
        self._rows = np.zeros((size, table.NUM_COLUMNS.value), dtype=np.int64)
        self._rows_changed = False
        self._variants = np.full(size, _NOT_ADMITTED)
        self._lists: list[list[Tensor]] = [[] for _ in range(size)]  # keeps alive what a slot's row points to
        self._grammars = GrammarMasks(size, vocab_size, device)
        self._stages = [
            _Stage(self._host_zeros(_NUM_COLUMNS, size), self._host_zeros(*self._rows.shape)) for _ in range(_STAGES)
        ]
        self._num_loads = 0
        # What the device knows, and its scratch.
        self._columns = torch.zeros(_NUM_COLUMNS, size, dtype=torch.int64, device=device)
        self._tables = table.SlotTables.create(size, vocab_size, limits.max_seq_len + 1, device)
        self._logits = torch.zeros(2 * size, vocab_size, dtype=torch.float32, device=device)  # as computed; as edited
        self._edits = EditRows.create(size, vocab_size, device)
        self._stats = RowStats.create(size, vocab_size, device)
        self._candidates = Candidates.create(size, self._stats, vocab_size)
        self._token_ids = torch.zeros(size, dtype=torch.int64, device=device)
        self._logprobs = LogprobRows.create(size, MAX_TOP_LOGPROBS, device)
        self._graphs: dict[tuple[int, Variant], torch.cuda.CUDAGraph] = {}
        self.last_tokens = torch.zeros(size + 1, dtype=torch.int64, device=device)
        self.logits = self._logits[:size]

    def admit(self, init: SlotInit) -> None:
        self._grammars.admit(init)
        self._variants[init.slot] = _NOT_ADMITTED
        if init.embed:
            return
        slot, needs = init.slot, SlotNeeds.of(init, self._vocab_size)
        assert needs.num_logprobs <= MAX_TOP_LOGPROBS, f"slot {slot}: {needs.num_logprobs} alternatives of a token"
        edits = self._fill_tables(init, needs)
        self._fill_row(slot, needs, edits)
        has_more = edits != 0 or needs.num_logprobs >= 0
        self._variants[slot] = Variant.FULL if has_more else Variant.TRUNCATED if needs.is_truncated else Variant.PLAIN

    def capture(self, progress: Callable[[str], None]) -> None:
        """A graph for each variant and bucket, behind a run over padding that compiles what it needs. They allocate
        nothing, so they have no memory to share."""
        self._load((), (), None)
        for bucket in reversed(self._buckets):
            for variant in Variant:
                self.launch(bucket, variant)
                if self._captures:
                    self._graphs[bucket, variant], _ = capture(self._context, partial(self.launch, bucket, variant))
        if self._captures:
            progress(f"sampler graphs of {', '.join(map(str, self._buckets))} rows")

    def sample(self, logits: Tensor, slots: Sequence[int], positions: Sequence[int]) -> SampledTokens:
        """`logits` are the first rows of `self.logits`."""
        assert logits.data_ptr() == self.logits.data_ptr(), "logits lie in the sampler's own buffer"
        num_rows, masks = len(slots), self._grammars.step(slots)
        self._load(slots, positions, masks)
        variant = Variant.FULL if masks is not None else self.variant_of(slots)
        bucket = next(size for size in self._buckets if size >= num_rows)
        if self._graphs:
            self._graphs[bucket, variant].replay()
        else:
            self.launch(bucket, variant)
        token_ids = self._token_ids[:num_rows]
        if masks is not None:
            self._grammars.record(masks, token_ids)
        return SampledTokens(
            token_ids=token_ids,
            logprobs=self._logprob_columns(slots) if variant is Variant.FULL else None,
            failed=masks.failed if masks is not None else {},
        )

    def prompt_logprobs(self, logits: Tensor, target_ids: Sequence[int], num_top: int) -> LogprobColumns:
        targets = self._upload(target_ids, np.int64)
        stats = RowStats.create(len(target_ids), self._vocab_size, self._device)
        out = LogprobRows.create(len(target_ids), min(num_top, self._vocab_size), self._device)
        raw_stats(logits, stats, None, None)
        logprobs(logits, targets, stats, out)
        return _columns_of([num_top] * len(target_ids), targets, out)

    def variant_of(self, slots: Sequence[int]) -> Variant:
        """What a step of these slots needs, grammars aside."""
        variants = self._variants[list(slots)]
        assert variants.min() != _NOT_ADMITTED, f"one of the slots {slots} is sampled before it was admitted"
        return Variant(int(variants.max()))

    def launch(self, num_rows: int, variant: Variant) -> None:
        """Kernels only, whatever the columns hold."""
        logits, tables, stats, out = self._logits, self._tables, self._stats, self._token_ids[:num_rows]
        slots, positions, mask_rows = self._columns[:, :num_rows]
        step, sources = table.StepRows(slots=slots, positions=positions, mask_rows=mask_rows), None
        if variant is Variant.FULL:
            edit_logits(logits, step, tables, self._grammars.words, self._edits)
            sources = self._edits.sources[:num_rows]
        row_stats(logits, stats, slots, tables.rows, sources)
        draw(logits, step, tables.rows, stats, out, sources)
        if variant >= Variant.TRUNCATED:
            draw_truncated(logits, step, tables.rows, stats, self._candidates, out, sources)
        if variant is Variant.FULL:
            raw_stats(logits, stats, slots, tables.rows)
            logprobs(logits, out, stats, self._logprobs, slots, tables.rows)
        record(out, step, tables, self.last_tokens)

    def _load(self, slots: Sequence[int], positions: Sequence[int], masks: StepMasks | None) -> None:
        """Start a step's columns, and changed rows of parameters, on their way to the device."""
        stage = self._stages[self._num_loads % _STAGES]
        self._num_loads += 1
        if stage.copied is not None:
            stage.copied.synchronize()
        columns, num_rows = stage.columns.numpy(), len(slots)
        columns[_SLOTS:, num_rows:] = -1
        columns[_SLOTS, :num_rows] = slots
        columns[_POSITIONS, :num_rows] = positions
        columns[_MASK_ROWS] = -1
        if masks is not None:
            columns[_MASK_ROWS, masks.rows] = np.arange(len(masks.rows))
        self._columns.copy_(stage.columns, non_blocking=True)
        if self._rows_changed:
            stage.rows.numpy()[:] = self._rows
            self._tables.rows.copy_(stage.rows, non_blocking=True)
            self._rows_changed = False
        if self._pinned:
            stage.copied = torch.cuda.Event()
            stage.copied.record(torch.cuda.current_stream(self._device))

    def _logprob_columns(self, slots: Sequence[int]) -> LogprobColumns | None:
        num_top = self._rows[list(slots), table.NUM_TOP.value]
        if num_top.max() < 0:
            return None
        return _columns_of(num_top.tolist(), self._token_ids[: len(slots)], self._logprobs)

    def _fill_row(self, slot: int, needs: SlotNeeds, edits: int) -> None:
        """All parameters of a slot but for what `_fill_tables` has written."""
        p, row = needs.sampling, self._rows[slot]
        kind = table.GREEDY if needs.is_greedy else table.TRUNCATED if needs.is_truncated else table.PLAIN
        for column, value in (
            (table.KIND, kind.value),
            (table.TOP_K, needs.top_k),
            (table.SEED, needs.seed),
            (table.NUM_TOP, needs.num_logprobs),
            (table.EDITS, edits),
            (table.MIN_END, needs.min_end),
        ):
            row[column.value] = value
        reals = row.view(np.float64)
        for column, real in (
            (table.TEMPERATURE, p.temperature),
            (table.TOP_P, p.top_p),
            (table.MIN_P, p.min_p),
            (table.REPETITION, p.repetition_penalty),
            (table.PRESENCE, p.presence_penalty),
            (table.FREQUENCY, p.frequency_penalty),
        ):
            reals[column.value] = real
        self._rows_changed = True

    def _fill_tables(self, init: SlotInit, needs: SlotNeeds) -> int:
        """What is too large for a slot's row, where the sequence needs it; -> the bits of EDITS."""
        slot, tables, row, edits = init.slot, self._tables, self._rows[init.slot], 0
        bias, phrases, lists = needs.sampling.logit_bias, needs.phrases, []
        outputs = self._upload(init.output_ids, np.int32) if needs.has_penalties or phrases else None
        if needs.has_penalties and outputs is not None:
            edits |= table.HAS_PENALTIES.value
            tables.counts[slot].zero_().index_add_(0, outputs, torch.ones_like(outputs))
            tables.prompt_mask[slot].zero_().index_fill_(0, self._upload(init.prompt_ids, np.int64), 1)
        if phrases and outputs is not None:
            edits |= table.HAS_PHRASES.value
            begin = len(init.prompt_ids)
            tables.history[slot].fill_(NO_TOKEN)[begin : begin + len(outputs)] = outputs
            lists.append(self._upload(phrases, np.int32))
            row[table.PHRASES.value] = lists[-1].data_ptr()
            row[table.NUM_PHRASES.value], row[table.PHRASE_LEN.value] = lists[-1].shape
        if needs.stop_ids:
            edits |= table.HAS_STOPS.value
            tables.unstopped[slot] = self._upload_words(needs.stop_ids)
        if needs.banned_ids:
            edits |= table.HAS_BANS.value
            tables.unbanned[slot] = self._upload_words(needs.banned_ids)
        if bias:
            edits |= table.HAS_BIAS.value
            values = np.fromiter(bias.values(), dtype=np.float32, count=len(bias)).view(np.int32)
            lists.append(self._upload([*bias, *values], np.int32))
            row[table.BIAS.value], row[table.NUM_BIAS.value] = lists[-1].data_ptr(), len(bias)
        self._lists[slot] = lists
        return edits

    def _upload_words(self, ids: Sequence[int]) -> Tensor:
        """[ceil(V / 32)] int32 on the device: bit t % 32 of word t // 32 is 0 for these ids."""
        words, tokens = np.full(self._tables.unbanned.shape[1], 2**32 - 1, dtype=np.uint32), np.asarray(ids)
        np.bitwise_and.at(words, tokens // 32, ~(np.uint32(1) << (tokens % 32).astype(np.uint32)))
        return self._upload(words.view(np.int32), np.int32)

    def _upload(self, values: Any, dtype: npt.DTypeLike) -> Tensor:
        """On the device; nobody waits for its way there."""
        tensor = torch.as_tensor(np.asarray(values, dtype=dtype))
        return (tensor.pin_memory() if self._pinned else tensor).to(self._device, non_blocking=True)

    def _host_zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, pin_memory=self._pinned)


def _buckets(max_batch_size: int) -> tuple[int, ...]:
    """Rows of the graphs: powers of two and the limit itself. A program of a padding row ends at once."""
    sizes = [2**n for n in range(max_batch_size.bit_length())]
    return (*(size for size in sizes if size < max_batch_size), max_batch_size)


def _columns_of(num_top: Sequence[int], token_ids: Tensor, rows: LogprobRows) -> LogprobColumns:
    num_rows = len(num_top)
    return LogprobColumns(
        num_top=num_top,
        token_ids=token_ids,
        logprobs=rows.logprobs[:num_rows],
        top_ids=rows.top_ids[:num_rows],
        top_logprobs=rows.top_logprobs[:num_rows],
    )
