"""The two products a head around absorbed attention, on Hopper GPUs (sm_90a), in Gluon.

    absorb_queries   latent[t, h, :C] = q[t, h, :N] . W_UK[h]                     before attention
    expand_values    attended[t, h] . W_UV[h], quantised or bf16                  after it, for the linear that follows

Shapes: q [T, H, N + R] bf16, w_kv_b [H, N + V, C] bf16 (a head's W_UK [N, C] above its W_UV [V, C]), latent
[T, H, C + R] bf16, whose last R values are left alone; attended [T, H, C] bf16; values [T, H V] e4m3 with scales
[H, >= T] fp32, or bf16. N = V = 128 and C = 512: a head's values are one block of the quantisation. Contiguous rows.

Numerics: bf16 products, fp32 sums; both are rounded to bf16, and values quantised from that: s = max(max |v|, 1e-4)
/ 448, value = e4m3(v * (1 / s)). A row's result depends on nothing but the row.

Grid: a program a head. Its weight (128 KB) is fetched once, before the kernel ahead has ended, and stays in shared
memory; tokens stream past it.
"""

# A jit function has no types that mypy knows; launchers are typed.
# mypy: allow-untyped-defs, allow-incomplete-defs
# It takes what others find in objects as arguments.
# ruff: noqa: PLR0913

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

HEAD_DIM = 128  # N and V
LATENT_DIM = 512  # C
_QUERY_ROWS = 64  # tokens of a tile
_COLUMNS = 64  # of the latent dims that expand_values fetches at a time
_SHARED = gl.NVMMASharedLayout(128, 16, 2)


# fmt: off
@gluon.jit
def _fetch(desc, buffer, full, tile, column, pred, BYTES: gl.constexpr):
    mbarrier.expect(full, BYTES, pred=pred)
    tma.async_copy_global_to_shared(desc, [tile * buffer.shape[0], column], full, buffer, pred=pred)


