"""`Sampler` in plain torch, for any device: what the kernels compute, written down the slow way.

When everything is banned in a row (a request can ban every token, or all that its grammar allows), its bans do not
apply in that step: some token must come out, and the model's own choice is the least surprising one. A grammar always
applies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nmoe_backend.kernels.sampling import (
    apply_penalties,
    bits_of,
    counter_uniform,
    draw_tokens,
    keep_mask,
    restrict,
    token_weights,
)
from nmoe_backend.runtime.grammar_masks import GrammarMasks, StepMasks
from nmoe_backend.runtime.output import LogprobColumns, SampledTokens
from nmoe_backend.runtime.sampler_slots import ANY_TOKEN, NO_TOKEN, SlotNeeds
from nmoe_backend.types import EngineLimits, SlotInit

# Columns of the parameter table.
_TEMPERATURE, _TOP_K, _TOP_P, _MIN_P, _REPETITION, _PRESENCE, _FREQUENCY = range(7)

_LOGPROB_ROWS = 64  # rows whose float64 log-probabilities are in memory at a time: 66 MB at 129,280 tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class _Slot:
    """What a slot's sequence needs, and its lists on the device."""

    needs: SlotNeeds
    bias_ids: Tensor  # [b] int64
    bias: Tensor  # [b] fp32
    stop_ids: Tensor  # [s] int64
    banned_ids: Tensor  # [w] int64
    phrases: Tensor  # [w, L] int64


