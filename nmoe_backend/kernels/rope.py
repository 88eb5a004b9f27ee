"""Rotary position embedding with YaRN frequencies (arXiv 2104.09864, 2309.00071).

A pair of dims (a, b) of a token at position p turns by the angle p * f: (a + ib) * exp(i p f). The table holds these
unit complex numbers, times the attention factor. Interleaved pairs are dims (0, 1), (2, 3), ...; half-split pairs are
(0, R/2), (1, R/2 + 1), ... Dims keep their place, so that queries and cached keys agree whatever the pairing.

Angles are formed in fp32 from fp32 frequencies, as the reference implementations do: at position 100,000 a float64
angle would differ from theirs by up to 0.01 rad.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def yarn_frequencies_reference(
    dim: int, theta: float, factor: float, original_max_position: int, beta_fast: float, beta_slow: float
) -> Tensor:
    """[dim / 2] fp32 angles a position.

    Dims that turn more than beta_fast times over the original context keep their frequency, those under beta_slow turns
    are slowed down by `factor`, with a linear ramp between. `factor` 1 is plain RoPE.
    """
    frequencies = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if factor == 1.0:
        return frequencies

    def dim_of(num_turns: float) -> float:
        return dim * math.log(original_max_position / (num_turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dim_of(beta_fast)), 0)
    high = min(math.ceil(dim_of(beta_slow)), dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return frequencies / factor * ramp + frequencies * (1 - ramp)


def rope_table_reference(frequencies: Tensor, num_positions: int, attention_factor: float) -> Tensor:
    """[R / 2] -> [num_positions, R / 2] complex64."""
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32, device=frequencies.device), frequencies)
    return torch.polar(torch.full_like(angles, attention_factor), angles)


def rope_reference(x: Tensor, turns: Tensor, interleaved: bool) -> Tensor:
    """x [T, H, R], turns [T, R / 2] complex64 (the tokens' rows of the table) -> [T, H, R] in x's dtype; fp32 inside"""
    wide = x.float()
    num_tokens, num_heads, dim = x.shape
    if interleaved:
        pairs = wide.reshape(num_tokens, num_heads, dim // 2, 2)
    else:
        pairs = wide.reshape(num_tokens, num_heads, 2, dim // 2).transpose(-1, -2).contiguous()
    turned = torch.view_as_real(torch.view_as_complex(pairs) * turns.unsqueeze(1))
    return (turned if interleaved else turned.transpose(-1, -2)).flatten(-2).to(x.dtype)
