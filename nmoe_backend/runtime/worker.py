"""One rank: runs the model and the sampler over the plans of its engine. Implements `types.Rank`.

Owns the rank's slots (with SlotState), the running sums of embedding requests, and the lifetime of the model, cache and
sampler that it was given. An error in a step releases the peers, which then fail too: the engine takes its fatal path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nmoe_backend.layers.layer_ops import StepShape
from nmoe_backend.model import DecoderModel
from nmoe_backend.parallel.ranks import RankContext
from nmoe_backend.runtime.batch import SlotState
from nmoe_backend.runtime.decode import DecodeSteps, decode_buckets, is_decode_only
from nmoe_backend.runtime.kv_cache import KVCache
from nmoe_backend.runtime.output import LogprobColumns, SampledTokens, StepOutput, StepResult
from nmoe_backend.runtime.sampler import Sampler
from nmoe_backend.types import (
    EngineLimits,
    PendingOutput,
    RankError,
    RankPlan,
    SlotInit,
    StepPlan,
)

HEAD_ROWS = 256  # rows of the head at once for prompt logprobs: 132 MB of logits at a vocabulary of 129,280


@dataclass(slots=True)
class _Slot:
    """What a slot's sequence needs of its worker beyond pages and sampler state."""

    init: SlotInit
    hidden_sum: Tensor | None = field(default=None)  # [D] fp32, embedding requests only


