"""The steps of a table of operations that takes any size: laid out on the host, run as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nmoe_backend.model import DecoderModel
from nmoe_backend.parallel.ranks import RankContext
from nmoe_backend.runtime.batch import Forward, SlotState
from nmoe_backend.runtime.step_columns import sampled_tokens
from nmoe_backend.types import StepPlan


class EagerSteps:
    """Used by its rank's thread only, inside `RankContext.activate`. Changes the slots as their plans say."""

    def __init__(
        self,
        model: DecoderModel,
        caches: Sequence[Tensor],
        state: SlotState,
        context: RankContext,
        logits: Tensor | None = None,
    ) -> None:
        """`logits` [max_batch_size, V] fp32: where the sampler wants them, if it cares."""
        self._model, self._caches, self._state, self._context, self._logits = model, caches, state, context, logits

    def capture(self, progress: Callable[[str], None]) -> None:
        """Nothing is prepared."""

    def run(self, step: StepPlan) -> Forward:
        """Of this rank's rows."""
        plan = step.ranks[self._context.rank]
        hidden = self._model.forward(self._state.fill(step, self._context.rank), self._caches)
        sampled = sampled_tokens(plan)
        rows = hidden
        if len(sampled) < hidden.shape[0]:
            rows = hidden.index_select(0, self._index(sampled))
        out = None if self._logits is None else self._logits[: len(sampled)]
        return Forward(hidden=hidden, logits=self._model.logits(rows, out))

    def _index(self, values: Sequence[int]) -> Tensor:
        """[n] int64 on the device; nobody waits for its way there."""
        pinned = self._context.device.type == "cuda"
        return torch.tensor(values, dtype=torch.int64, pin_memory=pinned).to(self._context.device, non_blocking=True)
