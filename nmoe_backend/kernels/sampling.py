"""Choosing tokens from logits: counter-based randomness, penalties, truncation, and the draw.

Every function works row by row: a row's result depends on that row's inputs only, on every device.

* Randomness. `counter_uniform(seed, position)` is splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
  generators", 2014) in wrapping int64 arithmetic: no state, so the draw for a token does not depend on what else runs,
  on how often a step was repeated, or on the device.
* Grammars and bans (`restrict`): what is not allowed is -inf, and what is allowed never is.
* Truncation (`keep_mask`), as transformers' warpers and vLLM: top_k keeps everything not below the k-th largest
  (ties stay); top_p keeps the smallest set of what top_k left whose probability reaches p, most likely first, the
  lower id first among equals; min_p keeps what has at least min_p times the largest probability.
* The draw (`draw_tokens`): inverse CDF over the kept tokens in the order of their ids, in float64: the first id whose
  cumulative weight exceeds u times the total.
"""

from __future__ import annotations

import torch
from torch import Tensor

# splitmix64's constants as signed 64-bit integers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def counter_uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """seeds [N] int64 (the bits of a seed in [0, 2**64)), positions [N] int64 -> [N] float64 in [0, 1).

    The seed is mixed once before the counter is added, so that neighbouring seeds are not shifted copies of one stream.
    """
    bits = _mix(_mix(seeds + _GOLDEN) + (positions + 1) * _GOLDEN)
    return _shift_right(bits, 11).to(torch.float64) * 2.0**-53


def apply_penalties(
    logits: Tensor, prompt_mask: Tensor, counts: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> Tensor:
    """Logits [N, V] after repetition (HF: prompt and output), presence and frequency (OpenAI: output) penalties.

    prompt_mask [N, V] bool: the token is in the prompt; counts [N, V]: how often it was generated; penalties [N].
    A logit of a seen token is divided by `repetition` where positive and multiplied where negative; then
    `frequency * count + presence * (count > 0)` is subtracted.
    """
    seen = prompt_mask | (counts > 0)
    factor = repetition[:, None]
    repeated = torch.where(logits > 0, logits / factor, logits * factor)
    result = torch.where(seen, repeated, logits)
    return result - frequency[:, None] * counts - presence[:, None] * (counts > 0)


def bits_of(words: Tensor, vocab_size: int) -> Tensor:
    """words [N, ceil(V / 32)] int32 -> [N, V] bool: bit t % 32 of word t // 32."""
    bits = torch.arange(8, dtype=torch.uint8, device=words.device)
    unpacked = (words.view(torch.uint8)[:, :, None] >> bits) & 1  # bytes of a word in order: little-endian machines
    return unpacked.view(words.shape[0], -1)[:, :vocab_size].to(torch.bool)


def restrict(logits: Tensor, allowed: Tensor) -> Tensor:
    """Logits [N, V] where allowed [N, V] bool; else -inf.

    Allowed ones become finite (a penalty may have overflowed), so that a row's choice is an allowed token.
    Example: allowed (True, False, True, False), logits (1, 2, -inf, 4) -> (1, -inf, -3.4e38, -inf).
    """
    return torch.where(allowed, logits.clamp(min=torch.finfo(logits.dtype).min), -torch.inf)


def token_weights(logits: Tensor, temperature: Tensor) -> Tensor:
    """[N, V] float64 weights exp((logit - max) / temperature): 1 for the most likely, 0 for the banned.

    Subtracting first keeps the smallest temperatures finite. A row of -inf only has weight 0 everywhere. Logits of +inf
    (a tiny repetition penalty overflows fp32) are equally likely: an infinite weight would put the draw past the end.
    """
    wide = logits.to(torch.float64).clamp(max=torch.finfo(torch.float32).max)
    top = wide.amax(dim=1, keepdim=True)
    shifted = wide - torch.where(top.isinf(), torch.zeros_like(top), top)
    return (shifted / temperature[:, None]).exp()


def keep_mask(weights: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """[N, V] bool: what top_k (0 = off), top_p and min_p leave. weights [N, V] float64 from `token_weights`.

    Example: weights (0.2, 1.0, 0.4, 0.4), top_p = 0.6 -> ids 1 and 2: before id 2 the share is 0.5 < 0.6, before
    id 3 it is 0.7. With top_k = 2 ids 1, 2 and 3 stay, for 2 and 3 are equal.
    """
    vocab_size = weights.shape[1]
    ranked, order = weights.sort(dim=1, descending=True, stable=True)
    k_index = torch.where((top_k > 0) & (top_k < vocab_size), top_k, torch.full_like(top_k, vocab_size)) - 1
    keep = ranked >= ranked.gather(1, k_index[:, None])
    cumulative = (ranked * keep).cumsum(dim=1)
    before = torch.zeros_like(cumulative)
    before[:, 1:] = cumulative[:, :-1]
    keep &= (before < top_p[:, None] * cumulative[:, -1:]) | (top_p[:, None] >= 1)
    keep &= ranked >= min_p[:, None] * ranked[:, :1]
    keep[:, 0] = True
    return torch.zeros_like(keep).scatter_(1, order, keep)


def draw_tokens(weights: Tensor, uniforms: Tensor) -> Tensor:
    """[N] int64: one id a row by inverse CDF; weights [N, V] float64 (0: not kept), uniforms [N] in [0, 1).

    A row without any weight gives id 0.
    """
    cumulative = weights.cumsum(dim=1)
    total = cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, uniforms[:, None] * total, right=True)
    return torch.where(total > 0, chosen, torch.zeros_like(chosen)).squeeze(1)


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift_right(bits, 30)) * _MIX_1
    bits = (bits ^ _shift_right(bits, 27)) * _MIX_2
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical shift: int64's own keeps the sign."""
    return (bits >> count) & ((1 << (64 - count)) - 1)
