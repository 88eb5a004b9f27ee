"""Rows with logit_bias, penalties, bans or a grammar: an edited copy of their logits, which tokens are chosen from.

    l[id] += bias
    l = l / r where positive, l * r where not                          tokens of prompt or output
    l -= frequency * count + presence * (count > 0)                    tokens of the output
    l = -inf where the row's bit is 0, else at least -3.4e38           bans and the grammar, as one bitmask

The bitmask is the grammar's and that of the bans (bad words, min_tokens); where nothing would be left, the grammar's
alone. The raw logits stay, for log-probabilities. Penalties are bit for bit those of sampling.py: fused multiply-adds
are off. A row without edits costs one load of its flags.

Logits [2 * B, V]: the copy of row n is row B + n; `sources` [N] says for each row which of the two is sampled from.
Grids: bans (N,); rows (N, V / 4,096); biased tokens, whose logits are computed again with their bias, (N,).
"""

# A jit function has no types that mypy knows; launchers are typed.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmoe_backend.kernels.sampling_gpu.table import (
    BIAS,
    EDITS,
    FREQUENCY,
    HAS_BANS,
    HAS_BIAS,
    HAS_PENALTIES,
    HAS_PHRASES,
    HAS_STOPS,
    MIN_END,
    NUM_BIAS,
    NUM_PHRASES,
    PHRASE_LEN,
    PHRASES,
    PRESENCE,
    REPETITION,
    SlotTables,
    StepRows,
    check_logits,
    real,
    whole,
)

_CHUNK = 4096
_PHRASES_AT_ONCE = 32
_BIASES_AT_ONCE = 128
_LOWEST = tl.constexpr(-3.4028234663852886e38)  # a penalty may have overflowed; what is allowed stays possible
_ANY_TOKEN = tl.constexpr(-1)  # in a phrase's padding: matches everything


@dataclass(frozen=True, kw_only=True, slots=True)
class EditRows:
    """Scratch of the edits."""

    sources: Tensor  # [N] int64: where a row's logits lie
    has_words: Tensor  # [N] int32: whether its bitmask applies
    words: Tensor  # [N, ceil(V / 32)] int32

    @classmethod
    def create(cls, num_rows: int, vocab_size: int, device: torch.device | str) -> EditRows:
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            sources=zeros(num_rows, dtype=torch.int64),
            has_words=zeros(num_rows, dtype=torch.int32),
            words=zeros(num_rows, triton.cdiv(vocab_size, 32), dtype=torch.int32),
        )


