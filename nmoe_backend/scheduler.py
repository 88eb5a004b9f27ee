"""Which sequence does what in the next step: admission, chunked prefill, preemption, and the commit of what came back.

Owns every live request from `add` to its last `put` or `close`. One thread (the engine's) uses it. Never waits, and
never talks to a rank: it writes a StepPlan and reads RankOutputs.

Overlap. `schedule()` for step N+1 may be called before `commit(N)`, any number of steps deep: decode rows take their
input token on the device, so planning needs no ids. What follows from that:
* A sequence that ends in N by a stop id may have a wasted row in N+1; its output is discarded. Length is known
  beforehand: no row is planned past max_tokens, and slot and pages are released with the plan of the last row.
* Slot and pages of an ended or preempted sequence may be handed out in the very next plan, because every rank runs its
  plans in order: the new owner's first write comes after the old owner's last.
* A preempted sequence is not admitted again before its steps under way are committed. Then it feeds prompt + outputs
  and samples the next token as if nothing had happened (a draw depends on seed and position only).

Who gets into a step, and with how much, is decided in scheduler_plan.py.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence as Seq

from nmoe_backend.scheduler_plan import Flight, Planner
from nmoe_backend.scheduler_rank import RankState, Sequence
from nmoe_backend.types import (
    EngineLimits,
    ErrorKind,
    FinishReason,
    RankError,
    RankOutput,
    RankPlan,
    Request,
    RequestError,
    StepPlan,
    TokenLogprobs,
    TokenSink,
)


class Scheduler:
    """The requests of one replica and the state of its ranks."""

    def __init__(self, limits: EngineLimits) -> None:
        if limits.num_pages * limits.page_size < limits.max_seq_len:
            raise ValueError(
                f"num_pages={limits.num_pages} of {limits.page_size} tokens hold no sequence of "
                f"max_seq_len={limits.max_seq_len}: raise num_pages or lower max_seq_len"
            )
        self._limits = limits
        self._eos_ids = frozenset(limits.eos_token_ids)
        self.planner = Planner(limits)
        self._live: dict[int, Sequence] = {}
        self._deadlines: list[tuple[float, int]] = []  # heap of (deadline_s, request_id); may name ended ones
        self._flights: deque[Flight] = deque()
        self._num_arrivals = 0
        self.prompt_tokens_total = 0
        self.generation_tokens_total = 0
        self.error_words_total = 0
        self.expert_rows: list[Seq[int]] = [()] * limits.num_ranks  # of each rank: its last word
        self.finished_total: dict[str, int] = {"stop": 0, "length": 0, "cancelled": 0, "error": 0}
        self.errors_total: dict[str, int] = {kind.value: 0 for kind in ErrorKind}

    # Requests come and go

    @property
    def num_live(self) -> int:
        """Requests that have neither ended nor been closed."""
        return len(self._live)

    @property
    def num_new(self) -> int:
        """Requests that wait for their first step."""
        return self.planner.num_new

    @property
    def num_preempted(self) -> int:
        """Requests that wait for their next step after a preemption."""
        return self.planner.num_preempted

    @property
    def preemptions_total(self) -> int:
        return self.planner.preemptions_total

    @property
    def steps_total(self) -> int:
        return self.planner.committed

    @property
    def predicted_step_s(self) -> float:
        """What the model said of the step planned last."""
        return self.planner.predicted_step_s

    @property
    def ranks(self) -> tuple[RankState, ...]:
        """To look at, not to change."""
        return self.planner.ranks

    def add(self, request: Request, sink: TokenSink) -> None:
        """Queue a request; sampling.max_tokens and seed are resolved, and the request fits the limits."""
        if request.request_id in self._live:
            raise RequestError(f"request id {request.request_id} is in use: give every request an id of its own")
        stop_ids = self._eos_ids
        if request.sampling.ignore_eos:
            stop_ids = frozenset(request.sampling.stop_token_ids)
        elif request.sampling.stop_token_ids:
            stop_ids = stop_ids.union(request.sampling.stop_token_ids)
        self._num_arrivals += 1
        seq = Sequence(request, sink, stop_ids, self._num_arrivals)
        self._live[request.request_id] = seq
        self.planner.enqueue(seq)
        if request.deadline_s is not None:
            heapq.heappush(self._deadlines, (request.deadline_s, request.request_id))
            if len(self._deadlines) > 2 * len(self._live) + 64:
                self._deadlines = [entry for entry in self._deadlines if entry[1] in self._live]
                heapq.heapify(self._deadlines)

    def abort(self, request_id: int, reason: FinishReason, error: RequestError | None = None) -> bool:
        """End a request now; its pages are free for the next plan. False when it is not (or no longer) live."""
        seq = self._live.get(request_id)
        if seq is None:
            return False
        self._end(seq, reason, error)
        seq.sink.close(reason, error)
        return True

    def ids_of_client(self, client_id: str) -> list[int]:
        """Live requests that carry this (client's own) id."""
        return [request_id for request_id, seq in self._live.items() if seq.request.client_id == client_id]

    def expire(self, now_s: float) -> None:
        """End what has passed its deadline, waiting or running."""
        deadlines = self._deadlines
        while deadlines and deadlines[0][0] <= now_s:
            deadline_s, request_id = heapq.heappop(deadlines)
            seq = self._live.get(request_id)
            if seq is not None and seq.request.deadline_s == deadline_s:
                text = (
                    f"the deadline passed after {deadline_s - seq.request.arrival_s:.3f} s with "
                    f"{len(seq.output_ids)} tokens generated: allow more time or ask for fewer tokens"
                )
                self.abort(request_id, "error", RequestError(text, ErrorKind.DEADLINE))

    def drop_all(self, error: RequestError) -> list[TokenSink]:
        """Forget every request, when the engine ends; the caller closes the sinks.

        Touches neither pages nor slots: after a failure their state is unknown, and nobody will use them again.
        """
        sinks = [seq.sink for seq in self._live.values()]
        self._live.clear()
        self.finished_total["error"] += len(sinks)
        self.errors_total[error.kind.value] += len(sinks)
        self.planner.num_new = self.planner.num_preempted = 0
        return sinks

    def _end(self, seq: Sequence, reason: FinishReason, error: RequestError | None = None) -> None:
        """Take the sequence off the books. The caller tells the sink."""
        del self._live[seq.request.request_id]
        self.finished_total[reason] += 1
        if error is not None:
            self.errors_total[error.kind.value] += 1
        self.planner.remove(seq)

    # The next step

    def schedule(self) -> StepPlan | None:
        """The plan of the next step, or None when no sequence can take part in one."""
        flight = self.planner.plan()
        if flight is None:
            return None
        self._flights.append(flight)
        return StepPlan(step_id=flight.step_id, ranks=flight.plans)

    # What came back

    def commit(self, step_id: int, outputs: Seq[RankOutput], elapsed_s: float | None = None) -> None:
        """Take a step's outputs and tell the sinks. Raises RankError, before any sink hears, when a rank failed."""
        flight = self._flights[0]
        assert flight.step_id == step_id, f"step {step_id} committed, but {flight.step_id} is the oldest under way"
        for rank_idx, (plan, output) in enumerate(zip(flight.plans, outputs, strict=True)):
            if output.error_word:
                self.error_words_total += 1
                raise RankError(
                    f"rank {rank_idx} reports error word {output.error_word:#x} in step {step_id}: "
                    f"rank {output.error_word - 1} did not come to a barrier in time"
                )
            num_sampled = sum(plan.samples)
            if len(output.token_ids) != num_sampled:
                raise RankError(
                    f"rank {rank_idx}, step {step_id}: {len(output.token_ids)} tokens for {num_sampled} rows"
                )
        self._flights.popleft()
        self.planner.committed = step_id
        if elapsed_s is not None:
            self.planner.observe(flight, elapsed_s)
        for rank_idx, output in enumerate(outputs):
            self.expert_rows[rank_idx] = output.expert_rows or self.expert_rows[rank_idx]
        for decoding, chunks, plan, output in zip(flight.decoding, flight.chunks, flight.plans, outputs, strict=True):
            for row, error in output.failed.items():
                seq = decoding[row] if row < plan.num_decode else chunks[row - plan.num_decode][0]
                if not seq.ended:
                    self.abort(seq.request.request_id, "error", error)
            if decoding:
                self._commit_decoding(decoding, output)
            if chunks:
                self._commit_chunks(chunks, plan, output)

    def _commit_decoding(self, decoding: list[Sequence], output: RankOutput) -> None:
        """One token for each row; the loop that counts in a step's host time."""
        logprobs = output.logprobs
        num_wasted = 0
        row = -1
        for seq, token_id in zip(decoding, output.token_ids):  # noqa: B905 - chunks' tokens follow
            row += 1
            if seq.ended:
                num_wasted += 1
                continue
            seq.output_ids.append(token_id)
            seq.tokens_left -= 1
            if seq.tokens_left == 0 or token_id in seq.stop_ids:
                self._put(seq, token_id, logprobs.get(row))
            elif logprobs:
                seq.put(token_id, logprobs.get(row))
            else:
                seq.put(token_id)
        self.generation_tokens_total += len(decoding) - num_wasted

    def _put(self, seq: Sequence, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """Deliver a token that is in output_ids already, and end the sequence if it says so."""
        reason: FinishReason | None = None
        sampling = seq.request.sampling
        # Below min_tokens a stop id comes only where a grammar allows nothing else: the text is complete.
        if token_id in seq.stop_ids and (len(seq.output_ids) > sampling.min_tokens or sampling.grammar is not None):
            reason = "stop"
        elif seq.tokens_left == 0:
            reason = "length"
        if reason is not None:
            self._end(seq, reason)
        seq.put(token_id, logprobs, reason)

    def _commit_chunks(self, chunks: list[tuple[Sequence, int, int]], plan: RankPlan, output: RankOutput) -> None:
        """The plan's prefill rows."""
        row = next_token = plan.num_decode  # every decode row sampled
        for seq, start, length in chunks:
            self.prompt_tokens_total += length
            if not seq.ended and seq.prompt_logprobs_due:
                self._collect_prompt_logprobs(seq, start, output.prompt_logprobs.get(row, []))
            if plan.samples[row]:
                if not seq.ended:
                    token_id = output.token_ids[next_token]
                    seq.output_ids.append(token_id)
                    seq.tokens_left -= 1
                    self.generation_tokens_total += 1
                    self._put(seq, token_id, output.logprobs.get(row))
                next_token += 1
            elif not seq.ended and start + length == seq.num_known:
                self._finish_without_tokens(seq, output.embeddings.get(row))
            row += 1

    def _collect_prompt_logprobs(self, seq: Sequence, start: int, logprobs: list[TokenLogprobs]) -> None:
        """Add those of tokens [start + 1, ...) that are new: after a preemption early ones come again."""
        num_known = start - len(seq.prompt_logprobs)
        assert num_known <= 0, f"prompt logprobs of tokens [{len(seq.prompt_logprobs) + 1}, {start + 1}) never came"
        seq.prompt_logprobs += logprobs[-num_known:] if num_known else logprobs
        if len(seq.prompt_logprobs) >= len(seq.request.prompt_ids) - 1:
            seq.prompt_logprobs_due = False
            seq.sink.put_prompt_logprobs(seq.prompt_logprobs)

    def _finish_without_tokens(self, seq: Sequence, embedding: list[float] | None) -> None:
        """The prompt is through, and that was all: an embedding, or max_tokens = 0."""
        reason: FinishReason = "length"
        if seq.request.embed:
            if embedding is None:
                raise RankError(f"request {seq.request.request_id} asks for an embedding, but its rank sent none")
            seq.sink.put_embedding(embedding)
            reason = "stop"
        self._end(seq, reason)
        seq.sink.close(reason)

    def check_invariants(self) -> None:
        """Assert what must hold between any two calls."""
        self.planner.check_invariants()
        for request_id, seq in self._live.items():
            assert seq.request.request_id == request_id and not seq.ended, f"request {request_id} ended but is live"
