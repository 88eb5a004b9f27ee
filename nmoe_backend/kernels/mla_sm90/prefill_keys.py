"""The keys of a piece of prefill: latents gathered from their pages, then expanded to keys and values of every head.

Both end at the number of blocks that stands on the device, so that one graph serves all prefixes up to its bucket. The
product adds up 64 latents at a time in one order, whatever the key's place.
"""

# A jit function has no types that mypy knows; launchers are typed.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nmoe_backend.kernels.mla_sm90.prefill_plan import BLOCK, EXPANDED_DIM, MlaPrefillPlan

_GATHER_ROWS = tl.constexpr(16)
_EXPAND_K = tl.constexpr(64)  # latents of a stage of the product that expands
_EXPAND_GROUP = tl.constexpr(16)  # key blocks that take turns at a head's weights while these are in L2


def gather_keys(plan: MlaPrefillPlan, cache: Tensor, block_tables: Tensor, piece: int) -> None:
    """The piece's latents and rope keys into plan.keys."""
    _gather_keys_kernel[(plan.piece_keys // _GATHER_ROWS.value,)](
        cache, block_tables, block_tables.stride(0), plan.blocks, plan.keys, plan.counters[piece:],
        piece * (plan.piece_keys // BLOCK), PAGE=cache.shape[1], num_warps=4,
    )  # fmt: skip


def expand_keys(plan: MlaPrefillPlan, w_kv_b: Tensor, piece: int) -> None:
    """The piece's keys and values of every head, from the latents in plan.keys, into plan.expanded."""
    weight, expanded = w_kv_b.flatten(0, 1), plan.expanded.flatten(1)
    piece_blocks = plan.piece_keys // BLOCK
    _expand_keys_kernel[(plan.num_programs,)](
        TensorDescriptor.from_tensor(plan.keys, [BLOCK, _EXPAND_K.value]),
        TensorDescriptor.from_tensor(weight, [EXPANDED_DIM, _EXPAND_K.value]),
        TensorDescriptor.from_tensor(expanded, [BLOCK, EXPANDED_DIM]),
        plan.num_blocks, piece * piece_blocks, piece_blocks, weight.shape[0] // EXPANDED_DIM, num_warps=8,
        num_stages=3,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_block", "table_stride"], do_not_specialize_on_alignment=["counter_ptr"])
def _gather_keys_kernel(
    cache_ptr, tables_ptr, table_stride, blocks_ptr, keys_ptr, counter_ptr, first_block, PAGE: tl.constexpr
):  # fmt: skip
    """16 rows of latents and rope keys; what a block has beyond its keys is zero, so that 0 * value is 0."""
    PARTS: tl.constexpr = 128 // _GATHER_ROWS
    if tl.program_id(0) == 0:
        tl.store(counter_ptr, 0)  # of the attention that follows
    block = tl.program_id(0) // PARTS
    entry = blocks_ptr + (first_block + block) * 4
    row = tl.load(entry)
    if row >= 0:
        offset = (tl.program_id(0) % PARTS) * _GATHER_ROWS + tl.arange(0, _GATHER_ROWS)
        used = offset < tl.load(entry + 2)
        position = tl.load(entry + 1) + offset
        page = tl.load(tables_ptr + row.to(tl.int64) * table_stride + position // PAGE, mask=used, other=0)
        source = cache_ptr + (page.to(tl.int64) * PAGE + position % PAGE)[:, None] * 576
        target = keys_ptr + (block * 128 + offset)[:, None] * 576
        latent = tl.arange(0, 512)[None, :]
        tl.store(target + latent, tl.load(source + latent, mask=used[:, None], other=0.0))
        rope = 512 + tl.arange(0, 64)[None, :]
        tl.store(target + rope, tl.load(source + rope, mask=used[:, None], other=0.0))


@triton.jit(do_not_specialize=["first_block", "piece_blocks", "num_heads"])
def _expand_keys_kernel(keys_desc, weight_desc, out_desc, num_blocks_ptr, first_block, piece_blocks, num_heads):
    """Persistent over tiles of 128 keys of one head: [128, 512] @ [512, 256], fp32 sums. Keys of the blocks in use."""
    num_blocks = tl.minimum(tl.maximum(tl.load(num_blocks_ptr) - first_block, 0), piece_blocks)
    for tile in tl.range(tl.program_id(0), num_blocks * num_heads, tl.num_programs(0), flatten=True):
        group = tile // (_EXPAND_GROUP * num_heads) * _EXPAND_GROUP
        size = tl.minimum(num_blocks - group, _EXPAND_GROUP)
        inside = tile - group * num_heads
        row = (group + inside % size) * 128
        column = inside // size * 256
        total = tl.zeros((128, 256), tl.float32)
        for k in range(0, 512, _EXPAND_K):
            weight = weight_desc.load([column, k])
            total = tl.dot(keys_desc.load([row, k]), weight.T, total)
        out_desc.store([row, column], total.to(tl.bfloat16))
