"""The words that every layer shares: requests, plans, outputs, errors and the Rank protocol.

Owns no behaviour. Standard library only: the control plane and its tests run on a machine without torch.

Invariants:
* Everything that crosses a thread is frozen, or is handed over and never touched again by the giver.
* Positions are absolute token indices in a sequence (0 = first prompt token); intervals are half-open, `[a, b)`.
* Times named `*_s` are seconds of `time.monotonic()` unless a docstring says otherwise.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence as Seq
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, Protocol

FinishReason = Literal["stop", "length", "cancelled", "error"]
# What a grammar is written in: TensorRT-LLM's names, and two of ours (choice, lark).
GuideType = Literal["json", "json_schema", "regex", "ebnf_grammar", "choice", "lark"]

MAX_TOP_LOGPROBS = 20  # alternatives of one token, as in the OpenAI API
KEY_BLOCK = 128  # prefill's keys are counted in whole blocks, each row's for itself


class NmoeError(Exception):
    """Base of every error that this project raises on purpose. The text says got, need, do."""


class ConfigError(NmoeError):
    """The configuration, the machine or the checkpoint cannot work; raised at load, before anything is allocated."""


class ErrorKind(enum.Enum):
    """Why a request failed. The edge maps it to a status (Triton code, HTTP status); metrics use it as a label."""

    INVALID = "invalid"  # the client must change the request
    OVERLOADED = "overloaded"  # the queue is full: try again later
    DEADLINE = "deadline"  # the request's own deadline passed
    CANCELLED = "cancelled"  # the client went away or asked to stop
    NOT_FOUND = "not_found"  # names something that does not exist here (an adapter)
    UNAVAILABLE = "unavailable"  # draining, not ready
    ENGINE = "engine"  # our fault: the engine died


class RequestError(NmoeError):
    """One request cannot be served; it goes to that client only and nothing else is affected."""

    def __init__(self, message: str, kind: ErrorKind = ErrorKind.INVALID) -> None:
        super().__init__(message)
        self.kind = kind


class RankError(NmoeError):
    """A rank failed or did not answer in time. Fatal for its engine: the state of its KV pages is unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guide:
    """A grammar as the client wrote it."""

    type: GuideType
    text: str


class TokenMatcher(Protocol):
    """Where one sequence stands in its grammar. Used by its rank's thread only."""

    def advance(self, token_ids: Seq[int]) -> None:
        """The sequence goes on with these tokens. One that the grammar refuses is an `error` from then on."""

    def error(self) -> RequestError | None:
        """Why this sequence cannot go on: a limit of the matcher, or a token that should never have been sampled."""


