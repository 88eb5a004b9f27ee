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

_PIECES = 8  # that are on their way at a time
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
        num_warps=4,
        launch_pdl=True,
    )


@triton.jit
def _merge_kernel(
    partial_ptr, lse_ptr, merges_ptr, num_merges_ptr, out_ptr, H: tl.constexpr, PIECES: tl.constexpr
):  # fmt: skip
    """Persistent: a program takes a head of a row in several pieces after another; adds them in their order."""
    columns = tl.arange(0, 512)
    gdc_wait()
    for work in range(tl.program_id(0), tl.load(num_merges_ptr) * H, tl.num_programs(0)):
        entry = merges_ptr + work // H * 3
        head = work % H
        row = tl.load(entry).to(tl.int64)
        slot = tl.load(entry + 1).to(tl.int64)
        count = tl.load(entry + 2)
        m = float("-inf")
        for c in range(0, count, PIECES):
            pieces = c + tl.arange(0, PIECES)
            lse = tl.load(lse_ptr + (slot + pieces) * H + head, mask=pieces < count, other=float("-inf"))
            m = tl.maximum(m, tl.max(lse, 0))
        acc = tl.zeros([512], tl.float32)
        total = 0.0
        for c in range(0, count, PIECES):
            pieces = c + tl.arange(0, PIECES)
            used = pieces < count
            w = tl.exp2(tl.load(lse_ptr + (slot + pieces) * H + head, mask=used, other=float("-inf")) - m)
            rows = ((slot + pieces) * H + head)[:, None] * 512
            x = tl.load(partial_ptr + rows + columns[None, :], mask=used[:, None], other=0.0)
            acc += tl.sum(x * w[:, None], 0)
            total += tl.sum(w, 0)
        tl.store(out_ptr + (row * H + head) * 512 + columns, (acc / total).to(tl.bfloat16))
