"""Plain torch that rounds what a linear or an expert reads to e4m3 in blocks of 128, as fp8 serving does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nmoe_backend.layers.layer_ops import ExpertWeights
from nmoe_backend.layers.plain_ops import PlainOps
from nmoe_backend.layers.rows import Rows
from nmoe_backend.layers.table import build_table


def rounded(x: Tensor) -> Tensor:
    """To e4m3 in blocks of 128 and back, by the rule of the kernels."""
    blocks = x.float().unflatten(-1, (-1, 128))
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448
    return ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2).to(x.dtype)


class _RoundedExperts:
    def __init__(self, weights: ExpertWeights) -> None:
        self.num_local, self.w13, self.w2 = weights.num_local, weights.w13, weights.w2

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros(x.shape)
        for expert in range(self.num_local):
            rows, choices = (ids == expert).nonzero(as_tuple=True)
            gate, up = F.linear(rounded(x[rows]), self.w13[expert]).chunk(2, dim=-1)
            y = F.linear(rounded(F.silu(gate) * up), self.w2[expert])
            out.index_add_(0, rows, y * weights[rows, choices, None])
        return out


class _RoundedOps(PlainOps):
    def linear(self, rows: Rows, weight: tuple[Tensor, ...], *, beside_next: bool = False) -> Tensor:
        return super().linear(Rows(rounded(rows.require_wide())), weight)

    def pack_experts(self, weights: ExpertWeights) -> _RoundedExperts:
        return _RoundedExperts(weights)


def rounded_table(rank, request, switches):
    """For `layers.context.build_table`: the plain table, rounding."""
    ops, exchange = build_table(rank, request, switches)
    assert isinstance(ops, PlainOps)
    return _RoundedOps(ops._ops), exchange
