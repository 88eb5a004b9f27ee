"""What a worker asks of its sampler, in the order of operations of types.SamplingParams.

What a row gets depends on its slot's state, its logits and its position only, so a request gives the same tokens alone,
in any batch, and after a preemption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from nmoe_backend.layers.layer_ops import LayerOps
from nmoe_backend.parallel.ranks import RankContext
from nmoe_backend.runtime.output import LogprobColumns, SampledTokens
from nmoe_backend.runtime.sampler_plain import PlainSampler
from nmoe_backend.types import EngineLimits, SlotInit


class Sampler(Protocol):
    """One rank's. Owned by the rank's thread; everything on the device is allocated at construction."""

    @property
    def last_tokens(self) -> Tensor:
        """[max_batch_size + 1] int64 on the device: what each slot sampled last, which is fed when it decodes next. The
        last entry is for rows of padding."""

    @property
    def logits(self) -> Tensor | None:
        """[max_batch_size, V] fp32 where logits must be written before `sample`; None: they may be anywhere."""

    def admit(self, init: SlotInit) -> None:
        """A sequence takes a slot; with output_ids it goes on where it was preempted. Embeddings sample nothing."""

    def capture(self, progress: Callable[[str], None]) -> None:
        """Prepare what steps will launch; before the first step."""

    def sample(self, logits: Tensor, slots: Sequence[int], positions: Sequence[int]) -> SampledTokens:
        """logits [N, V] fp32, row n of `slots[n]`; positions[n]: where the new token will stand. Remembers the tokens.

        To be called once per generated token of a slot, in order of its positions, when the logits are launched: where
        a row has a grammar it waits for the step before.
        """

    def prompt_logprobs(self, logits: Tensor, target_ids: Sequence[int], num_top: int) -> LogprobColumns:
        """logits [n, V] fp32 and the token that follows each: its log-probability and the num_top best ones."""


def build_sampler(ops: LayerOps, limits: EngineLimits, context: RankContext) -> Sampler:
    """Of the same kind as the rank's table of operations."""
    if not ops.has_sampler:
        return PlainSampler(limits, context.device)
    # Imported here: triton is not there on a machine without a GPU.
    from nmoe_backend.runtime.sampler_kernels import KernelSampler

    return KernelSampler(limits, context, captures=ops.captures and context.has_own_device)