@gluon.jit(do_not_specialize=["num_tiles"])
def _absorb_kernel(q_desc, w_desc, out_desc, num_tiles, HEAD_ROWS: gl.constexpr, QUERY: gl.constexpr,
                   OUT: gl.constexpr):
    ROWS: gl.constexpr = q_desc.block_type.shape[0]
    STAGES: gl.constexpr = 2
    BYTES: gl.constexpr = ROWS * 128 * 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16])
    head = gl.program_id(0)
    w_buf = gl.allocate_shared_memory(gl.bfloat16, [128, 512], w_desc.layout)
    q_buf = gl.allocate_shared_memory(gl.bfloat16, [STAGES, ROWS, 128], q_desc.layout)
    out_buf = gl.allocate_shared_memory(gl.bfloat16, [ROWS, 512], out_desc.layout)
    w_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(w_full, count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
    fence_async_shared()
    mbarrier.expect(w_full, 128 * 512 * 2)
    tma.async_copy_global_to_shared(w_desc, [head * HEAD_ROWS, 0], w_full, w_buf)
    gdc_wait()
    gdc_launch_dependents()
    for s in gl.static_range(STAGES):
        _fetch(q_desc, q_buf.index(s), full.index(s), s, head * QUERY, s < num_tiles, BYTES)
    mbarrier.wait(w_full, 0)
    zero = gl.zeros([ROWS, 512], gl.float32, layout)
    for tile in range(num_tiles):
        stage = tile % STAGES
        mbarrier.wait(full.index(stage), tile // STAGES & 1)
        acc = warpgroup_mma(q_buf.index(stage), w_buf, zero, use_acc=False, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        gl.thread_barrier()
        following = tile + STAGES
        _fetch(q_desc, q_buf.index(stage), full.index(stage), following, head * QUERY, following < num_tiles, BYTES)
        tma.store_wait(0)
        out_buf.store(acc.to(gl.bfloat16))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [tile * ROWS, head * OUT], out_buf)
    tma.store_wait(0)


@gluon.jit
def _store_values(values, x, tile, head, num_tokens, NUM_HEADS: gl.constexpr):
    ROWS: gl.constexpr = x.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [ROWS // 16, 1], [1, 0])
    row = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    column = head * 128 + gl.arange(0, 128, gl.SliceLayout(0, layout))
    to = values + row.to(gl.int64)[:, None] * (NUM_HEADS * 128) + column[None, :]
    gl.store(to, gl.convert_layout(x.to(gl.float8e4nv), layout), mask=(row < num_tokens)[:, None])


@gluon.jit(do_not_specialize=["num_tokens", "scales_stride"])
def _expand_kernel(x_desc, w_desc, values, scales, num_tokens, scales_stride, NUM_HEADS: gl.constexpr,
                   HEAD_ROWS: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr):
    COLUMNS: gl.constexpr = x_desc.block_type.shape[1]  # of the latent dims, a step
    STEPS: gl.constexpr = 512 // COLUMNS
    BYTES: gl.constexpr = ROWS * COLUMNS * 2
    WARPS: gl.constexpr = ROWS // 16
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 128, 16])
    head = gl.program_id(0)
    w_buf = gl.allocate_shared_memory(gl.bfloat16, [128, 512], w_desc.layout)
    x_buf = gl.allocate_shared_memory(gl.bfloat16, [STAGES, ROWS, COLUMNS], x_desc.layout)
    w_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(w_full, count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
    fence_async_shared()
    mbarrier.expect(w_full, 128 * 512 * 2)
    tma.async_copy_global_to_shared(w_desc, [head * HEAD_ROWS + 128, 0], w_full, w_buf)
    gdc_wait()
    gdc_launch_dependents()
    num_steps = (num_tokens + ROWS - 1) // ROWS * STEPS
    for s in gl.static_range(STAGES):
        _fetch(x_desc, x_buf.index(s), full.index(s), s // STEPS, head * 512 + s % STEPS * COLUMNS, s < num_steps,
               BYTES)
    mbarrier.wait(w_full, 0)
    stage = 0
    phase = 0
    for tile in range(num_steps // STEPS):
        acc = gl.zeros([ROWS, 128], gl.float32, layout)
        for k in gl.static_range(STEPS):
            mbarrier.wait(full.index(stage), phase)
            acc = warpgroup_mma(x_buf.index(stage), w_buf.slice(k * COLUMNS, COLUMNS, 1).permute((1, 0)), acc,
                                 is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            gl.thread_barrier()
            following = tile * STEPS + k + STAGES
            _fetch(x_desc, x_buf.index(stage), full.index(stage), following // STEPS,
                   head * 512 + following % STEPS * COLUMNS, following < num_steps, BYTES)
            stage += 1
            wrap = stage == STAGES
            stage = gl.where(wrap, 0, stage)
            phase = gl.where(wrap, phase ^ 1, phase)
        rounded = acc.to(gl.bfloat16)
        token = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        if scales is None:
            column = head * 128 + gl.arange(0, 128, gl.SliceLayout(0, layout))
            to = values + token.to(gl.int64)[:, None] * (NUM_HEADS * 128) + column[None, :]
            gl.store(to, rounded, mask=(token < num_tokens)[:, None])
        else:
            acc = rounded.to(gl.float32)
            scale = gl.maximum(gl.max(gl.abs(acc), axis=1), 1e-4) * (1.0 / 448.0)
            gl.store(scales + head.to(gl.int64) * scales_stride + token, scale, mask=token < num_tokens)
            _store_values(values, acc * (1.0 / scale)[:, None], tile, head, num_tokens, NUM_HEADS)
# fmt: on


def absorb_queries(q: Tensor, w_kv_b: Tensor, latent: Tensor) -> None:
    """q [T, H, N + R], w_kv_b [H, N + V, C] -> latent [T, H, C + R][..., :C]"""
    num_tokens, num_heads, query_dim = q.shape
    _check(w_kv_b, num_heads, {"q": q, "latent": latent})
    if latent.shape[:2] != q.shape[:2] or query_dim < HEAD_DIM or latent.shape[2] < LATENT_DIM:
        raise ValueError(
            f"got q {tuple(q.shape)}, latent {tuple(latent.shape)}; need [T, H, 128 + R], [T, H, 512 + R]."
        )
    if num_tokens:
        box = [_QUERY_ROWS, LATENT_DIM]
        _absorb_kernel[(num_heads,)](
            TensorDescriptor.from_tensor(q.flatten(1), [_QUERY_ROWS, HEAD_DIM], _SHARED), _weight(w_kv_b),
            TensorDescriptor.from_tensor(latent.flatten(1), box, _SHARED), -(-num_tokens // _QUERY_ROWS),
            HEAD_ROWS=2 * HEAD_DIM, QUERY=query_dim, OUT=latent.shape[2], num_warps=8, launch_pdl=True,
        )  # fmt: skip


def expand_values(attended: Tensor, w_kv_b: Tensor, values: Tensor, scales: Tensor | None = None) -> None:
    """attended [T, H, C], w_kv_b [H, N + V, C] -> values [T, H V] e4m3 and scales [H, >= T] fp32; without: bf16"""
    num_tokens, num_heads, latent_dim = attended.shape
    _check(w_kv_b, num_heads, {"attended": attended, "values": values})
    if latent_dim != LATENT_DIM or values.shape != (num_tokens, num_heads * HEAD_DIM):
        raise ValueError(f"got attended {tuple(attended.shape)}, values {tuple(values.shape)}; need [T, H, 512], "
                         "[T, H * 128].")  # fmt: skip
    if values.dtype != (torch.bfloat16 if scales is None else torch.float8_e4m3fn):
        raise ValueError(
            f"got values {values.dtype}, scales: {scales is not None}; need e4m3 with scales or bf16 without."
        )
    if scales is not None and (scales.shape[0] != num_heads or scales.shape[1] < num_tokens or scales.stride(1) != 1):
        raise ValueError(f"got scales {tuple(scales.shape)}; need contiguous rows [{num_heads}, >= {num_tokens}].")
    if num_tokens:
        rows = 64 if num_tokens <= 64 else 128
        _expand_kernel[(num_heads,)](
            TensorDescriptor.from_tensor(attended.flatten(1), [rows, _COLUMNS], _SHARED), _weight(w_kv_b), values,
            scales, num_tokens, 0 if scales is None else scales.stride(0), NUM_HEADS=num_heads,
            HEAD_ROWS=2 * HEAD_DIM, ROWS=rows, STAGES=8 if rows == 64 else 5, num_warps=rows // 16, launch_pdl=True,
        )  # fmt: skip


def absorb_queries_reference(q: Tensor, w_kv_b: Tensor) -> Tensor:
    """[T, H, N + R], [H, N + V, C] -> [T, H, C] in float64"""
    return torch.einsum("thn,hnc->thc", q[..., :HEAD_DIM].double(), w_kv_b[:, :HEAD_DIM].double())


def expand_values_reference(attended: Tensor, w_kv_b: Tensor) -> Tensor:
    """[T, H, C], [H, N + V, C] -> [T, H V] in float64, not quantised"""
    return torch.einsum("thc,hvc->thv", attended.double(), w_kv_b[:, HEAD_DIM:].double()).flatten(1)


def _weight(w_kv_b: Tensor) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(w_kv_b.view(-1, LATENT_DIM), [HEAD_DIM, LATENT_DIM], _SHARED)


def _check(w_kv_b: Tensor, num_heads: int, rows: dict[str, Tensor]) -> None:
    if w_kv_b.shape != (num_heads, 2 * HEAD_DIM, LATENT_DIM) or not w_kv_b.is_contiguous():
        raise ValueError(f"got w_kv_b {tuple(w_kv_b.shape)}; need contiguous [{num_heads}, 256, 512].")
    strided = [name for name, tensor in rows.items() if not tensor.is_contiguous()]
    if strided:
        raise ValueError(f"got strided {strided}; need contiguous tensors: the kernel addresses rows.")
