"""Ranks without a model: they check every plan against the contract of types.RankPlan and answer from the true history.

A FakeRank keeps what a real rank keeps (block tables, what each page holds, the last sampled token of a slot) and
derives each token from a hash of all tokens that stand in the pages of that sequence. So a wrong page, a stale table, a
token fed twice or an output lost in a preemption changes the tokens, and most mistakes fail an assertion before that.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Mapping, Sequence as Seq
from dataclasses import dataclass, field

from nmoe_backend.types import (
    EngineLimits,
    FinishReason,
    RankError,
    RankOutput,
    RankPlan,
    Request,
    RequestError,
    SamplingParams,
    SlotInit,
    StepPlan,
    TokenLogprobs,
)

TokenFn = Callable[[Seq[int], int], int]  # (all tokens so far, vocab_size) -> next token


def hash_token(history: Seq[int], vocab_size: int) -> int:
    """A token that depends on every token before it."""
    return zlib.crc32(b"".join(token.to_bytes(4, "little") for token in history)) % vocab_size


def expected_tokens(request: Request, limits: EngineLimits, token_fn: TokenFn = hash_token) -> list[int]:
    """What a request must produce whatever else runs: the reference that engine and scheduler are compared with."""
    sampling = request.sampling
    most = limits.max_seq_len - len(request.prompt_ids) if sampling.max_tokens is None else sampling.max_tokens
    stop_ids = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(limits.eos_token_ids))
    history = list(request.prompt_ids)
    for count in range(1, most + 1):
        history.append(token_fn(history, limits.vocab_size))
        if history[-1] in stop_ids and count > sampling.min_tokens:
            break
    return history[len(request.prompt_ids) :]


def make_limits(**changes: object) -> EngineLimits:
    """Small limits for tests; every field can be changed."""
    values: dict[str, object] = {
        "num_ranks": 2,
        "num_pages": 16,
        "page_size": 4,
        "max_batch_size": 4,
        "max_prefill_tokens": 16,
        "max_seq_len": 64,
        "max_queue_size": 64,
        "itl_target_ms": 1e9,
        "rank_timeout_s": 10.0,
        "eos_token_ids": (),
        "vocab_size": 1000,
    }
    return EngineLimits(**{**values, **changes})  # type: ignore[arg-type]


def make_request(request_id: int, prompt: Seq[int], max_tokens: int | None = 4, **changes: object) -> Request:
    """A request; keyword arguments that SamplingParams knows go there, the others to Request."""
    sampling = {name: changes.pop(name) for name in list(changes) if name in SamplingParams.__slots__}
    values: dict[str, object] = {"arrival_s": 0.0, **changes}
    return Request(
        request_id=request_id,
        prompt_ids=tuple(prompt),
        sampling=SamplingParams(**{"max_tokens": max_tokens, "seed": 0, **sampling}),  # type: ignore[arg-type]
        **values,  # type: ignore[arg-type]
    )


class VirtualClock:
    """Time that passes only when somebody says so."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s
        self._lock = threading.Lock()

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        with self._lock:
            self.now_s += seconds

    def advance_to(self, now_s: float) -> None:
        with self._lock:
            self.now_s = max(self.now_s, now_s)


