"""From a RankPlan to tensors: what a rank keeps per slot, and the Batch of a step.

Owns, for each slot, its block table (a row of page numbers, on the device). The token that it sampled last, which the
sampler keeps, is the next decode step's input and never visits the host. Plans carry only what changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from nmoe_backend.layers.batch import Batch, PrefillRow
from nmoe_backend.types import EngineLimits, RankPlan, StepPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Forward:
    """What the forward pass of a step leaves."""

    hidden: Tensor  # [T, D] after the final norm, of all tokens, in the plan's order
    logits: Tensor  # [N, V] fp32, of the rows that sample, in the plan's order


class SlotState:
    """Block tables of one rank's slots. Used by its rank's thread only."""

    def __init__(self, limits: EngineLimits, device: torch.device, last_tokens: Tensor) -> None:
        """`last_tokens`: the sampler's; read here only."""
        max_pages = -(-limits.max_seq_len // limits.page_size)
        self._limits = limits
        self._device = device
        # One slot more than sequences: padding rows read and write it.
        self.block_tables = torch.zeros(limits.max_batch_size + 1, max_pages, dtype=torch.int32, device=device)
        self.last_tokens = last_tokens

    def fill(self, step: StepPlan, rank: int) -> Batch:
        """Apply the plan's changes to the slots and lay out its tokens, without padding. Example: see RankPlan."""
        plan = step.ranks[rank]
        self.check(plan)
        if plan.new_pages:
            slots, indices, pages = self._tensor(plan.new_pages).unbind(1)
            self.block_tables[slots, indices] = pages.to(torch.int32)
        lengths = list(plan.lengths)
        starts = self._tensor(plan.starts)
        slots = self._tensor(plan.slots)
        num_decode, page_size = plan.num_decode, self._limits.page_size
        num_pages = [-(-(start + length) // page_size) for start, length in zip(plan.starts, lengths, strict=True)]
        ends = list(accumulate(lengths))
        if len(lengths) == num_decode:
            token_ids, positions, token_slots = self.last_tokens.index_select(0, slots), starts, slots
        else:
            fed = self.last_tokens.index_select(0, slots[:num_decode])
            token_ids = torch.cat((fed, self._tensor(plan.token_ids)))
            row_of_token = torch.repeat_interleave(self._tensor(lengths), output_size=ends[-1])
            shift = starts - self._tensor([0, *ends[:-1]])
            positions = torch.arange(ends[-1], device=self._device) + shift.index_select(0, row_of_token)
            token_slots = slots.index_select(0, row_of_token)
        pages = self.block_tables[token_slots, positions // page_size]
        tables = self.block_tables[slots[num_decode:], : max(num_pages[num_decode:], default=0)]
        return Batch(
            token_ids=token_ids,
            positions=positions,
            cache_idx=pages * page_size + positions % page_size,
            num_decode=num_decode,
            block_tables=self.block_tables[slots[:num_decode], : max(num_pages[:num_decode], default=0)],
            context_lens=starts[:num_decode] + 1,
            prefill=tuple(
                PrefillRow(
                    first=ends[row] - lengths[row],
                    last=ends[row],
                    start=plan.starts[row],
                    pages=tables[row - num_decode, : num_pages[row]],
                )
                for row in range(num_decode, len(lengths))
            ),
            padded_prefill=None,
            step_tokens=max(other.num_tokens for other in step.ranks),
            num_real=self._tensor([len(token_ids)]).to(torch.int32),
        )

    def _tensor(self, values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def check(self, plan: RankPlan) -> None:
        limits = self._limits
        num_prefill = len(plan.token_ids)
        if len(plan.slots) > limits.max_batch_size or num_prefill > limits.max_prefill_tokens:
            raise AssertionError(
                f"plan of {len(plan.slots)} rows and {num_prefill} prefill tokens exceeds max_batch_size="
                f"{limits.max_batch_size} or max_prefill_tokens={limits.max_prefill_tokens}"
            )
        if not all(plan.samples[: plan.num_decode]):
            raise AssertionError(f"plan has {plan.num_decode} decode rows, and not each of them yields a token")
        if sum(plan.lengths) != plan.num_tokens:
            raise AssertionError(f"plan has {plan.num_tokens} tokens for rows of lengths {tuple(plan.lengths)}")
