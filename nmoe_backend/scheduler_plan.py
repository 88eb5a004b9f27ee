"""What goes into the next step: the queue's order, admission, chunked prefill and preemption.

Owns the queue and the ranks' states (scheduler_rank.py); knows nothing of sinks, deadlines or outputs. One thread.

Order. Higher priority first, then arrival; a preempted sequence keeps its place. The head of the queue is never passed
by others, so nobody starves.

Pages. A sequence comes in when its whole prompt fits besides what earlier prefills were promised, with one page in
reserve for each sequence on the rank: each can then grow by a page, so a newcomer lives for about page_size steps
before it can be preempted, and a prefill is not thrown away for nothing. (Asking for the first chunk's pages only
would start long prompts earlier, and then preempt them half-way.) Pages themselves are taken chunk by chunk. When they
run out, the last in order on that rank is preempted; the first in order of a rank never is, and always fits (a rank
holds max_seq_len tokens), so every step makes progress and every request ends.

Time. While anybody decodes, prefill is cut so that the predicted step stays under itl_target_ms. What counts is what
will be computed: where steps are padded, the bucket that the step will run in. On each rank with a waiting prompt the
first one advances all the same, by min_chunk tokens and what the bucket of these has room for, even where the model
says that this is too slow: a prompt that never advances would be worse. A chunk is at most twice the largest ever
measured while somebody decodes, so that an untrained model does not make anybody wait for its first mistake.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple

from nmoe_backend.scheduler_rank import NEVER, RankState, Sequence, by_order
from nmoe_backend.step_buckets import Bucket, cheapest, keys_of, step_buckets
from nmoe_backend.step_time import StepSize, StepTimeModel
from nmoe_backend.types import EngineLimits, RankPlan


class Prefill(NamedTuple):
    """The prefill of a rank in a step; of several ranks, the most of each."""

    tokens: int = 0
    keys: int = 0  # see Bucket
    pairs: float = 0.0  # see step_time.py

    def plus(self, start: int, length: int) -> Prefill:
        """With a chunk more."""
        pairs = length * (start + 0.5 * length)
        return Prefill(self.tokens + length, self.keys + keys_of(start, length), self.pairs + pairs)

    def or_more(self, other: Prefill) -> Prefill:
        return Prefill(max(self.tokens, other.tokens), max(self.keys, other.keys), max(self.pairs, other.pairs))


@dataclass(slots=True)
class Flight:
    """A step under way, and who its rows are."""

    step_id: int
    plans: tuple[RankPlan, ...]
    decoding: list[list[Sequence]]  # by rank, row order
    chunks: list[list[tuple[Sequence, int, int]]]  # by rank, row order: (sequence, start, length)
    size: StepSize
    prefill_tokens: int  # of the fullest rank


class Planner:
    """Writes one plan after the other; `committed` tells it which of them have come back."""

    def __init__(self, limits: EngineLimits) -> None:
        self._limits = limits
        self._min_chunk = limits.min_chunk
        self._target_s = limits.itl_target_ms / 1e3
        self._buckets = step_buckets(limits) if limits.pads_steps else ()
        self._model = StepTimeModel()
        self._most_measured = 0  # prefill tokens of a step
        self.ranks = tuple(RankState(rank_idx, limits) for rank_idx in range(limits.num_ranks))
        self._queue: list[tuple[tuple[int, int], Sequence]] = []  # heap by order; ended ones are dropped lazily
        self._grow_at: dict[int, list[Sequence]] = {}  # step -> decode rows that need a page in it
        self._final_at: dict[int, list[Sequence]] = {}  # step -> decode rows whose last one it is
        self._next_step = 1
        self.committed = 0  # the last step that came back
        self.num_new = 0  # wait for their first step
        self.num_preempted = 0  # wait for their next one
        self.preemptions_total = 0
        self.predicted_step_s = 0.0

    def enqueue(self, seq: Sequence) -> None:
        """Put a sequence at its place in the queue."""
        seq.is_waiting = True
        self._count_waiting(seq, 1)
        heapq.heappush(self._queue, (seq.order, seq))

    def remove(self, seq: Sequence) -> None:
        """The sequence has ended, wherever it stands."""
        seq.ended = True
        if seq.rank is not None:
            seq.rank.release(seq)
        elif seq.is_waiting:
            self._count_waiting(seq, -1)
            if len(self._queue) > 2 * (self.num_new + self.num_preempted) + 64:
                self._queue = [entry for entry in self._queue if not entry[1].ended]
                heapq.heapify(self._queue)

    def _count_waiting(self, seq: Sequence, change: int) -> None:
        if seq.is_new:
            self.num_new += change
        else:
            self.num_preempted += change

    def plan(self) -> Flight | None:
        """The plan of the next step, or None when no sequence can take part in one."""
        step_id = self._next_step
        self._grow_decoding(step_id)
        decode_rows = max(len(rank.decoding) for rank in self.ranks)
        target_s, most_tokens = math.inf, self._limits.max_prefill_tokens
        if decode_rows:
            target_s = self._target_s
            most_tokens = min(most_tokens, max(self._min_chunk, 2 * self._most_measured))
        if self._queue:
            longest = self._longest_chunk(decode_rows, Prefill(), Prefill(), 0, most_tokens, target_s)
            self._admit(max(min(self._min_chunk, most_tokens), longest))
        prefill = Prefill()
        for rank in self.ranks:
            if rank.prefilling:
                prefill = self._fill(rank, decode_rows, prefill, most_tokens, target_s)
        decode_rows = max(len(rank.decoding) for rank in self.ranks)
        if not decode_rows and not prefill.tokens:
            return None
        size = self._size(decode_rows, prefill)
        self.predicted_step_s = self._model.predict(size)
        return self._launch(step_id, size, prefill.tokens)

    def observe(self, flight: Flight, seconds: float) -> None:
        """How long a step took."""
        self._most_measured = max(self._most_measured, flight.prefill_tokens)
        self._model.observe(flight.size, seconds)

    def _size(self, decode_rows: int, prefill: Prefill) -> StepSize:
        """What a step computes."""
        tokens = decode_rows + prefill.tokens
        if self._buckets:
            keys = min(prefill.keys, self._buckets[-1].keys)  # what is asked of an estimate may be more than there is
            tokens = cheapest(self._buckets, Bucket(prefill.tokens, keys, decode_rows)).size
        return StepSize(decode_rows, tokens, prefill.pairs)

    def _longest_chunk(
        self, decode_rows: int, mine: Prefill, others: Prefill, start: int, most: int, target_s: float
    ) -> int:
        """Of at most `most` tokens from position `start`, behind what the rank has already and beside what `others`
        have, so that the step takes target_s at most."""

        def seconds(length: int) -> float:
            return self._model.predict(self._size(decode_rows, mine.plus(start, length).or_more(others)))

        if target_s == math.inf or most <= 0 or seconds(most) <= target_s:
            return most
        return bisect_right(range(1, most), target_s, key=seconds)

    def _least_chunk(self, decode_rows: int, start: int, most: int) -> int:
        """By what a rank's first prompt advances in any case: min_chunk, and what is computed beside it anyway."""
        length = min(self._min_chunk, most)
        if not self._buckets:
            return length
        bucket = cheapest(self._buckets, Bucket(length, keys_of(start, length), decode_rows))
        longer = min(bucket.tokens, most)
        return longer if keys_of(start, longer) <= bucket.keys else length

    def _grow_decoding(self, step_id: int) -> None:
        """Give a page to each decode row that crosses a page boundary in this step; first in order first."""
        due = self._grow_at.pop(step_id, None)
        if due is None:
            return
        # In order, so that nobody gets a page and loses it again to the next.
        for seq in sorted(due, key=by_order):
            rank = seq.rank
            if seq.grow_step != step_id or rank is None:  # it ended, or was preempted
                continue
            if rank.pool.num_free or self._make_room(rank, seq, 1):
                rank.grow(seq, 1)
                self._arm(seq, step_id + 1)
            else:
                self._preempt(rank, seq)

    def _arm(self, seq: Sequence, from_step: int) -> None:
        """Note the next step in which something happens to a decode row: it needs a page, or it is its last."""
        page_size = self._limits.page_size
        grow_step = from_step + -(seq.base + from_step) % page_size
        if seq.final_step < grow_step:
            seq.grow_step = NEVER
            self._final_at.setdefault(seq.final_step, []).append(seq)
        else:
            seq.grow_step = grow_step
            self._grow_at.setdefault(grow_step, []).append(seq)

    def _make_room(self, rank: RankState, seq: Sequence, num_pages: int) -> bool:
        """Preempt others on the rank, the last in order first, never one before `seq`. False: still too few pages."""
        while rank.pool.num_free < num_pages:
            victim = max([*rank.decoding, *rank.prefilling], key=by_order)
            if victim is seq:
                return False
            self._preempt(rank, victim)
        return True

    def _preempt(self, rank: RankState, seq: Sequence) -> None:
        """Back to its place in the queue; its pages and slot are free at once."""
        rank.release(seq)
        seq.resumable_after = self._next_step - 1
        self.preemptions_total += 1
        self.enqueue(seq)

    def _admit(self, budget: int) -> None:
        """Bring in the head of the queue while some rank has a slot, pages and a share of this step for it."""
        queue = self._queue
        while queue:
            seq = queue[0][1]
            if seq.ended:
                heapq.heappop(queue)
                continue
            if seq.resumable_after > self.committed:
                return
            rank = self._choose_rank(seq, budget)
            if rank is None:
                return
            heapq.heappop(queue)
            self._count_waiting(seq, -1)
            if seq.is_new and seq.request.on_start is not None:
                seq.request.on_start()
            seq.is_waiting = seq.is_new = False
            rank.admit(seq)

    def _choose_rank(self, seq: Sequence, budget: int) -> RankState | None:
        """The rank that serves it first, then the one with the fewest sequences, then the one with the most pages.

        A rank whose earlier prompts fill this step already takes none: the choice is better made when it can start.
        """
        num_tokens = len(seq.request.prompt_ids) + len(seq.output_ids)
        best: RankState | None = None
        best_load = (0, 0, 0)
        for rank in self.ranks:
            backlog = rank.backlog
            if backlog >= budget and rank.prefilling[0].order < seq.order:
                continue
            load = (backlog // budget, rank.num_sequences, rank.pool.num_used)
            if (best is None or load < best_load) and rank.fits(num_tokens):
                best, best_load = rank, load
        return best

    def _fill(self, rank: RankState, decode_rows: int, others: Prefill, most_tokens: int, target_s: float) -> Prefill:
        """Write the rank's prefill chunks, in order, beside what `others` have; returns the most of all."""
        mine = Prefill()
        for seq in rank.prefilling.copy():
            if seq.rank is not rank:  # preempted for one before it
                continue
            start = seq.num_fed
            most = min(seq.num_known - start, most_tokens - mine.tokens)
            length = self._longest_chunk(decode_rows, mine, others, start, most, target_s)
            if mine.tokens == 0:
                length = max(length, self._least_chunk(decode_rows, start, most))
            length = self._take_pages(rank, seq, length)
            if length <= 0:
                break  # nobody passes it
            rank.feed(seq, length)
            mine = mine.plus(start, length)
        return mine.or_more(others)

    def _take_pages(self, rank: RankState, seq: Sequence, length: int) -> int:
        """Get the pages of the sequence's next `length` tokens, or of as many as pages can be had for."""
        table = seq.table
        assert table is not None, "a prefilling sequence has a block table"
        missing = table.num_missing(seq.num_fed + length) if length > 0 else 0
        if not missing:
            return length
        if rank.pool.num_free < missing and not self._make_room(rank, seq, missing):
            missing = rank.pool.num_free
            length = (len(table.pages) + missing) * rank.pool.page_size - seq.num_fed
        rank.grow(seq, missing)
        return length

    def _launch(self, step_id: int, size: StepSize, prefill_tokens: int) -> Flight:
        """Freeze the plan and move every sequence on to where it stands after it."""
        decoding = [rank.decoding.copy() for rank in self.ranks]
        plans = tuple(rank.take_plan() for rank in self.ranks)
        chunks = []
        for rank in self.ranks:
            rank_chunks, rank.chunks = rank.chunks, []
            chunks.append(rank_chunks)
            for seq, start, length in rank_chunks:
                if start + length == seq.num_known:
                    self._prefill_done(rank, seq, step_id)
        for seq in self._final_at.pop(step_id, ()):
            if seq.final_step == step_id and seq.rank is not None:
                seq.rank.release(seq)
        self._next_step = step_id + 1
        return Flight(step_id, plans, decoding, chunks, size, prefill_tokens)

    def _prefill_done(self, rank: RankState, seq: Sequence, step_id: int) -> None:
        """The last chunk is in this plan: decode from the next one on, or release when no further row will come."""
        if seq.tokens_left <= 1:
            rank.release(seq)
            return
        rank.start_decoding(seq, step_id + 1)
        seq.final_step = step_id + seq.tokens_left - 1
        self._arm(seq, step_id + 1)

    def check_invariants(self) -> None:
        """Assert what must hold between any two calls."""
        for rank in self.ranks:
            rank.check_invariants()
        waiting = [seq for _, seq in self._queue if not seq.ended]
        assert len(waiting) == self.num_new + self.num_preempted, "the queue's counters are off"
        assert len({id(seq) for seq in waiting}) == len(waiting), "a sequence waits twice"
        assert all(seq.rank is None and seq.is_waiting for seq in waiting), "a waiting sequence holds a slot"
