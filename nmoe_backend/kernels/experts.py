"""Routed SwiGLU experts over gathered rows: y_t = sum_e weight_te * W2_e (silu(W1_e x_t) * W3_e x_t).

`w13` holds the gate rows (W1) and then the up rows (W3) of each expert. Products are in x's dtype; the gate weight and
the sum over a token's experts are fp32, in ascending order of expert id, whatever else is in the batch. An expert
touches a row at most once, so no addition races another on any device.

Worked example, two experts, one value a row (w13 and w2 such that expert 0 doubles a value and expert 1 negates it):
    x = [1, 2]   ids = [[0, 1], [1, -1]]   weights = [[0.5, 0.25], [1, 0]]
    y = [0.5 * 2 - 0.25 * 1, 1 * -2] = [0.75, -2]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def experts_reference(x: Tensor, ids: Tensor, weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """x [X, D], ids [X, K] int32 (-1 = none), weights [X, K] fp32, w13 [E, 2 I, D], w2 [E, D, I] -> [X, D] fp32."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(w13.shape[0]):
        rows, choices = (ids == expert).nonzero(as_tuple=True)
        if rows.shape[0] == 0:
            continue
        gate, up = F.linear(x.index_select(0, rows), w13[expert]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, w2[expert])
        out.index_add_(0, rows, y.float() * weights[rows, choices, None])
    return out
