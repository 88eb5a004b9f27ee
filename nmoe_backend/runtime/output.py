"""From what a step leaves on its device to a RankOutput: copies to pinned memory behind an event, numbers in `wait`.

A rank's thread starts the copies and goes on; whoever waits for the step turns tensors into Python objects. So no step
waits for the one before it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nmoe_backend.types import RankError, RankOutput, RequestError, TokenLogprobs

POLL_S = 50e-6  # of a CUDA event: cudaEventSynchronize has no time limit


@dataclass(frozen=True, kw_only=True, slots=True)
class LogprobColumns:
    """Log-probabilities of one token a line, and of the most likely alternatives, best first, equal ones by id."""

    num_top: Sequence[int]  # alternatives of each line; -1: nobody asked for it, and its line means nothing
    token_ids: Tensor  # [n] int64
    logprobs: Tensor  # [n] float64
    top_ids: Tensor  # [n, k >= max(num_top)] integers
    top_logprobs: Tensor  # [n, k] float64

    def on_host(self) -> LogprobColumns:
        """The same in host memory, once the stream has come there."""
        return replace(
            self,
            token_ids=_on_host(self.token_ids),
            logprobs=_on_host(self.logprobs),
            top_ids=_on_host(self.top_ids),
            top_logprobs=_on_host(self.top_logprobs),
        )

    def entries(self) -> dict[int, TokenLogprobs]:
        """By line, of those that were asked for. On the host only."""
        lines = [line for line, num in enumerate(self.num_top) if num >= 0]
        columns = (self.token_ids, self.logprobs, self.top_ids, self.top_logprobs)
        wanted = zip(lines, *(column[lines].tolist() for column in columns), strict=True)
        return {
            line: TokenLogprobs(token_id, logprob, tuple(zip(ids[: self.num_top[line]], values, strict=False)))
            for line, token_id, logprob, ids, values in wanted
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledTokens:
    """One step's choice: token_ids [N] int64 and, where a row asked, logprobs with N lines; on the device, valid until
    the next step.

    failed: row -> why its request must end; its token means nothing.
    """

    token_ids: Tensor
    logprobs: LogprobColumns | None = None
    failed: Mapping[int, RequestError] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a rank's step leaves on its device. Rows are those of the plan."""

    sampled: SampledTokens | None = None
    sampling_rows: Sequence[int] = ()  # of which row each sampled token is
    prompt_logprobs: Mapping[int, Sequence[LogprobColumns]] = field(default_factory=dict)
    embeddings: Mapping[int, Tensor] = field(default_factory=dict)  # row -> [D]
    error_word: Tensor | None = None  # [1] int32
    expert_rows: Tensor | None = None  # [E] int64, running totals: on a CPU the next step's may be in them

    def on_host(self) -> StepResult:
        """The same in host memory, once the stream has come there."""
        sampled = self.sampled
        if sampled is not None:
            logprobs = None if sampled.logprobs is None else sampled.logprobs.on_host()
            sampled = replace(sampled, token_ids=_on_host(sampled.token_ids), logprobs=logprobs)
        return replace(
            self,
            sampled=sampled,
            prompt_logprobs={row: [part.on_host() for part in parts] for row, parts in self.prompt_logprobs.items()},
            embeddings={row: _on_host(values) for row, values in self.embeddings.items()},
            error_word=None if self.error_word is None else _on_host(self.error_word),
            expert_rows=None if self.expert_rows is None else _on_host(self.expert_rows),
        )

    def read(self) -> RankOutput:
        """On the host only."""
        output = RankOutput(
            token_ids=(),
            prompt_logprobs={
                row: [entry for part in parts for entry in part.entries().values()]
                for row, parts in self.prompt_logprobs.items()
            },
            embeddings={row: values.tolist() for row, values in self.embeddings.items()},
            error_word=0 if self.error_word is None else int(self.error_word),
            expert_rows=() if self.expert_rows is None else self.expert_rows.tolist(),
        )
        if self.sampled is None:
            return output
        rows, logprobs = self.sampling_rows, self.sampled.logprobs
        return replace(
            output,
            token_ids=self.sampled.token_ids.tolist(),
            logprobs={} if logprobs is None else {rows[n]: entry for n, entry in logprobs.entries().items()},
            failed={rows[n]: error for n, error in self.sampled.failed.items()},
        )


class StepOutput:
    """`PendingOutput` of a launched step; `stream`: the rank's own, None on a CPU, where everything is there."""

    def __init__(self, result: StepResult, stream: torch.cuda.Stream | None) -> None:
        self._result = result.on_host()
        self._done = None
        if stream is not None:
            self._done = torch.cuda.Event()
            self._done.record(stream)

    def wait(self, timeout_s: float) -> RankOutput:
        deadline = time.monotonic() + timeout_s
        while self._done is not None and not self._done.query():
            if time.monotonic() > deadline:
                raise RankError(f"the device did not finish a step within {timeout_s:g} s; restart the replica.")
            time.sleep(POLL_S)
        return self._result.read()


def _on_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory that the current stream makes; what lies on the host stays there."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
