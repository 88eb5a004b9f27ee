"""What the scheduler knows of one sequence and of one rank: slots, pages, decode rows, and the plan being written.

Mechanism only: who gets in, who gets how much and who is thrown out is decided in scheduler_plan.py. One thread.

Decode rows persist from step to step as columns (`slots`, `starts`), because most of a step is the last step with
every position one further. A decoding sequence stands at position `base + step_id` in step `step_id`, so the steps in
which it needs a page or feeds its last token are known beforehand; the planner keeps them in buckets by step instead of
testing every row in every step.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence as Seq
from operator import attrgetter

from nmoe_backend.cache import BlockTable, PagePool
from nmoe_backend.types import EngineLimits, RankPlan, Request, SlotInit, TokenLogprobs, TokenSink

NEVER = -1  # a step that does not come; a row or slot that is not held
by_order = attrgetter("order")


class Sequence:
    """One request on its way. `rank` is set while it holds a slot and pages, `row` while it is one of the decode rows.

    `num_known` is what it feeds before it decodes: the prompt, after a preemption with the outputs so far. `num_fed`
    counts tokens in plans made so far and is kept up to date until it decodes.
    """

    __slots__ = (
        "announced",
        "base",
        "ended",
        "final_step",
        "grow_step",
        "is_new",
        "is_waiting",
        "num_fed",
        "num_known",
        "order",
        "output_ids",
        "prompt_logprobs",
        "prompt_logprobs_due",
        "put",
        "rank",
        "request",
        "resumable_after",
        "row",
        "sink",
        "slot",
        "stop_ids",
        "table",
        "tokens_left",
    )

    def __init__(self, request: Request, sink: TokenSink, stop_ids: frozenset[int], arrival_idx: int) -> None:
        assert request.sampling.max_tokens is not None, "max_tokens is resolved before a request reaches the scheduler"
        self.request = request
        self.sink = sink
        self.put = sink.put
        self.stop_ids = stop_ids
        self.order = (-request.priority, arrival_idx)  # smaller: served earlier, preempted later
        self.output_ids: list[int] = []
        self.tokens_left = 0 if request.embed else request.sampling.max_tokens
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs_due = request.sampling.num_prompt_logprobs is not None
        self.is_new = True  # was never admitted
        self.is_waiting = True  # stands in the queue
        self.ended = False
        self.rank: RankState | None = None
        self.slot = NEVER
        self.row = NEVER
        self.table: BlockTable | None = None
        self.announced = False  # its SlotInit is in a plan
        self.num_known = 0
        self.num_fed = 0
        self.base = 0  # position - step_id while it decodes
        self.grow_step = NEVER
        self.final_step = NEVER  # the step of its last decode row, if it is not stopped before
        self.resumable_after = 0  # every step up to this one must be committed before it may be admitted (again)


class RankState:
    """Slots, pages and rows of one rank, and the changes that go into its next plan."""

    def __init__(self, rank_idx: int, limits: EngineLimits) -> None:
        self.rank_idx = rank_idx
        self.pool = PagePool(limits.num_pages, limits.page_size)
        self.num_sequences = 0  # that hold a slot
        self.free_slots = list(range(limits.max_batch_size - 1, -1, -1))
        self.decoding: list[Sequence] = []  # decoding[i].row == i; parallel to slots and starts
        self.slots: list[int] = []
        self.starts: list[int] = []
        self.prefilling: list[Sequence] = []  # by order
        self.backlog = 0  # tokens that `prefilling` still has to feed
        self.pages_promised = 0  # pages that `prefilling` still has to get for that
        self.new_pages: list[tuple[int, int, int]] = []
        self.chunks: list[tuple[Sequence, int, int]] = []  # (sequence, start, length) of the plan being written

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence that feeds `num_tokens` may come in (the rule is argued in scheduler_plan.py)."""
        if not self.free_slots:
            return False
        spare = self.pool.num_free - self.pages_promised - self.num_sequences
        return self.pool.pages_for(num_tokens) <= spare

    def admit(self, seq: Sequence) -> None:
        """Give the sequence a slot and a place among the prefilling ones; pages come chunk by chunk."""
        seq.rank = self
        seq.slot = self.free_slots.pop()
        self.num_sequences += 1
        seq.table = BlockTable(self.pool, seq.request.request_id)
        seq.announced = False
        seq.num_known = len(seq.request.prompt_ids) + len(seq.output_ids)
        seq.num_fed = 0
        self.backlog += seq.num_known
        self.pages_promised += self.pool.pages_for(seq.num_known)
        insort(self.prefilling, seq, key=by_order)

    def grow(self, seq: Sequence, num_pages: int) -> None:
        """Add pages (that are free) to the sequence's block table."""
        table = seq.table
        assert table is not None, "a sequence on a rank has a block table"
        idx = len(table.pages)
        for page in table.extend(num_pages):
            self.new_pages.append((seq.slot, idx, page))
            idx += 1
        if seq.row == NEVER:
            self.pages_promised -= num_pages

    def feed(self, seq: Sequence, length: int) -> None:
        """Put a chunk of `length` tokens, whose pages are there, into the plan."""
        self.chunks.append((seq, seq.num_fed, length))
        seq.num_fed += length
        self.backlog -= length

    def start_decoding(self, seq: Sequence, step_id: int) -> None:
        """The whole of `num_known` is in plans up to the one before step_id, whose decode rows it joins."""
        self.prefilling.remove(seq)
        seq.row = len(self.decoding)
        seq.base = seq.num_fed - step_id
        self.decoding.append(seq)
        self.slots.append(seq.slot)
        self.starts.append(seq.num_fed)

    def release(self, seq: Sequence) -> None:
        """Take slot, pages and row away. Steps under way may still use them: see cache.py on why that is fine."""
        table = seq.table
        assert seq.rank is self and table is not None, (
            f"sequence {seq.request.request_id} is not on rank {self.rank_idx}"
        )
        if seq.row == NEVER:
            self.prefilling.remove(seq)
            self.backlog -= seq.num_known - seq.num_fed
            self.pages_promised -= table.num_missing(seq.num_known)
        else:
            self._drop_row(seq.row)
        if self.new_pages:  # pages that it got in the plan being written must not be announced for the next owner
            self.new_pages = [entry for entry in self.new_pages if entry[0] != seq.slot]
        table.release()
        self.free_slots.append(seq.slot)
        self.num_sequences -= 1
        seq.rank = seq.table = None
        seq.slot = seq.row = seq.grow_step = seq.final_step = NEVER

    def _drop_row(self, row: int) -> None:
        """The last row takes the place of this one."""
        last_seq, last_slot, last_start = self.decoding.pop(), self.slots.pop(), self.starts.pop()
        if row < len(self.decoding):
            self.decoding[row], self.slots[row], self.starts[row] = last_seq, last_slot, last_start
            last_seq.row = row

    def take_plan(self) -> RankPlan:
        """The plan as written: all decode rows, then the chunks. Afterwards every decode row stands one further."""
        num_decode = len(self.decoding)
        starts = self.starts
        # The plan keeps the old list, we go on with a new one: a plan is never touched again.
        self.starts = [start + 1 for start in starts]
        new_pages, self.new_pages = self.new_pages, []
        if not self.chunks:
            ones = (1,) * num_decode
            return RankPlan(
                slots=tuple(self.slots), starts=starts, lengths=ones, num_decode=num_decode,
                samples=(True,) * num_decode, new_pages=new_pages,
            )  # fmt: skip
        slots = list(self.slots)
        lengths = [1] * num_decode
        samples = [True] * num_decode
        token_ids: list[int] = []
        admitted: list[SlotInit] = []
        for seq, start, length in self.chunks:
            slots.append(seq.slot)
            starts.append(start)
            lengths.append(length)
            samples.append(start + length == seq.num_known and seq.tokens_left > 0)
            token_ids += _tokens(seq, start, start + length)
            if not seq.announced:
                seq.announced = True
                admitted.append(_slot_init(seq))
        return RankPlan(
            slots=slots, starts=starts, lengths=lengths, num_decode=num_decode, token_ids=token_ids,
            samples=samples, new_pages=new_pages, admitted=admitted,
        )  # fmt: skip

    def check_invariants(self) -> None:
        """Assert that slots, pages, rows and the running sums agree with each other."""
        held: Seq[Sequence] = [*self.decoding, *self.prefilling]
        self.pool.check_invariants([seq.table for seq in held if seq.table is not None])
        slots = sorted([*self.free_slots, *(seq.slot for seq in held)])
        total = len(self.free_slots) + len(held)
        assert self.num_sequences == len(held), f"rank {self.rank_idx} counts {self.num_sequences}, holds {len(held)}"
        assert slots == list(range(total)), f"rank {self.rank_idx}: slots {slots} are not each free or held once"
        assert all(seq.rank is self and not seq.ended for seq in held), f"rank {self.rank_idx} holds an ended sequence"
        assert self.slots == [seq.slot for seq in self.decoding] and len(self.starts) == len(self.decoding)
        assert all(seq.row == row for row, seq in enumerate(self.decoding)), f"rank {self.rank_idx}: rows are off"
        assert self.prefilling == sorted(self.prefilling, key=by_order), f"rank {self.rank_idx}: prefills out of order"
        backlog = sum(seq.num_known - seq.num_fed for seq in self.prefilling)
        assert self.backlog == backlog, f"rank {self.rank_idx}: backlog {self.backlog}, needs {backlog}"
        promised = sum(seq.table.num_missing(seq.num_known) for seq in self.prefilling if seq.table is not None)
        assert self.pages_promised == promised, (
            f"rank {self.rank_idx}: promised {self.pages_promised}, needs {promised}"
        )


def _tokens(seq: Sequence, start: int, stop: int) -> Seq[int]:
    """Tokens [start, stop) of prompt and outputs."""
    prompt = seq.request.prompt_ids
    if stop <= len(prompt):
        return prompt[start:stop]
    return [*prompt[start:], *seq.output_ids[max(0, start - len(prompt)) : stop - len(prompt)]]


def _slot_init(seq: Sequence) -> SlotInit:
    request = seq.request
    return SlotInit(
        slot=seq.slot,
        sampling=request.sampling,
        prompt_ids=request.prompt_ids,
        output_ids=tuple(seq.output_ids),
        stop_token_ids=tuple(seq.stop_ids),
        embed=request.embed,
    )