class Grammar(Protocol):
    """A compiled guide. Immutable, shared by requests; any thread."""

    def matcher(self) -> TokenMatcher:
        """At the beginning of a text."""

    def fill_masks(self, matchers: Seq[TokenMatcher], bitmask: memoryview) -> None:
        """Row i of bitmask [len(matchers), ceil(V / 32)] int32: bit t % 32 of word t // 32 says whether matchers[i]
        allows token t next. Matchers of any grammar of the same compiler. Runs without the interpreter's lock."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to choose the next token, and when to stop. Values are already validated (contract.py, api/).

    Order of operations on the logits: logit_bias, repetition, presence and frequency penalties, bans (bad words;
    stop ids below min_tokens), the grammar, then temperature, top_k, top_p, min_p, and one draw. Bans that leave no
    token are dropped; the grammar never is. Logprobs are those of the model before all of that (log_softmax of the raw
    logits), as in vLLM and the OpenAI API.
    """

    max_tokens: int | None = None  # None: whatever remains of max_seq_len; the engine resolves it
    min_tokens: int = 0
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output (HF)
    presence_penalty: float = 0.0  # over output (OpenAI)
    frequency_penalty: float = 0.0  # over output (OpenAI)
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    bad_words_ids: tuple[tuple[int, ...], ...] = ()  # token sequences that must not appear in the output
    seed: int | None = None  # None: the engine draws one; [0, 2**64)
    stop: tuple[str, ...] = ()  # stop strings; the responder looks for them
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    num_logprobs: int | None = None  # None = none; n = the sampled token's and the n most likely ones
    num_prompt_logprobs: int | None = None
    grammar: Grammar | None = None  # only tokens that it allows are picked; where it may end, EOS is one of them


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One generation (or, with `embed`, one embedding) for one prompt."""

    request_id: int  # ours, unique in the process; clients' ids collide
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    arrival_s: float
    priority: int = 0  # higher first
    deadline_s: float | None = None
    client_id: str = ""  # the client's own id: for logs and allow_stop_by_id only
    adapter: str | None = None
    embed: bool = False  # return the mean of the last hidden state over the prompt; generates nothing
    # called once, by the engine's thread, when its first chunk is planned: it waits no longer; must not block or raise
    on_start: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability of one token and of the most likely alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class TokenSink(Protocol):
    """Where the engine puts what a request produces. Called from the engine thread only; must never block.

    Exactly one of `put(..., finish_reason=...)` and `close` ends a request; nothing follows it.
    """

    def put(
        self, token_id: int, logprobs: TokenLogprobs | None = None, finish_reason: FinishReason | None = None
    ) -> None:
        """One generated token; the last one carries the finish reason."""

    def put_prompt_logprobs(self, logprobs: list[TokenLogprobs]) -> None:
        """Logprobs of prompt tokens [1, len): complete, once, before the first token or the close."""

    def put_embedding(self, embedding: list[float]) -> None:
        """[D] mean hidden state; followed by close("stop")."""

    def close(self, finish_reason: FinishReason, error: RequestError | None = None) -> None:
        """Ends without a further token (cancelled, error, max_tokens = 0, a stop string found by the responder)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLimits:
    """What one replica can hold. All but max_seq_len and max_queue_size are per rank."""

    num_ranks: int
    num_pages: int
    page_size: int  # tokens a page
    max_batch_size: int  # sequences (= slots) of a rank
    max_prefill_tokens: int  # prefill tokens of a rank in one step
    max_seq_len: int  # prompt + output tokens of a sequence
    max_queue_size: int  # requests that wait for their first step
    itl_target_ms: float  # bound on the predicted time of a step in which somebody decodes
    rank_timeout_s: float  # a step that takes longer is a dead rank
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    min_chunk: int = 32  # prefill tokens by which a rank's first waiting prompt advances in every step
    pads_steps: bool = False  # a step computes all tokens of its bucket (step_buckets.py)


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotInit:
    """A sequence takes a slot of a rank: the sampler's state of that slot starts from this."""

    slot: int
    sampling: SamplingParams  # seed and max_tokens resolved
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...] = ()  # not empty after a preemption
    stop_token_ids: tuple[int, ...] = ()  # all ids that end it (EOS too); banned below min_tokens
    embed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlan:
    """One rank's share of a step, in columns; row i is one sequence. Decode rows come first.

    Rows `[0, num_decode)` feed one token each: the one that the rank sampled last for that slot, which never left the
    device. The other rows are prefill chunks, whose tokens stand back to back in `token_ids`.
    Block tables live on the rank, a row a slot; a plan carries only what changed. A slot's table is stale until the
    plan that admits a new sequence to it, and every page that a row touches was announced in this plan or before.

    Example (page_size 4): slot 2 decodes at position 9; slot 0 is admitted and feeds prompt tokens [0, 6) of 6:
        slots=(2, 0) starts=(9, 0) lengths=(1, 6) num_decode=1 token_ids=(t0..t5) samples=(True, True)
        new_pages=((0, 0, 7), (0, 1, 3)) admitted=(SlotInit(slot=0, ...),)
    """

    slots: Seq[int] = ()
    starts: Seq[int] = ()  # position of the row's first token
    lengths: Seq[int] = ()
    num_decode: int = 0
    token_ids: Seq[int] = ()
    samples: Seq[bool] = ()  # the row's last token yields a new token
    new_pages: Seq[tuple[int, int, int]] = ()  # (slot, index in its block table, page)
    admitted: Seq[SlotInit] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that the rank feeds in this step."""
        return self.num_decode + len(self.token_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """One step of a replica: every rank runs it, the ones without rows too."""

    step_id: int  # 1, 2, 3, ...
    ranks: tuple[RankPlan, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RankOutput:
    """What one rank produced in a step."""

    token_ids: Seq[int]  # one per row with samples=True, in row order
    logprobs: Mapping[int, TokenLogprobs] = field(default_factory=dict)  # row -> of its sampled token
    # row -> of the prompt tokens in [start + 1, start + length + 1)
    prompt_logprobs: Mapping[int, list[TokenLogprobs]] = field(default_factory=dict)
    embeddings: Mapping[int, list[float]] = field(default_factory=dict)  # row -> [D], with the prompt's last chunk
    failed: Mapping[int, RequestError] = field(default_factory=dict)  # row -> why only its request ends; no token of it
    error_word: int = 0  # not 0: a barrier gave up on rank error_word - 1; the engine takes its fatal path
    # rows that each expert of this rank has computed since load, all layers together; () where nobody counted
    expert_rows: Seq[int] = ()


class PendingOutput(Protocol):
    """The handle of a launched step."""

    def wait(self, timeout_s: float) -> RankOutput:
        """Block (without the GIL) until the step is done. Raises RankError after timeout_s or on failure."""


class Rank(Protocol):
    """One rank as the engine sees it. `execute` is called from that rank's own thread only, in step order."""

    def execute(self, plan: StepPlan) -> PendingOutput:
        """Launch `plan.ranks[rank]`. May return before the device is done; may block on its peers."""

    def abort(self) -> None:
        """From any thread: make whatever waits for a peer give up with RankError. Idempotent."""

    def close(self) -> None:
        """Release device memory. The thread has ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """A snapshot for metrics and tests; counters are since start."""

    num_running: int
    num_waiting: int
    num_slots: int
    pages_used: int
    pages_total: int
    pages_used_per_rank: tuple[int, ...]
    running_per_rank: tuple[int, ...]
    steps_total: int
    preemptions_total: int
    prompt_tokens_total: int  # prompt tokens computed, recomputation after a preemption included
    generation_tokens_total: int
    requests_finished_total: Mapping[str, int]  # finish reason -> count
    errors_total: Mapping[str, int]  # ErrorKind.value -> count
    last_step_s: float
    predicted_step_s: float
    page_size: int = 0  # tokens
    backlog_per_rank: tuple[int, ...] = ()  # tokens that admitted sequences still feed before they decode
    busy_s: float = 0.0  # sum of all steps' durations
    recent_steps: tuple[tuple[float, float], ...] = ()  # the newest: (when it was done, its duration)
    error_words_total: int = 0  # steps in which a rank reported an error word
    expert_rows_per_rank: tuple[tuple[int, ...], ...] = ()  # since start, an entry for each expert of the rank


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceUse:
    """What the devices of a server do at a moment."""

    gpu_percent: Mapping[str, float]  # CUDA ordinal -> percent of time in which a kernel ran; "none": 0 on a CPU
    gpu_bytes: int  # of device memory that this process holds
    host_bytes: int  # of memory that this process holds
