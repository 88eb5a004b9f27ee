"""What the kernels know of a slot: its row of a table of 8-byte words, and larger tables for slots with edits."""

# A jit function has no types that mypy knows; launchers are typed.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of a slot's row: int64, or the bits of a float64.
KIND = tl.constexpr(0)
TEMPERATURE = tl.constexpr(1)  # float64, > 0 unless greedy
TOP_K = tl.constexpr(2)  # 0: off
TOP_P = tl.constexpr(3)  # float64, 1: off
MIN_P = tl.constexpr(4)  # float64
SEED = tl.constexpr(5)
NUM_TOP = tl.constexpr(6)  # logprobs of so many alternatives, -1: none at all
EDITS = tl.constexpr(7)  # bits, below
REPETITION = tl.constexpr(8)  # float64, as the next two
PRESENCE = tl.constexpr(9)
FREQUENCY = tl.constexpr(10)
MIN_END = tl.constexpr(11)  # stop ids are banned at positions before this one
BIAS = tl.constexpr(12)  # address of ids [n] int32, then values [n] fp32
NUM_BIAS = tl.constexpr(13)
PHRASES = tl.constexpr(14)  # address of [n, length] int32: bad words of several tokens, -1 in front of shorter ones
NUM_PHRASES = tl.constexpr(15)
PHRASE_LEN = tl.constexpr(16)
NUM_COLUMNS = tl.constexpr(17)

# KIND
GREEDY = tl.constexpr(0)
PLAIN = tl.constexpr(1)
TRUNCATED = tl.constexpr(2)  # top_k, top_p or min_p

# EDITS
HAS_PENALTIES = tl.constexpr(1)
HAS_BIAS = tl.constexpr(2)
HAS_STOPS = tl.constexpr(4)  # min_tokens
HAS_BANS = tl.constexpr(8)  # bad words of one token
HAS_PHRASES = tl.constexpr(16)


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotTables:
    """S slots. Beside `rows`, only what a slot's EDITS name is ever read."""

    rows: Tensor  # [S, NUM_COLUMNS] int64
    prompt_mask: Tensor  # [S, V] uint8: the token is in the prompt
    counts: Tensor  # [S, V] int32: how often it was generated
    unstopped: Tensor  # [S, ceil(V / 32)] int32: bit t % 32 of word t // 32 is 0 for a stop id
    unbanned: Tensor  # [S, ceil(V / 32)] int32: the same for bad words of one token
    history: Tensor  # [S, L] int32: the token generated at a position, -2 where there is none

    @classmethod
    def create(cls, num_slots: int, vocab_size: int, max_len: int, device: torch.device | str) -> SlotTables:
        def zeros(width: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(num_slots, width, dtype=dtype, device=device)

        num_words = triton.cdiv(vocab_size, 32)
        return cls(
            rows=zeros(NUM_COLUMNS.value, torch.int64),
            prompt_mask=zeros(vocab_size, torch.uint8),
            counts=zeros(vocab_size, torch.int32),
            unstopped=zeros(num_words, torch.int32),
            unbanned=zeros(num_words, torch.int32),
            history=zeros(max_len, torch.int32),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRows:
    """The rows of a step, [N] int64 each."""

    slots: Tensor  # -1: padding
    positions: Tensor  # where the new token will stand
    mask_rows: Tensor  # a row's line among the grammars' masks, -1: none


@triton.jit
def whole(rows_ptr, slot, column: tl.constexpr):
    """int64; 0 for padding"""
    return tl.load(rows_ptr + slot * NUM_COLUMNS + column, mask=slot >= 0, other=0)


@triton.jit
def real(rows_ptr, slot, column: tl.constexpr):
    """float64; 0 for padding"""
    return whole(rows_ptr, slot, column).to(tl.float64, bitcast=True)


def check_logits(logits: Tensor, num_rows: int) -> int:
    """The vocabulary's size. Raises ValueError for logits that the kernels cannot read."""
    if logits.dim() != 2 or logits.dtype != torch.float32 or logits.stride(1) != 1 or logits.shape[0] < num_rows:
        raise ValueError(
            f"got logits {tuple(logits.shape)} {logits.dtype}; need [N >= {num_rows}, V] fp32, contiguous rows."
        )
    return logits.shape[1]
