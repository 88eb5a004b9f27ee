"""One rank: runs the model and the sampler over the plans of its engine. Implements `types.Rank`.

Owns the rank's slots (with SlotState), the running sums of embedding requests, and the lifetime of the model, cache and
sampler that it was given. An error in a step releases the peers, which then fail too: the engine takes its fatal path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from nmoe_backend.layers.layer_ops import StepShape
from nmoe_backend.model import DecoderModel
from nmoe_backend.parallel.ranks import RankContext
from nmoe_backend.runtime.batch import SlotState
from nmoe_backend.runtime.eager_steps import EagerSteps
from nmoe_backend.runtime.kv_cache import KVCache
from nmoe_backend.runtime.output import LogprobColumns, SampledTokens, StepOutput, StepResult
from nmoe_backend.runtime.sampler import Sampler
from nmoe_backend.runtime.step_graphs import StepGraphs
from nmoe_backend.step_buckets import Bucket, max_keys
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
        buckets: Sequence[Bucket] = (),
    ) -> None:
        """`buckets`: see StepGraphs; of no use to a table without padding."""
        self._model: DecoderModel | None = model
        self._kv_cache: KVCache | None = kv_cache
        self._sampler: Sampler | None = sampler
        self._context = context
        self._state = SlotState(limits, context.device, sampler.last_tokens)
        self._slots: dict[int, _Slot] = {}
        model.ops.allocate(
            StepShape(
                max_rows=limits.max_batch_size,
                max_tokens=limits.max_batch_size + limits.max_prefill_tokens,
                max_seq_len=limits.max_seq_len,
                max_keys=max_keys(limits),
            )
        )
        self._steps: StepGraphs | EagerSteps | None
        if model.ops.pads_steps:
            self._steps = StepGraphs(model, kv_cache.layers, self._state, limits, context, buckets, sampler.logits)
        else:
            self._steps = EagerSteps(model, kv_cache.layers, self._state, context, sampler.logits)
        if context.device.type == "cuda":
            torch.cuda.synchronize(context.device)  # loading ran on another stream than the steps will

    def execute(self, plan: StepPlan) -> PendingOutput:
        """Run this rank's share of the step. Raises RankError when a peer fails, and whatever went wrong here."""
        if self._steps is None:
            raise RankError(f"rank {self._context.rank} is closed. Start a new engine.")
        rank_plan = plan.ranks[self._context.rank]
        with self._context.activate():
            self._admit(rank_plan)
            forward = self._steps.run(plan)
            prompt_logprobs = self._prompt_logprobs(rank_plan, forward.hidden)
            embeddings = self._embeddings(rank_plan, forward.hidden)
            sampled = self._sample(rank_plan, forward.logits)
            return self._output(rank_plan, sampled, prompt_logprobs=prompt_logprobs, embeddings=embeddings)

    def capture(self, progress: Callable[[str], None]) -> None:
        """Prepare the steps; all ranks call it together, each from its own thread, before the first step."""
        assert self._steps is not None, "the worker is open"
        with self._context.activate():
            self._steps.capture(progress)
            self._require_sampler().capture(progress)

    def abort(self) -> None:
        """Make whatever waits for a peer give up with RankError. From any thread, idempotent."""
        self._context.abort()

    def close(self) -> None:
        """Release model, cache, sampler and exchange buffers. The rank's thread has ended. Idempotent."""
        if self._kv_cache is not None:
            self._kv_cache.close()
        self._model = self._kv_cache = self._sampler = self._steps = None
        self._slots.clear()
        self._context.close()

    def _admit(self, plan: RankPlan) -> None:
        for init in plan.admitted:
            self._slots[init.slot] = _Slot(init)
            self._require_sampler().admit(init)

    def _sample(self, plan: RankPlan, logits: Tensor) -> SampledTokens | None:
        """A token for each of the rows that sample; logits [N, V] are theirs."""
        rows = _sampling_rows(plan)
        if not rows:
            return None
        positions = [plan.starts[row] + plan.lengths[row] for row in rows]
        return self._require_sampler().sample(logits, [plan.slots[row] for row in rows], positions)

    def _prompt_logprobs(self, plan: RankPlan, hidden: Tensor) -> dict[int, list[LogprobColumns]]:
        """Row -> of prompt tokens [start + 1, start + length + 1), in parts: the head runs in slices of the chunk."""
        found: dict[int, list[LogprobColumns]] = {}
        ends = list(accumulate(plan.lengths))
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

    def _embeddings(self, plan: RankPlan, hidden: Tensor) -> dict[int, Tensor]:
        """Row -> mean [D] of the final hidden states over its prompt, with the chunk that ends it."""
        found: dict[int, Tensor] = {}
        ends = list(accumulate(plan.lengths))
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