@triton.jit
def _bans_kernel(  # noqa: PLR0913
    slots_ptr,
    positions_ptr,
    mask_rows_ptr,
    rows_ptr,
    unstopped_ptr,
    unbanned_ptr,
    history_ptr,
    masks_ptr,
    sources_ptr,
    has_words_ptr,
    words_ptr,
    num_buffered,
    history_len,
    V,
    num_words,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_PHRASES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot, mask_row = tl.load(slots_ptr + row), tl.load(mask_rows_ptr + row)
    edits = whole(rows_ptr, slot, EDITS)
    has_mask = (slot >= 0) & (mask_row >= 0)
    position = tl.load(positions_ptr + row)
    has_stops = ((edits & HAS_STOPS) != 0) & (position < whole(rows_ptr, slot, MIN_END))
    has_bans, has_phrases = (edits & HAS_BANS) != 0, (edits & HAS_PHRASES) != 0
    has_words = has_stops | has_bans | has_phrases | has_mask
    if has_words:
        word = tl.arange(0, BLOCK_WORDS)
        in_row = word < num_words
        words_row = words_ptr + row * num_words
        # Bits behind the vocabulary are 0: they are no tokens that could be left.
        allowed = tl.where(word == V // 32, (1 << (V % 32)) - 1, -1)
        allowed &= tl.load(masks_ptr + mask_row * num_words + word, mask=in_row & has_mask, other=-1)
        left = allowed & tl.load(unstopped_ptr + slot * num_words + word, mask=in_row & has_stops, other=-1)
        left &= tl.load(unbanned_ptr + slot * num_words + word, mask=in_row & has_bans, other=-1)
        if has_phrases:
            tl.store(words_row + word, left, mask=in_row)
            tl.debug_barrier()
            _ban_phrases(words_row, rows_ptr, history_ptr + slot * history_len, slot, position, BLOCK_PHRASES)
            tl.debug_barrier()
            left = tl.load(words_row + word, mask=in_row, other=0, volatile=True)
            tl.debug_barrier()
        bans_hold = tl.max((in_row & (left != 0)).to(tl.int32), axis=0) > 0
        tl.store(words_row + word, tl.where(bans_hold, left, allowed), mask=in_row)
    tl.store(has_words_ptr + row, has_words.to(tl.int32))
    is_edited = ((edits & (HAS_PENALTIES | HAS_BIAS)) != 0) | has_words
    tl.store(sources_ptr + row, tl.where(is_edited, row + num_buffered, row))


@triton.jit
def _ban_phrases(words_row, rows_ptr, history_row, slot, position, BLOCK: tl.constexpr):
    """Clear the bits of last tokens whose phrase the output before `position` ends with, but for that token."""
    phrases = whole(rows_ptr, slot, PHRASES).to(tl.pointer_type(tl.int32))
    num_phrases, length = whole(rows_ptr, slot, NUM_PHRASES), whole(rows_ptr, slot, PHRASE_LEN)
    for begin in range(0, num_phrases, BLOCK):
        phrase = begin + tl.arange(0, BLOCK)
        is_phrase = phrase < num_phrases
        matches = is_phrase
        for n in range(0, length - 1):
            wanted = tl.load(phrases + phrase * length + n, mask=is_phrase, other=_ANY_TOKEN)
            place = position - (length - 1) + n
            generated = tl.load(history_row + place, mask=place >= 0, other=-2)
            matches = matches & ((wanted == _ANY_TOKEN) | (wanted == generated))
        last = tl.load(phrases + phrase * length + length - 1, mask=is_phrase, other=0)
        tl.atomic_and(words_row + last // 32, ~(1 << (last % 32)), mask=matches)


@triton.jit
def _edited(  # noqa: PLR0913
    x,
    token,
    in_vocab,
    edits,
    slot,
    row,
    rows_ptr,
    prompt_mask_ptr,
    counts_ptr,
    has_words_ptr,
    words_ptr,
    V,
    num_words,
):
    """Logits x of a row's tokens, bias included, after penalties and bitmask"""
    if (edits & HAS_PENALTIES) != 0:
        count = tl.load(counts_ptr + slot * V + token, mask=in_vocab, other=0)
        in_prompt = tl.load(prompt_mask_ptr + slot * V + token, mask=in_vocab, other=0) != 0
        factor = tl.zeros_like(x) + real(rows_ptr, slot, REPETITION).to(tl.float32)
        repeated = tl.where(x > 0, tl.math.div_rn(x, factor), x * factor)
        x = tl.where(in_prompt | (count > 0), repeated, x)
        x = x - real(rows_ptr, slot, FREQUENCY).to(tl.float32) * count.to(tl.float32)
        x = x - real(rows_ptr, slot, PRESENCE).to(tl.float32) * (count > 0).to(tl.float32)
    if tl.load(has_words_ptr + row) != 0:
        bits = tl.load(words_ptr + row * num_words + token // 32, mask=in_vocab, other=0)
        x = tl.where(((bits >> (token % 32)) & 1) != 0, tl.maximum(x, _LOWEST), float("-inf"))
    return x


@triton.jit
def _rows_kernel(  # noqa: PLR0913
    logits_ptr,
    slots_ptr,
    rows_ptr,
    prompt_mask_ptr,
    counts_ptr,
    sources_ptr,
    has_words_ptr,
    words_ptr,
    row_stride,
    V,
    num_words,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(sources_ptr + row)
    if source != row:
        slot = tl.load(slots_ptr + row)
        token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        in_vocab = token < V
        x = tl.load(logits_ptr + row * row_stride + token, mask=in_vocab, other=0.0)
        x = _edited(
            x, token, in_vocab, whole(rows_ptr, slot, EDITS), slot, row, rows_ptr, prompt_mask_ptr, counts_ptr,
            has_words_ptr, words_ptr, V, num_words,
        )  # fmt: skip
        tl.store(logits_ptr + source * row_stride + token, x, mask=in_vocab)


@triton.jit
def _bias_kernel(  # noqa: PLR0913
    logits_ptr,
    slots_ptr,
    rows_ptr,
    prompt_mask_ptr,
    counts_ptr,
    sources_ptr,
    has_words_ptr,
    words_ptr,
    row_stride,
    V,
    num_words,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    edits = whole(rows_ptr, slot, EDITS)
    if (edits & HAS_BIAS) != 0:
        target_row = logits_ptr + tl.load(sources_ptr + row) * row_stride
        ids, num = whole(rows_ptr, slot, BIAS).to(tl.pointer_type(tl.int32)), whole(rows_ptr, slot, NUM_BIAS)
        for begin in range(0, num, BLOCK):
            entry = begin + tl.arange(0, BLOCK)
            is_entry = entry < num
            token = tl.load(ids + entry, mask=is_entry, other=0)
            value = tl.load(ids + num + entry, mask=is_entry, other=0).to(tl.float32, bitcast=True)
            x = tl.load(logits_ptr + row * row_stride + token, mask=is_entry, other=0.0) + value
            x = _edited(
                x, token, is_entry, edits, slot, row, rows_ptr, prompt_mask_ptr, counts_ptr, has_words_ptr, words_ptr,
                V, num_words,
            )  # fmt: skip
            tl.store(target_row + token, x, mask=is_entry)


def edit_logits(logits: Tensor, step: StepRows, tables: SlotTables, masks: Tensor, edits: EditRows) -> None:
    """Rows [0, N) of logits [2 * B, V] fp32 that have edits -> rows [B, B + N); `edits.sources` says which.

    masks [C, ceil(V / 32)] int32: what grammars allow, by `step.mask_rows`.
    """
    num_rows = step.slots.shape[0]
    vocab_size = check_logits(logits, 2 * num_rows)
    num_words = tables.unbanned.shape[1]
    _bans_kernel[(num_rows,)](
        step.slots, step.positions, step.mask_rows, tables.rows, tables.unstopped, tables.unbanned, tables.history,
        masks, edits.sources, edits.has_words, edits.words, logits.shape[0] // 2, tables.history.shape[1], vocab_size,
        num_words, triton.next_power_of_2(num_words), _PHRASES_AT_ONCE, num_warps=8,
    )  # fmt: skip
    shared = (
        logits, step.slots, tables.rows, tables.prompt_mask, tables.counts, edits.sources, edits.has_words, edits.words,
        logits.stride(0), vocab_size, num_words,
    )  # fmt: skip
    # Without fused multiply-adds the result is bit for bit that of the plain operations.
    _rows_kernel[(num_rows, triton.cdiv(vocab_size, _CHUNK))](*shared, _CHUNK, num_warps=8, enable_fp_fusion=False)
    _bias_kernel[(num_rows,)](*shared, _BIASES_AT_ONCE, num_warps=4, enable_fp_fusion=False)
