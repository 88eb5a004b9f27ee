"""Padded steps in plain torch: what the kernels get, computed as if it had come without padding."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nmoe_backend.layers.batch import Batch, PrefillRow
from nmoe_backend.layers.plain_ops import PlainMLAPlan, PlainOps
from nmoe_backend.layers.rows import Rows
from nmoe_backend.layers.table import build_table
from nmoe_backend.types import KEY_BLOCK


def without_padding(batch: Batch, page_size: int) -> Batch:
    """The same tokens as a table without padding gets them. Waits for the device."""
    num_real, num_decode = int(batch.num_real), int((batch.context_lens > 0).sum())
    assert bool((batch.context_lens[:num_decode] > 0).all()), "decode rows come first"
    assert bool((batch.cache_idx[:num_real] >= 0).all()) and bool((batch.cache_idx[num_real:] == -1).all())
    prefill = []
    if batch.padded_prefill is not None:
        columns, num_keys = batch.padded_prefill, 0
        for row in range(int(columns.num_rows)):
            first, last = columns.bounds[row : row + 2].tolist()
            start, end = int(columns.starts[row]), int(columns.starts[row]) + last - first
            num_keys += -(-end // KEY_BLOCK) * KEY_BLOCK
            pages = columns.tables[row, : -(-end // page_size)]
            prefill.append(PrefillRow(first=first, last=last, start=start, pages=pages))
        assert num_keys <= columns.max_keys
        assert [row.first for row in prefill] == [num_decode, *(row.last for row in prefill)][: len(prefill)]
        assert num_real == (prefill[-1].last if prefill else num_decode)
    return replace(
        batch,
        token_ids=batch.token_ids[:num_real],
        positions=batch.positions[:num_real],
        cache_idx=batch.cache_idx[:num_real],
        num_decode=num_decode,
        block_tables=batch.block_tables[:num_decode],
        context_lens=batch.context_lens[:num_decode],
        prefill=tuple(prefill),
        padded_prefill=None,
    )


class PaddedOps(PlainOps):
    """A table that pads. Attention of padding is NaN, which must reach nobody."""

    pads_steps = True

    def plan_mla(self, batch, spec, rope_table):
        self.shapes = [*getattr(self, "shapes", []), (batch.num_tokens, batch.num_decode)]
        return batch, rope_table

    def mla(self, q: Tensor, kv: Tensor, weights, plan, cache: Tensor) -> Rows:
        batch, rope_table = plan
        real = without_padding(batch, cache.shape[1])
        out = q.new_full((batch.num_tokens, weights.spec.num_heads * weights.spec.v_head_dim), float("nan"))
        if real.num_tokens:
            turns = rope_table.index_select(0, real.positions)
            rows = slice(real.num_tokens)
            plain = super().mla(q[rows], kv[rows], weights, PlainMLAPlan(batch=real, turns=turns), cache)
            out[rows] = plain.require_wide()
        return Rows(out)


def padded_table(rank, request, switches):
    """For `layers.context.build_table`: PaddedOps in place of the plain table."""
    ops, exchange = build_table(rank, request, switches)
    assert isinstance(ops, PlainOps)
    return PaddedOps(ops._ops), exchange


def assert_close(ours: list, reference: list) -> None:
    """Two runs of a Driver: the same tokens, and logits that differ by the order of fp32 sums only."""
    for a, b in zip(ours, reference, strict=True):
        assert a.tokens == b.tokens
        torch.testing.assert_close(a.logits, b.logits, rtol=1e-4, atol=1e-4)
