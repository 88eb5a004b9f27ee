"""`Sampler` in plain torch, for any device: what the kernels compute, written down the slow way.

When everything is banned in a row (a request can ban every token, or all that its grammar allows), its bans do not
apply in that step: some token must come out, and the model's own choice is the least surprising one. A grammar always
applies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nmoe_backend.kernels.sampling import (
    apply_bitmask,
    apply_penalties,
    counter_uniform,
    draw_tokens,
    keep_mask,
    token_weights,
)
from nmoe_backend.runtime.grammar_masks import GrammarMasks, StepMasks
from nmoe_backend.runtime.output import LogprobColumns, SampledTokens
from nmoe_backend.types import SamplingParams, SlotInit

# Columns of the parameter table.
_TEMPERATURE, _TOP_K, _TOP_P, _MIN_P, _REPETITION, _PRESENCE, _FREQUENCY = range(7)

_LOGPROB_ROWS = 64  # rows whose float64 log-probabilities are in memory at a time: 66 MB at 129,280 tokens

_NO_TOKEN = -2  # in the history: a prompt position, or none yet; matches nothing
_ANY_TOKEN = -1  # in a bad word's padding: matches everything


@dataclass(frozen=True, kw_only=True, slots=True)
class _Slot:
    """What the host must know of a slot to choose the work of a step; the tensors are on the device."""

    prompt_len: int
    min_tokens: int
    is_greedy: bool
    is_truncated: bool  # top_k, top_p or min_p
    has_penalties: bool
    num_logprobs: int | None
    bias: tuple[Tensor, Tensor] | None  # ids [b] int64, values [b] fp32
    stop_ids: Tensor | None  # [s] int64, banned below min_tokens
    # Last tokens of the bad words [w], and what stands before them [w, L], padded on the left; int64.
    bad_words: tuple[Tensor, Tensor] | None


class PlainSampler:
    """See the module and sampler.py."""

    logits = None  # they may be anywhere

    def __init__(self, max_batch_size: int, vocab_size: int, max_seq_len: int, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._vocab_size = vocab_size
        self._slots: list[_Slot | None] = [None] * max_batch_size
        self._params = torch.zeros(max_batch_size, 7, dtype=torch.float64, device=device)
        self._seeds = torch.zeros(max_batch_size, dtype=torch.int64, device=device)
        # Only rows of slots with penalties or bad words are ever written.
        self._counts = torch.zeros(max_batch_size, vocab_size, dtype=torch.int32, device=device)
        self._prompt_mask = torch.zeros(max_batch_size, vocab_size, dtype=torch.bool, device=device)
        self._history = torch.full((max_batch_size, max_seq_len + 1), _NO_TOKEN, dtype=torch.int32, device=device)
        self.last_tokens = torch.zeros(max_batch_size + 1, dtype=torch.int64, device=device)
        self._grammars = GrammarMasks(max_batch_size, vocab_size, self._device)

    def admit(self, init: SlotInit) -> None:
        self._slots[init.slot] = None
        self._grammars.admit(init)
        if init.embed:
            return
        p = init.sampling
        assert p.seed is not None, f"slot {init.slot}: the engine resolves the seed before a sequence is admitted"
        slot = _Slot(
            prompt_len=len(init.prompt_ids),
            min_tokens=p.min_tokens,
            is_greedy=p.temperature == 0,
            is_truncated=0 < p.top_k < self._vocab_size or p.top_p < 1 or p.min_p > 0,
            has_penalties=p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0,
            num_logprobs=p.num_logprobs,
            bias=self._bias(p.logit_bias),
            stop_ids=self._index(init.stop_token_ids) if p.min_tokens else None,
            bad_words=self._bad_words(p.bad_words_ids),
        )
        self._slots[init.slot] = slot
        self._params[init.slot] = self._param_row(p)
        self._seeds[init.slot] = p.seed - (2**64 if p.seed >= 2**63 else 0)
        if slot.has_penalties:
            self._restore_counts(init)
        if slot.bad_words is not None:
            self._restore_history(init)

    def capture(self, progress: Callable[[str], None]) -> None:
        pass  # nothing is compiled or captured

    def sample(self, logits: Tensor, slots: Sequence[int], positions: Sequence[int]) -> SampledTokens:
        """`logits` are not changed."""
        rows = [self._slot(slot) for slot in slots]
        masks = self._grammars.step(slots)
        processed = self._process(logits, rows, slots, positions, masks)
        token_ids = processed.argmax(dim=1)  # the first of equals
        for truncated in (False, True):
            drawn = [n for n, row in enumerate(rows) if not row.is_greedy and row.is_truncated == truncated]
            if drawn:
                index = self._index(drawn)
                token_ids[index] = self._draw(
                    processed[index], [slots[n] for n in drawn], [positions[n] for n in drawn]
                )
        self._remember(token_ids, rows, slots, positions)
        if masks is not None:
            self._grammars.record(masks, token_ids)
        num_top = [-1 if row.num_logprobs is None else row.num_logprobs for row in rows]
        return SampledTokens(
            token_ids=token_ids,
            logprobs=self._logprobs(logits, token_ids, num_top) if max(num_top, default=-1) >= 0 else None,
            failed=masks.failed if masks is not None else {},
        )

    def prompt_logprobs(self, logits: Tensor, target_ids: Sequence[int], num_top: int) -> LogprobColumns:
        return self._logprobs(logits, self._index(target_ids), [num_top] * len(target_ids))

    def _process(
        self,
        logits: Tensor,
        rows: Sequence[_Slot],
        slots: Sequence[int],
        positions: Sequence[int],
        masks: StepMasks | None = None,
    ) -> Tensor:
        """[N, V]: logits after bias, penalties, bans and grammars; the same tensor when no row has any."""
        biased = [(n, *row.bias) for n, row in enumerate(rows) if row.bias is not None]
        penalised = [n for n, row in enumerate(rows) if row.has_penalties]
        banned = self._bans(rows, slots, positions)
        if not (biased or penalised or banned or masks):
            return logits
        logits = logits.clone()
        for n, ids, values in biased:
            logits[n, ids] += values
        if penalised:
            index, slot_index = self._index(penalised), self._index([slots[n] for n in penalised])
            params = self._params[slot_index].to(logits.dtype)
            counts, prompt_mask = self._counts[slot_index], self._prompt_mask[slot_index]
            penalties = (params[:, _REPETITION], params[:, _PRESENCE], params[:, _FREQUENCY])
            logits[index] = apply_penalties(logits[index], prompt_mask, counts, *penalties)
        if masks is not None:  # before the bans, so that bans which leave nothing of it are dropped and it is not
            index = self._index(masks.rows)
            logits[index] = apply_bitmask(logits[index], masks.words)
        for n, bans in banned.items():
            allowed = logits[n].clone()
            for ids, is_banned in bans:
                # Not index_fill: whether a bad word is complete is known on the device only.
                penalty = torch.zeros_like(allowed).index_add_(0, ids, is_banned.to(allowed.dtype))
                allowed = allowed.masked_fill(penalty > 0, -torch.inf)
            logits[n] = torch.where((allowed == -torch.inf).all(), logits[n], allowed)
        return logits

    def _bans(
        self, rows: Sequence[_Slot], slots: Sequence[int], positions: Sequence[int]
    ) -> dict[int, list[tuple[Tensor, Tensor]]]:
        """Row -> [(ids, bool mask of those that are banned now)]."""
        bans: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for n, row in enumerate(rows):
            if row.stop_ids is not None and positions[n] - row.prompt_len < row.min_tokens:
                bans.setdefault(n, []).append((row.stop_ids, torch.ones_like(row.stop_ids, dtype=torch.bool)))
            if row.bad_words is not None:
                last_ids, prefixes = row.bad_words
                bans.setdefault(n, []).append((last_ids, self._matches(prefixes, slots[n], positions[n])))
        return bans

    def _matches(self, prefixes: Tensor, slot: int, position: int) -> Tensor:
        """[w] bool: the output before `position` ends with the prefix. Prefixes [w, L] are padded on the left."""
        length = prefixes.shape[1]
        begin = max(0, position - length)
        tail = torch.full((length,), _NO_TOKEN, dtype=torch.int64, device=self._device)
        if position > begin:
            tail[length - (position - begin) :] = self._history[slot, begin:position]
        return ((prefixes == _ANY_TOKEN) | (prefixes == tail)).all(dim=1)

    def _draw(self, logits: Tensor, slots: list[int], positions: list[int]) -> Tensor:
        """[n] one drawn id a row; either all rows are truncated or none, so that plain rows need no sort."""
        index = self._index(slots)
        params = self._params[index]
        weights = token_weights(logits, params[:, _TEMPERATURE])
        if self._slot(slots[0]).is_truncated:
            top_k = params[:, _TOP_K].to(torch.int64)
            weights = weights * keep_mask(weights, top_k, params[:, _TOP_P], params[:, _MIN_P])
        return draw_tokens(weights, counter_uniform(self._seeds[index], self._index(positions)))

    def _remember(
        self, token_ids: Tensor, rows: Sequence[_Slot], slots: Sequence[int], positions: Sequence[int]
    ) -> None:
        self.last_tokens[self._index(slots)] = token_ids
        counted = [n for n, row in enumerate(rows) if row.has_penalties]
        if counted:
            slot_index = self._index([slots[n] for n in counted])
            self._counts[slot_index, token_ids[self._index(counted)]] += 1  # a slot occurs once in a step
        recorded = [n for n, row in enumerate(rows) if row.bad_words is not None]
        if recorded:
            where = (self._index([slots[n] for n in recorded]), self._index([positions[n] for n in recorded]))
            self._history[where] = token_ids[self._index(recorded)].to(torch.int32)

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

    def _bias(self, bias: Mapping[int, float]) -> tuple[Tensor, Tensor] | None:
        if not bias:
            return None
        return self._index(tuple(bias)), torch.tensor(tuple(bias.values()), dtype=torch.float32, device=self._device)

    def _bad_words(self, words: tuple[tuple[int, ...], ...]) -> tuple[Tensor, Tensor] | None:
        words = tuple(word for word in words if word)
        if not words:
            return None
        length = max(len(word) for word in words) - 1
        padded = [[_ANY_TOKEN] * (length + 1 - len(word)) + list(word[:-1]) for word in words]
        prefixes = torch.tensor(padded, dtype=torch.int64, device=self._device).view(len(words), length)
        return self._index([word[-1] for word in words]), prefixes

    def _restore_counts(self, init: SlotInit) -> None:
        outputs = self._index(init.output_ids)
        ones = torch.ones_like(outputs, dtype=torch.int32)
        self._counts[init.slot].zero_().index_add_(0, outputs, ones)
        self._prompt_mask[init.slot].zero_()[self._index(init.prompt_ids)] = True

    def _restore_history(self, init: SlotInit) -> None:
        begin, end = len(init.prompt_ids), len(init.prompt_ids) + len(init.output_ids)
        self._history[init.slot, :begin] = _NO_TOKEN
        self._history[init.slot, begin:end] = self._index(init.output_ids).to(torch.int32)

    def _param_row(self, p: SamplingParams) -> Tensor:
        columns = (p.temperature, p.top_k, p.top_p, p.min_p)
        penalties = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
        return torch.tensor((*columns, *penalties), dtype=torch.float64, device=self._device)

    def _slot(self, slot: int) -> _Slot:
        state = self._slots[slot]
        assert state is not None, f"slot {slot} is sampled before a sequence was admitted to it"
        return state

    def _index(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(tuple(values), dtype=torch.int64, device=self._device)
