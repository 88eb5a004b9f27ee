"""The table of rotations that a RopeSpec describes."""

from __future__ import annotations

import torch
from torch import Tensor

from nmoe_backend.kernels.rope import rope_table_reference, yarn_frequencies_reference
from nmoe_backend.models.spec import RopeSpec


def rope_table(spec: RopeSpec, num_positions: int, device: torch.device) -> Tensor:
    """[num_positions, R / 2] complex64. Made on the CPU, so that every device multiplies by the same numbers."""
    frequencies = yarn_frequencies_reference(
        spec.dim, spec.theta, spec.factor, spec.original_max_position, spec.beta_fast, spec.beta_slow
    )
    return rope_table_reference(frequencies, num_positions, spec.attention_factor).to(device)