class Worker:
    """Called from its rank's thread only, except `abort`."""

    def __init__(
        self,
        model: DecoderModel,
        kv_cache: KVCache,
        sampler: Sampler,
        limits: EngineLimits,
        context: RankContext,
        buckets: Sequence[int] = (),
    ) -> None:
        """`buckets`: rows of the decode steps that are prepared; left out, those of `decode_buckets`."""
        self._model: DecoderModel | None = model
        self._kv_cache: KVCache | None = kv_cache
        self._sampler: Sampler | None = sampler
        self._context = context
        self._state = SlotState(limits, context.device, sampler.last_tokens)
        self._slots: dict[int, _Slot] = {}
        self._max_tokens = limits.max_batch_size + limits.max_prefill_tokens
        self._decode: DecodeSteps | None = None
        shape = StepShape(max_rows=limits.max_batch_size, max_tokens=self._max_tokens, max_seq_len=limits.max_seq_len)
        model.ops.allocate(shape)
        if model.ops.pads_steps:
            sizes = buckets or decode_buckets(limits.max_batch_size)
            self._decode = DecodeSteps(model, kv_cache.layers, self._state, limits, context, sizes, sampler.logits)
        if context.device.type == "cuda":
            torch.cuda.synchronize(context.device)  # loading ran on another stream than the steps will

    def execute(self, plan: StepPlan) -> PendingOutput:
        """Run this rank's share of the step. Raises RankError when a peer fails, and whatever went wrong here."""
        model, kv_cache = self._model, self._kv_cache
        if model is None or kv_cache is None:
            raise RankError(f"rank {self._context.rank} is closed. Start a new engine.")
        rank_plan = plan.ranks[self._context.rank]
        with self._context.activate():
            self._admit(rank_plan)
            if self._decode is not None and is_decode_only(plan):
                return self._output(rank_plan, self._decode_step(self._decode, plan))
            batch = self._state.fill(plan, self._context.rank, self._padded_tokens(plan))
            hidden = model.forward(batch, kv_cache.layers)
            ends = _ends(rank_plan)
            prompt_logprobs = self._prompt_logprobs(rank_plan, ends, hidden)
            embeddings = self._embeddings(rank_plan, ends, hidden)
            sampled = self._sample(rank_plan, ends, hidden)
            return self._output(rank_plan, sampled, prompt_logprobs=prompt_logprobs, embeddings=embeddings)

    def capture(self, progress: Callable[[str], None]) -> None:
        """Prepare the decode steps; all ranks call it together, each from its own thread, before the first step."""
        with self._context.activate():
            if self._decode is not None:
                self._decode.capture(progress)
            self._require_sampler().capture(progress)

    def abort(self) -> None:
        """Make whatever waits for a peer give up with RankError. From any thread, idempotent."""
        self._context.abort()

    def close(self) -> None:
        """Release model, cache, sampler and exchange buffers. The rank's thread has ended. Idempotent."""
        if self._kv_cache is not None:
            self._kv_cache.close()
        self._model = self._kv_cache = self._sampler = self._decode = None
        self._slots.clear()
        self._context.close()

    def _admit(self, plan: RankPlan) -> None:
        for init in plan.admitted:
            self._slots[init.slot] = _Slot(init)
            self._require_sampler().admit(init)

    def _padded_tokens(self, step: StepPlan) -> int:
        """Tokens of a step with prefill where all ranks bring equally many: of 16, so that few kernels are compiled."""
        if self._decode is None:
            return 0
        most = max(plan.num_tokens for plan in step.ranks)
        return min(-(-most // 16) * 16, self._max_tokens)

    def _decode_step(self, decode: DecodeSteps, step: StepPlan) -> SampledTokens | None:
        plan = step.ranks[self._context.rank]
        logits = decode.run(step)
        if not plan.slots:
            return None
        assert all(plan.samples), "a decode row yields a token"
        return self._require_sampler().sample(logits, plan.slots, [start + 1 for start in plan.starts])

    def _sample(self, plan: RankPlan, ends: list[int], hidden: Tensor) -> SampledTokens | None:
        """The head and the sampler on the rows' last tokens, where asked for."""
        sampler, rows = self._require_sampler(), _sampling_rows(plan)
        if not rows:
            return None
        if len(rows) < hidden.shape[0]:
            hidden = hidden.index_select(0, self._index([ends[row] - 1 for row in rows]))
        out = None if sampler.logits is None else sampler.logits[: len(rows)]
        logits = self._require_model().logits(hidden, out)
        positions = [plan.starts[row] + plan.lengths[row] for row in rows]
        return sampler.sample(logits, [plan.slots[row] for row in rows], positions)

    def _prompt_logprobs(self, plan: RankPlan, ends: list[int], hidden: Tensor) -> dict[int, list[LogprobColumns]]:
        """Row -> of prompt tokens [start + 1, start + length + 1), in parts: the head runs in slices of the chunk."""
        found: dict[int, list[LogprobColumns]] = {}
        for row in range(plan.num_decode, len(plan.slots)):
            init = self._slots[plan.slots[row]].init
            num_top = init.sampling.num_prompt_logprobs
            start, length = plan.starts[row], plan.lengths[row]
            targets = init.prompt_ids[start + 1 : start + length + 1]
            if num_top is None or not targets:
                continue
            first = ends[row] - length
            found[row] = []
            for offset in range(0, len(targets), HEAD_ROWS):
                part = targets[offset : offset + HEAD_ROWS]
                logits = self._require_model().logits(hidden[first + offset : first + offset + len(part)])
                found[row].append(self._require_sampler().prompt_logprobs(logits, part, num_top))
        return found

    def _embeddings(self, plan: RankPlan, ends: list[int], hidden: Tensor) -> dict[int, Tensor]:
        """Row -> mean [D] of the final hidden states over its prompt, with the chunk that ends it."""
        found: dict[int, Tensor] = {}
        for row in range(plan.num_decode, len(plan.slots)):
            slot = self._slots[plan.slots[row]]
            if not slot.init.embed:
                continue
            start, length, prompt_len = plan.starts[row], plan.lengths[row], len(slot.init.prompt_ids)
            chunk = hidden[ends[row] - length : ends[row]].float().sum(0)
            slot.hidden_sum = chunk if slot.hidden_sum is None else slot.hidden_sum + chunk
            if start + length == prompt_len:
                found[row] = slot.hidden_sum / prompt_len
        return found

    def _index(self, values: Sequence[int]) -> Tensor:
        """[n] int64 on the device; nobody waits for its way there."""
        pinned = self._context.device.type == "cuda"
        return torch.tensor(values, dtype=torch.int64, pin_memory=pinned).to(self._context.device, non_blocking=True)

    def _output(self, plan: RankPlan, sampled: SampledTokens | None, **rest: Any) -> PendingOutput:
        """`rest`: what else StepResult holds."""
        if (exchange := self._require_model().exchange) is not None:
            rest |= {"error_word": exchange.error_word, "expert_rows": exchange.expert_rows}
        result = StepResult(sampled=sampled, sampling_rows=_sampling_rows(plan), **rest)
        return StepOutput(result, self._context.stream)

    def _require_model(self) -> DecoderModel:
        assert self._model is not None, "execute checks that the worker is open"
        return self._model

    def _require_sampler(self) -> Sampler:
        assert self._sampler is not None, "execute checks that the worker is open"
        return self._sampler


def _sampling_rows(plan: RankPlan) -> list[int]:
    """The rows whose last token yields a new one: row n of the sampler is that of index n."""
    return [row for row, samples in enumerate(plan.samples) if samples]


def _ends(plan: RankPlan) -> list[int]:
    """For each row, the index behind its last token among the step's tokens."""
    ends, total = [], 0
    for length in plan.lengths:
        total += length
        ends.append(total)
    return ends