class PlainSampler:
    """See the module and sampler.py."""

    logits = None  # they may be anywhere

    def __init__(self, limits: EngineLimits, device: torch.device | str) -> None:
        num_slots, vocab_size = limits.max_batch_size, limits.vocab_size
        self._device = torch.device(device)
        self._vocab_size = vocab_size
        self._slots: list[_Slot | None] = [None] * num_slots
        self._params = torch.zeros(num_slots, 7, dtype=torch.float64, device=device)
        self._seeds = torch.zeros(num_slots, dtype=torch.int64, device=device)
        # Only rows of slots with penalties or phrases are ever written.
        self._counts = torch.zeros(num_slots, vocab_size, dtype=torch.int32, device=device)
        self._prompt_mask = torch.zeros(num_slots, vocab_size, dtype=torch.bool, device=device)
        self._history = torch.full((num_slots, limits.max_seq_len + 1), NO_TOKEN, dtype=torch.int64, device=device)
        self.last_tokens = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)
        self._grammars = GrammarMasks(num_slots, vocab_size, self._device)

    def admit(self, init: SlotInit) -> None:
        self._slots[init.slot] = None
        self._grammars.admit(init)
        if init.embed:
            return
        needs = SlotNeeds.of(init, self._vocab_size)
        p = needs.sampling
        self._slots[init.slot] = _Slot(
            needs=needs,
            bias_ids=self._index(tuple(p.logit_bias)),
            bias=torch.tensor(tuple(p.logit_bias.values()), dtype=torch.float32, device=self._device),
            stop_ids=self._index(needs.stop_ids),
            banned_ids=self._index(needs.banned_ids),
            phrases=torch.tensor(needs.phrases, dtype=torch.int64, device=self._device),
        )
        params = (p.temperature, needs.top_k, p.top_p, p.min_p)
        penalties = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
        self._params[init.slot] = torch.tensor((*params, *penalties), dtype=torch.float64, device=self._device)
        self._seeds[init.slot] = needs.seed
        if needs.has_penalties:
            outputs = self._index(init.output_ids)
            ones = torch.ones_like(outputs, dtype=torch.int32)
            self._counts[init.slot].zero_().index_add_(0, outputs, ones)
            self._prompt_mask[init.slot].zero_()[self._index(init.prompt_ids)] = True
        if needs.phrases:
            begin, end = len(init.prompt_ids), len(init.prompt_ids) + len(init.output_ids)
            self._history[init.slot, :begin] = NO_TOKEN
            self._history[init.slot, begin:end] = self._index(init.output_ids)

    def capture(self, progress: Callable[[str], None]) -> None:
        pass  # nothing is compiled or captured

    def sample(self, logits: Tensor, slots: Sequence[int], positions: Sequence[int]) -> SampledTokens:
        """`logits` are not changed."""
        rows = [self._slot(slot) for slot in slots]
        masks = self._grammars.step(slots)
        edited = self._edit(logits, rows, slots, positions, masks)
        token_ids = edited.argmax(dim=1)  # the first of equals
        for truncated in (False, True):  # plain rows need no sort
            drawn = [n for n, row in enumerate(rows) if not row.needs.is_greedy and row.needs.is_truncated == truncated]
            if drawn:
                index = self._index(drawn)
                of_slots, at = ([values[n] for n in drawn] for values in (slots, positions))
                token_ids[index] = self._draw(edited[index], self._index(of_slots), self._index(at), truncated)
        self._remember(token_ids, rows, slots, positions)
        if masks is not None:
            self._grammars.record(masks, token_ids)
        num_top = [row.needs.num_logprobs for row in rows]
        return SampledTokens(
            token_ids=token_ids,
            logprobs=self._logprobs(logits, token_ids, num_top) if max(num_top, default=-1) >= 0 else None,
            failed=masks.failed if masks is not None else {},
        )

    def prompt_logprobs(self, logits: Tensor, target_ids: Sequence[int], num_top: int) -> LogprobColumns:
        return self._logprobs(logits, self._index(target_ids), [num_top] * len(target_ids))

    def _edit(
        self,
        logits: Tensor,
        rows: Sequence[_Slot],
        slots: Sequence[int],
        positions: Sequence[int],
        masks: StepMasks | None = None,
    ) -> Tensor:
        """[N, V]: a copy of the logits after bias, penalties, bans and grammars."""
        logits = logits.clone()
        for n, row in enumerate(rows):
            if row.needs.sampling.logit_bias:
                logits[n, row.bias_ids] += row.bias
        penalised = [n for n, row in enumerate(rows) if row.needs.has_penalties]
        if penalised:
            index, slot_index = self._index(penalised), self._index([slots[n] for n in penalised])
            params = self._params[slot_index].to(logits.dtype)
            counts, prompt_mask = self._counts[slot_index], self._prompt_mask[slot_index]
            penalties = (params[:, _REPETITION], params[:, _PRESENCE], params[:, _FREQUENCY])
            logits[index] = apply_penalties(logits[index], prompt_mask, counts, *penalties)
        grammars = {} if masks is None else dict(zip(masks.rows, bits_of(masks.words, self._vocab_size), strict=True))
        for n, row in enumerate(rows):
            banned = self._banned(row, slots[n], positions[n])
            if banned is None and n not in grammars:
                continue
            allowed = grammars.get(n, torch.ones(self._vocab_size, dtype=torch.bool, device=self._device))
            if banned is not None:
                left = allowed & ~banned
                allowed = torch.where(left.any(), left, allowed)
            logits[n] = restrict(logits[n], allowed)
        return logits

    def _banned(self, row: _Slot, slot: int, position: int) -> Tensor | None:
        """[V] bool, of bad words and stop ids; None where the row has neither."""
        needs = row.needs
        has_stops = len(needs.stop_ids) > 0 and position < needs.min_end
        if not (has_stops or needs.banned_ids or needs.phrases):
            return None
        banned = torch.zeros(self._vocab_size, dtype=torch.bool, device=self._device)
        banned[row.banned_ids] = True
        if has_stops:
            banned[row.stop_ids] = True
        if needs.phrases:
            prefixes = row.phrases[:, :-1]
            places = torch.arange(position - prefixes.shape[1], position, device=self._device)
            tail = torch.where(places < 0, NO_TOKEN, self._history[slot][places.clamp(min=0)])
            banned[row.phrases[((prefixes == ANY_TOKEN) | (prefixes == tail)).all(dim=1), -1]] = True
        return banned

    def _draw(self, logits: Tensor, slots: Tensor, positions: Tensor, truncated: bool) -> Tensor:
        """[n] one drawn id a row; either all rows are truncated or none."""
        params = self._params[slots]
        weights = token_weights(logits, params[:, _TEMPERATURE])
        if truncated:
            top_k = params[:, _TOP_K].to(torch.int64)
            weights = weights * keep_mask(weights, top_k, params[:, _TOP_P], params[:, _MIN_P])
        return draw_tokens(weights, counter_uniform(self._seeds[slots], positions))

    def _remember(
        self, token_ids: Tensor, rows: Sequence[_Slot], slots: Sequence[int], positions: Sequence[int]
    ) -> None:
        slot_index, position = self._index(slots), self._index(positions)
        self.last_tokens[slot_index] = token_ids
        counted = self._index([n for n, row in enumerate(rows) if row.needs.has_penalties])
        self._counts[slot_index[counted], token_ids[counted]] += 1  # a slot occurs once in a step
        recorded = self._index([n for n, row in enumerate(rows) if row.needs.phrases])
        self._history[slot_index[recorded], position[recorded]] = token_ids[recorded]

    def _logprobs(self, logits: Tensor, token_ids: Tensor, num_top: Sequence[int]) -> LogprobColumns:
        """One line a row; those of -1 hold nothing."""
        width = min(max(num_top, default=0), self._vocab_size)
        chosen = torch.zeros(len(num_top), dtype=torch.float64, device=self._device)
        top = torch.zeros(len(num_top), width, dtype=torch.float64, device=self._device)
        top_ids = torch.zeros(len(num_top), width, dtype=torch.int64, device=self._device)
        wanted = [n for n, num in enumerate(num_top) if num >= 0]
        for begin in range(0, len(wanted), _LOGPROB_ROWS):
            index = self._index(wanted[begin : begin + _LOGPROB_ROWS])
            logprobs = logits[index].to(torch.float64).log_softmax(dim=1)
            chosen[index] = logprobs.gather(1, token_ids[index][:, None])[:, 0]
            ranked = logprobs.sort(dim=1, descending=True, stable=True)
            top[index], top_ids[index] = ranked.values[:, :width], ranked.indices[:, :width]
        return LogprobColumns(num_top=num_top, token_ids=token_ids, logprobs=chosen, top_ids=top_ids, top_logprobs=top)

    def _slot(self, slot: int) -> _Slot:
        state = self._slots[slot]
        assert state is not None, f"slot {slot} is sampled before a sequence was admitted to it"
        return state

    def _index(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(tuple(values), dtype=torch.int64, device=self._device)
