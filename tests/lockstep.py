"""The kernels' table held against plain torch, operation by operation, on the very inputs that each one had."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor

from nmoe_backend.kernels.block_fp8 import dequantize_blocks_reference
from nmoe_backend.layers.layer_ops import MLAWeights, SharedExpert
from nmoe_backend.layers.ops import ops_for
from nmoe_backend.layers.plain_ops import PlainOps
from nmoe_backend.layers.rows import Rows
from tests.padded import without_padding
from tests.rounded import rounded


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def wide(rows: Rows) -> Tensor:
    values, scales = rows.require_fp8()
    return values.float() * scales.t().repeat_interleave(128, 1)


def _unless_off(method: Callable) -> Callable:
    @wraps(method)
    def run(self, *args, **kwargs):
        if self.is_on:
            return method(self, *args, **kwargs)
        owner = self._exchange if method.__name__ == "forward" else self._ops
        return getattr(owner, method.__name__)(*args, **kwargs)

    return run


class _KeptShared:
    """The shared expert, with what it gave in `out`."""

    def __init__(self, shared: SharedExpert) -> None:
        self._shared = shared

    def up(self, rows: Rows, *, beside_next: bool = False) -> Tensor:
        return self._shared.up(rows, beside_next=beside_next)

    def down(self, gate_up: Tensor, *, beside_next: bool = False) -> Tensor:
        self.out = self._shared.down(gate_up, beside_next=beside_next)
        return self.out


class Lockstep:
    """A table and its exchange; notes how far each result is from plain torch's on the same inputs. Padding is left
    out: rows from `batch.num_real` on. While `is_on` is False it only passes calls on."""

    def __init__(self, ops, exchange) -> None:
        self._ops, self._exchange = ops, exchange
        self._plain = PlainOps(ops_for(torch.device("cuda:0")))
        self._num_real = 0
        self.is_on = True
        self.pads_steps, self.captures = True, False
        self.error_word, self.expert_rows = exchange.error_word, exchange.expert_rows
        self.errors: dict[str, list[float]] = {}
        self.routed: list[bool] = []  # whether a token went to the experts of plain torch

    def __getattr__(self, name: str):
        return getattr(self._ops, name)

    def _note(self, name: str, ours: Tensor, plain: Tensor) -> None:
        real = slice(self._num_real)
        self.errors.setdefault(name, []).append(relative(ours[real], plain[real]) if self._num_real else 0.0)

    def plan_mla(self, batch, spec, rope_table):
        self._num_real = int(batch.num_real)
        return self._ops.plan_mla(batch, spec, rope_table), batch, rope_table

    @_unless_off
    def norm(self, x, weight, eps, form, residual=None):
        kept = None if residual is None else residual.clone()
        plain = self._plain.norm(x, weight, eps, form, kept).require_wide()
        rows = self._ops.norm(x, weight, eps, form, residual)
        if residual is not None:
            self._note("bf16 residual", residual, kept)
        if rows.wide is not None:
            self._note("bf16 norm", rows.wide, plain)
        if rows.values is not None:
            self._note("fp8 norm", wide(rows), plain)
        return rows

    @_unless_off
    def linear(self, rows, weight, *, beside_next=False):
        out = self._ops.linear(rows, weight, beside_next=beside_next)
        w = dequantize_blocks_reference(weight.values, weight.scales, weight.block, torch.float32)
        self._note("bf16 linear", out, wide(rows) @ w.t())
        return out

    @_unless_off
    def swiglu(self, gate_up):
        rows = self._ops.swiglu(gate_up)
        self._note("fp8 swiglu", wide(rows), self._plain.swiglu(gate_up.float()).require_wide())
        return rows

    def mla(self, q, kv, weights, plan, cache):
        plan, batch, table = plan
        if not self.is_on:
            return self._ops.mla(q, kv, weights, plan, cache)
        expected, real = cache.clone(), slice(self._num_real)
        if self._num_real:
            batch = without_padding(batch, cache.shape[1])
            plain = MLAWeights(spec=weights.spec, kv_norm=weights.kv_norm, w_kv_b=weights.w_kv_b)
            turns = self._plain.plan_mla(batch, weights.spec, table)
            want = self._plain.mla(q[real].clone(), kv[real].clone(), plain, turns, expected).require_wide()
        rows = self._ops.mla(q, kv, weights, plan, cache)
        if self._num_real:
            self._note("fp8 mla", wide(rows), want)
            self._note_cache(cache.flatten(0, 1), expected.flatten(0, 1), batch.cache_idx)
        return rows

    def _note_cache(self, ours: Tensor, plain: Tensor, written: Tensor) -> None:
        """[rows, C + R]: the rows that the step wrote by themselves, or a long context would hide one of them; all
        others are as they were."""
        self.errors.setdefault("bf16 cache", []).append(relative(ours[written], plain[written]))
        touched = (ours != plain).any(-1)
        touched[written] = False
        self.errors.setdefault("bf16 untouched", []).append(float(touched.sum()))

    @_unless_off
    def head(self, x, weight, out=None):
        logits = self._ops.head(x, weight, out)
        self._note("bf16 head", logits, x.float() @ weight.float().t())
        return logits

    @_unless_off
    def route(self, rows, weight, bias, spec):
        ids, weights = self._ops.route(rows, weight, bias, spec)
        plain = self._plain.route(rows, weight.float().sum(0), bias, spec)
        order, expected = ids.long().sort(-1), plain[0].sort(-1)
        same = (order.values == expected.values).all(-1)  # a near-tie may fall the other way
        self.routed += same[: self._num_real].tolist()
        ours, others = weights.gather(1, order.indices), plain[1].gather(1, expected.indices)
        self._note("bf16 weights", torch.where(same[:, None], ours, others), others)
        return ids, weights

    @_unless_off
    def forward(self, rows, choice, experts, batch, shared):
        """The exchange's."""
        kept = _KeptShared(shared)
        out = self._exchange.forward(rows, choice, experts, batch, kept)
        x, want = wide(rows), torch.zeros(out.shape, device=out.device)
        for expert in range(experts.num_local):
            w13, w2 = (
                dequantize_blocks_reference(stack.values[expert], stack.scales[expert], stack.block, torch.float32)
                for stack in (experts.w13, experts.w2)
            )
            token, place = (choice[0] == expert).nonzero(as_tuple=True)
            h = rounded(F.silu(x[token] @ w13[0].t()) * (x[token] @ w13[1].t()))
            want.index_add_(0, token, h @ w2.t() * choice[1][token, place, None])
        self._note("bf16 exchange", out, want + kept.out.float())
        return out

    def worst(self) -> dict[str, float]:
        """The largest error of each operation."""
        return {name: max(found) for name, found in self.errors.items()}


BOUNDS = {"bf16": 0.01, "fp8": 0.05}  # tests/kernels/test_hopper_steps.py argues them


def beyond_bounds(worst: dict[str, float]) -> dict[str, float]:
    return {name: error for name, error in worst.items() if not error <= BOUNDS[name.split()[0]]}
