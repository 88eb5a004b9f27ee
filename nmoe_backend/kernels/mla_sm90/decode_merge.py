"""Joins the pieces of rows whose context was cut: out = sum_c 2^(lse_c - m) partial_c / sum_c 2^(lse_c - m).

Pieces are added in ascending order, whichever programs computed them. Which rows these are stands on the device.
"""

# A jit function has no types that mypy knows; launchers are typed.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from nmoe_backend.kernels.mla_sm90.decode_plan import MlaDecodePlan

_PIECES = 4  # of a row, and
_HEADS = 4  # of it, that a program adds up at a time
_PROGRAMS = 1024


def merge_pieces(plan: MlaDecodePlan, out: Tensor) -> None:
    """Writes the rows of out [S, H, 512] that are in several pieces."""
    _merge_kernel[(_PROGRAMS,)](
        plan.partial,
        plan.lse,
        plan.merges,
        plan.num_merges,
        out,
        H=out.shape[1],
        PIECES=_PIECES,
        HEADS=_HEADS,
        num_warps=4,
        launch_pdl=True,
    )


@triton.jit
def _merge_kernel(
    partial_ptr, lse_ptr, merges_ptr, num_merges_ptr, out_ptr, H: tl.constexpr, PIECES: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Persistent: a program takes a few heads of a row in several pieces after others."""
    columns = tl.arange(0, 512)
    gdc_wait()
    for work in range(tl.program_id(0), tl.load(num_merges_ptr) * (H // HEADS), tl.num_programs(0)):
        entry = merges_ptr + work // (H // HEADS) * 3
        heads = work % (H // HEADS) * HEADS + tl.arange(0, HEADS)
        row = tl.load(entry).to(tl.int64)
        slot = tl.load(entry + 1).to(tl.int64)
        count = tl.load(entry + 2)
        m = tl.full([HEADS], float("-inf"), tl.float32)
        for c in range(0, count, PIECES):
            pieces = c + tl.arange(0, PIECES)
            places = (slot + pieces)[:, None] * H + heads[None, :]
            m = tl.maximum(m, tl.max(tl.load(lse_ptr + places, mask=(pieces < count)[:, None], other=float("-inf")), 0))
        acc = tl.zeros([HEADS, 512], tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        for c in range(0, count, PIECES):
            pieces = c + tl.arange(0, PIECES)
            used = pieces < count
            places = (slot + pieces)[:, None] * H + heads[None, :]
            w = tl.exp2(tl.load(lse_ptr + places, mask=used[:, None], other=float("-inf")) - m[None, :])
            x = partial_ptr + places[:, :, None] * 512 + columns[None, None, :]
            acc += tl.sum(tl.load(x, mask=used[:, None, None], other=0.0) * w[:, :, None], 0)
            total += tl.sum(w, 0)
        target = out_ptr + (row * H + heads)[:, None] * 512 + columns[None, :]
        tl.store(target, (acc / total[:, None]).to(tl.bfloat16))