class CollectingSink:
    """A TokenSink that keeps what it gets, and asserts that nothing follows the end."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs | None] = []
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        self.embedding: list[float] | None = None
        self.finish_reason: FinishReason | None = None
        self.error: RequestError | None = None
        self._done = threading.Event()
        self._progress = threading.Condition()

    def put(
        self, token_id: int, logprobs: TokenLogprobs | None = None, finish_reason: FinishReason | None = None
    ) -> None:
        assert self.finish_reason is None, "a token after the end"
        with self._progress:
            self.token_ids.append(token_id)
            self.logprobs.append(logprobs)
            self._progress.notify_all()
        if finish_reason is not None:
            self.finish_reason = finish_reason
            self._done.set()

    def put_prompt_logprobs(self, logprobs: list[TokenLogprobs]) -> None:
        assert self.finish_reason is None and self.prompt_logprobs is None and not self.token_ids
        self.prompt_logprobs = logprobs

    def put_embedding(self, embedding: list[float]) -> None:
        assert self.finish_reason is None and self.embedding is None
        self.embedding = embedding

    def close(self, finish_reason: FinishReason, error: RequestError | None = None) -> None:
        assert self.finish_reason is None, "closed twice"
        self.finish_reason, self.error = finish_reason, error
        self._done.set()

    @property
    def is_done(self) -> bool:
        return self.finish_reason is not None

    def wait(self, timeout_s: float = 30.0) -> FinishReason:
        """Until the end; for engines with threads."""
        assert self._done.wait(timeout_s), f"no end after {timeout_s} s and {len(self.token_ids)} tokens"
        assert self.finish_reason is not None
        return self.finish_reason

    def wait_for_tokens(self, count: int, timeout_s: float = 30.0) -> None:
        """Until at least `count` tokens have come."""
        with self._progress:
            assert self._progress.wait_for(lambda: len(self.token_ids) >= count, timeout_s), (
                f"{len(self.token_ids)} of {count} tokens after {timeout_s} s"
            )


@dataclass
class _Slot:
    """What a rank knows of the sequence in a slot."""

    init: SlotInit
    table: dict[int, int] = field(default_factory=dict)  # index -> page
    num_written: int = 0
    last_token: int | None = None  # sampled, not fed yet


class PlanChecker:
    """Runs plans on pretended pages and asserts the contract. Used by FakeRank and, without threads, by the gate."""

    def __init__(self, limits: EngineLimits, rank_idx: int = 0, token_fn: TokenFn = hash_token) -> None:
        self.limits = limits
        self.rank_idx = rank_idx
        self.token_fn = token_fn
        self.slots: dict[int, _Slot] = {}
        self.page_of: dict[int, tuple[int, int]] = {}  # page -> (slot, index) that it was announced for last
        self.memory: dict[tuple[int, int], int] = {}  # (page, offset) -> token: the KV cache
        self.last_step = 0

    def run(self, step: StepPlan) -> RankOutput:
        """Execute this rank's share."""
        assert step.step_id == self.last_step + 1, f"step {step.step_id} after {self.last_step}"
        assert len(step.ranks) == self.limits.num_ranks
        self.last_step = step.step_id
        plan = step.ranks[self.rank_idx]
        self._check_shape(plan)
        for init in plan.admitted:
            self._admit(init)
        for slot, idx, page in plan.new_pages:
            assert slot in plan.slots, f"page {page} is announced for slot {slot}, which has no row in this plan"
            self._announce(slot, idx, page)
        assert len({page for _, _, page in plan.new_pages}) == len(plan.new_pages), "a page is announced twice"
        token_ids: list[int] = []
        logprobs: dict[int, TokenLogprobs] = {}
        prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        embeddings: dict[int, list[float]] = {}
        offset = 0
        for row, (slot, start, length) in enumerate(zip(plan.slots, plan.starts, plan.lengths, strict=True)):
            state = self.slots[slot]
            assert start == state.num_written, f"slot {slot} starts at {start}, but {state.num_written} tokens stand"
            if row < plan.num_decode:
                assert length == 1 and state.last_token is not None, f"slot {slot} decodes without a sampled token"
                fed: Seq[int] = (state.last_token,)
            else:
                fed = plan.token_ids[offset : offset + length]
                offset += length
                known = [*state.init.prompt_ids, *state.init.output_ids]
                assert list(fed) == known[start : start + length], f"slot {slot} is fed the wrong tokens at {start}"
            self._write(slot, state, fed)
            history = self._history(slot, state)
            wanted = state.init.sampling.num_prompt_logprobs
            if wanted is not None and row >= plan.num_decode:
                tail = history[start + 1 :] + list(state.init.prompt_ids[start + length : start + length + 1])
                tail = tail[: max(0, len(state.init.prompt_ids) - start - 1)]
                prompt_logprobs[row] = [TokenLogprobs(token, -float(start + 1 + i)) for i, token in enumerate(tail)]
            if plan.samples[row]:
                state.last_token = self._sample(state, history)
                token_ids.append(state.last_token)
                if state.init.sampling.num_logprobs is not None:
                    logprobs[row] = TokenLogprobs(state.last_token, -float(len(history)))
            elif state.init.embed and len(history) == len(state.init.prompt_ids):
                embeddings[row] = [float(sum(history))]
        return RankOutput(
            token_ids=token_ids, logprobs=logprobs, prompt_logprobs=prompt_logprobs, embeddings=embeddings
        )

    def _check_shape(self, plan: RankPlan) -> None:
        rows = len(plan.slots)
        assert rows == len(plan.starts) == len(plan.lengths) == len(plan.samples)
        assert plan.num_decode <= rows <= self.limits.max_batch_size, f"{rows} rows, {self.limits.max_batch_size} slots"
        assert len(set(plan.slots)) == rows, "a slot has two rows"
        assert all(0 <= slot < self.limits.max_batch_size for slot in plan.slots)
        assert all(length >= 1 for length in plan.lengths)
        assert all(plan.samples[: plan.num_decode])
        assert sum(plan.lengths[plan.num_decode :]) == len(plan.token_ids) <= self.limits.max_prefill_tokens
        assert len({init.slot for init in plan.admitted}) == len(plan.admitted), "a slot is admitted twice"
        assert {init.slot for init in plan.admitted} <= set(plan.slots[plan.num_decode :])

    def _admit(self, init: SlotInit) -> None:
        assert init.sampling.max_tokens is not None and init.sampling.seed is not None
        assert len(init.output_ids) <= max(0, init.sampling.max_tokens)
        self.slots[init.slot] = _Slot(init)
        self.page_of = {page: where for page, where in self.page_of.items() if where[0] != init.slot}

    def _announce(self, slot: int, idx: int, page: int) -> None:
        assert 0 <= page < self.limits.num_pages
        table = self.slots[slot].table
        assert idx == len(table), f"slot {slot}: page index {idx} announced, {len(table)} expected"
        table[idx] = page
        self.page_of[page] = (slot, idx)

    def _write(self, slot: int, state: _Slot, tokens: Seq[int]) -> None:
        page_size = self.limits.page_size
        for token in tokens:
            idx, offset = divmod(state.num_written, page_size)
            page = state.table[idx]
            assert self.page_of[page] == (slot, idx), f"slot {slot} writes to page {page} of {self.page_of[page]}"
            if offset == 0:
                for other in range(page_size):
                    self.memory.pop((page, other), None)
            assert (page, offset) not in self.memory, f"page {page}, offset {offset} is written twice"
            self.memory[page, offset] = token
            state.num_written += 1
        needed = -(-state.num_written // page_size)
        assert len(state.table) == needed, f"slot {slot} has {len(state.table)} pages and needs {needed}"
        total = len(state.init.prompt_ids) + max(0, (state.init.sampling.max_tokens or 0) - 1)
        assert state.num_written <= total, f"slot {slot} feeds token {state.num_written} of at most {total}"

    def _history(self, slot: int, state: _Slot) -> list[int]:
        """Every token of the sequence, read through the block table."""
        for idx, page in state.table.items():
            assert self.page_of[page] == (slot, idx), f"page {page} of slot {slot} belongs to {self.page_of[page]} now"
        page_size = self.limits.page_size
        return [self.memory[state.table[pos // page_size], pos % page_size] for pos in range(state.num_written)]

    def _sample(self, state: _Slot, history: list[int]) -> int:
        return self.token_fn(history, self.limits.vocab_size)


class FakePending:
    """A step that is done, or waits for virtual or real time."""

    def __init__(self, output: RankOutput, on_wait: Callable[[float], None]) -> None:
        self._output = output
        self._on_wait = on_wait

    def wait(self, timeout_s: float) -> RankOutput:
        self._on_wait(timeout_s)
        return self._output


class FakeRank:
    """A types.Rank over a PlanChecker.

    step_s: seconds that a step takes, of its plan. With `clock` they pass on the virtual clock; without, they are real
        seconds in which the GIL is free, as in a graph replay.
    stall_at: from this step on `wait` blocks until `abort`, like a GPU that never answers.
    fail_at: in this step `execute` raises.
    error_words: step -> RankOutput.error_word.
    """

    def __init__(
        self,
        limits: EngineLimits,
        rank_idx: int = 0,
        *,
        token_fn: TokenFn = hash_token,
        step_s: Callable[[RankPlan], float] | None = None,
        clock: VirtualClock | None = None,
        stall_at: int | None = None,
        fail_at: int | None = None,
        error_words: Mapping[int, int] | None = None,
    ) -> None:
        self.checker = PlanChecker(limits, rank_idx, token_fn)
        self.step_s = step_s
        self.clock = clock
        self.stall_at = stall_at
        self.fail_at = fail_at
        self.error_words = dict(error_words or {})
        self.aborted = threading.Event()
        self.gate = threading.Event()  # clear it to hold back every step until it is set again
        self.gate.set()
        self.num_closed = 0
        self.thread_ids: set[int] = set()
        self.plans: list[RankPlan] = []  # every plan so far, for tests
        self._free_at_s = 0.0

    def execute(self, plan: StepPlan) -> FakePending:
        self.thread_ids.add(threading.get_ident())
        if self.aborted.is_set():
            raise RankError(f"rank {self.checker.rank_idx} was aborted")
        if plan.step_id == self.fail_at:
            raise RankError(f"rank {self.checker.rank_idx} fails in step {plan.step_id}, as it was told to")
        share = plan.ranks[self.checker.rank_idx]
        self.plans.append(share)
        output = self.checker.run(plan)
        word = self.error_words.get(plan.step_id, 0)
        if word:
            output = RankOutput(token_ids=output.token_ids, error_word=word)
        seconds = self.step_s(share) if self.step_s is not None else 0.0
        done_at_s = 0.0
        if self.clock is not None:
            done_at_s = self._free_at_s = max(self._free_at_s, self.clock()) + seconds
        stalled = self.stall_at is not None and plan.step_id >= self.stall_at

        def on_wait(timeout_s: float) -> None:
            if stalled or not self.gate.wait(timeout_s):
                self.aborted.wait(timeout_s)
                raise RankError(f"rank {self.checker.rank_idx} did not answer within {timeout_s:.3f} s")
            if self.clock is not None:
                self.clock.advance_to(done_at_s)
            elif seconds:
                self.aborted.wait(seconds)

        return FakePending(output, on_wait)

    def abort(self) -> None:
        self.aborted.set()

    def close(self) -> None:
        self.num_closed += 1
