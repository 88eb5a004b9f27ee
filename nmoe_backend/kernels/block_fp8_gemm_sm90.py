"""Linear with block-quantised weights on Hopper GPUs (sm_90a), in Gluon: fp8 products, fp32 sums, bf16 out.

    out[t, n] = sum_b x_scales[b, t] * w_scales[n // 128, b] * (x[t, b] . w[n, b]),   b over blocks of 128 of the k axis

Shapes: x [T, K] e4m3; x_scales [ceil(K / 128), >= T] fp32, rows (one block of K each) contiguous in t, at multiples of
16 bytes: the transpose of what a quantiser writes a token; what lies past T in a row is never used, NaN included;
w [N, K] e4m3; w_scales [ceil(N / 128), ceil(K / 128)] fp32 contiguous; out [T, N] bf16. K a multiple of 16, N of 8 (TMA
strides).

Numerics: the product of one block of 128 is summed in the tensor core (about 14 bits) and added to the fp32 sum with
its two scales, in the order of k, whatever the tile. A row's result depends neither on the other rows nor on T.

Operands: the tensor core takes 64 rows of P and BLOCK_Q rows of Q. With many tokens P = x; with few P = w ("swap"),
so that 16 tokens don't pay for 64. Each consumer warpgroup owns 64 rows of P; one warp feeds the TMA queue. KU products
are in flight while the first of them is added up: a warpgroup that waits for each product spends 0.3 us a block.

Grid: one program an SM, persistent; program i takes tiles i, i + grid, ... No allocation; safe under graph capture.
"""

# A jit function has no types that mypy knows; launchers are typed.
# mypy: allow-untyped-defs, allow-incomplete-defs
# It takes what others find in objects as arguments.
# ruff: noqa: PLR0913

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
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

BLOCK = 128
SHARED_BYTES = 227 * 1024 - 512  # of a program, less barriers and alignment

_FP8 = gl.NVMMASharedLayout(128, 8, 2)
_SCALES = gl.NVMMASharedLayout(0, 32, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class GemmPlan:
    """Tile shape and schedule of one (T, N)."""

    block_p: int
    block_q: int
    swap: bool
    unroll: int
    stages: int
    group: int  # tiles of P that run side by side, for reuse in L2


# fmt: off
@gluon.jit
def _tile(tile, num_p, num_q, GROUP: gl.constexpr):
    """Tile -> its places along P and Q."""
    width = GROUP * num_q
    first = tile // width * GROUP
    size = gl.minimum(num_p - first, GROUP)
    return first + (tile % width) % size, (tile % width) // size


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    stage += 1
    wrap = stage == STAGES
    return gl.where(wrap, 0, stage), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def _load_weights(descs, buffers, bar, p, q, k, stage, pred, BLOCK_P: gl.constexpr, BLOCK_Q: gl.constexpr,
                  SWAP: gl.constexpr, G: gl.constexpr):
    p_desc, q_desc, _ = descs
    p_buf, q_buf, _ = buffers
    SUBS: gl.constexpr = BLOCK_P // 64
    for j in gl.static_range(G):
        if SWAP:
            for sub in gl.static_range(SUBS):
                tma.async_copy_global_to_shared(p_desc, [p * BLOCK_P + sub * 64, (k * G + j) * 128], bar,
                                                p_buf.index((stage * G + j) * SUBS + sub), pred=pred)
        else:
            tma.async_copy_global_to_shared(q_desc, [q * BLOCK_Q, (k * G + j) * 128], bar,
                                            q_buf.index(stage * G + j), pred=pred)


@gluon.jit
def _load_rows(descs, buffers, bar, p, q, token, k, stage, scale_stride, BLOCK_P: gl.constexpr, BLOCK_Q: gl.constexpr,
               SWAP: gl.constexpr, G: gl.constexpr):
    """x and its scales."""
    p_desc, q_desc, s_desc = descs
    p_buf, q_buf, s_buf = buffers
    SUBS: gl.constexpr = BLOCK_P // 64
    for j in gl.static_range(G):
        if SWAP:
            tma.async_copy_global_to_shared(q_desc, [q * BLOCK_Q, (k * G + j) * 128], bar, q_buf.index(stage * G + j))
        else:
            for sub in gl.static_range(SUBS):
                tma.async_copy_global_to_shared(p_desc, [p * BLOCK_P + sub * 64, (k * G + j) * 128], bar,
                                                p_buf.index((stage * G + j) * SUBS + sub))
        tma.async_copy_global_to_shared(s_desc, [(k * G + j) * scale_stride + token], bar, s_buf.index(stage * G + j))


@gluon.jit
def _load(descs, buffers, bars, sizes, scale_stride, BLOCK_P: gl.constexpr, BLOCK_Q: gl.constexpr, SWAP: gl.constexpr,
          KU: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, LETS_NEXT_START: gl.constexpr):
    """Feeds the TMA queue, stage by stage."""
    _, _, s_buf = buffers
    full, empty = bars
    num_p, num_q, num_k, num_tiles = sizes
    BYTES: gl.constexpr = G * ((BLOCK_P + BLOCK_Q) * 128 + s_buf.shape[1] * 4)
    # Weights never change: those of the first stages are on their way before the kernel ahead has ended.
    p, q = _tile(gl.program_id(0), num_p, num_q, GROUP)
    ahead = gl.minimum(num_k * (KU // G), STAGES)
    for s in range(ahead):
        mbarrier.expect(full.index(s), BYTES)
        _load_weights(descs, buffers, full.index(s), p, q, s, s, True, BLOCK_P, BLOCK_Q, SWAP, G)
    gdc_wait()
    if LETS_NEXT_START:
        gdc_launch_dependents()
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        p, q = _tile(tile, num_p, num_q, GROUP)
        token = q * BLOCK_Q if SWAP else p * BLOCK_P
        for k in range(num_k * (KU // G)):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, BYTES, pred=ahead <= 0)
            _load_weights(descs, buffers, bar, p, q, k, stage, ahead <= 0, BLOCK_P, BLOCK_Q, SWAP, G)
            ahead -= 1
            _load_rows(descs, buffers, bar, p, q, token, k, stage, scale_stride, BLOCK_P, BLOCK_Q, SWAP, G)
            stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _store(acc, out_desc, out_buf, row, col, SWAP: gl.constexpr):
    """One [64, BLOCK_Q] piece."""
    tma.store_wait(0)
    if SWAP:
        out_buf.permute((1, 0)).store(acc.to(gl.bfloat16))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [col, row], out_buf)
    else:
        out_buf.store(acc.to(gl.bfloat16))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [row, col], out_buf)


@gluon.jit
def _scale(s_buf, slot, w_scale, layout: gl.constexpr, ME: gl.constexpr, BLOCK_Q: gl.constexpr, SWAP: gl.constexpr):
    if SWAP:
        return (s_buf.index(slot).slice(0, BLOCK_Q).load(gl.SliceLayout(0, layout)) * w_scale)[None, :]
    else:
        return (s_buf.index(slot).slice(ME * 64, 64).load(gl.SliceLayout(1, layout)) * w_scale)[:, None]


@gluon.jit
def _consume(out_desc, out_buf, scales, buffers, bars, sizes, ME: gl.constexpr, BLOCK_P: gl.constexpr,
             BLOCK_Q: gl.constexpr, SWAP: gl.constexpr, KU: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr,
             GROUP: gl.constexpr):
    """Warpgroup ME: rows [64 ME, 64 ME + 64) of the tile. KU products are in flight while the first is added up."""
    p_buf, q_buf, s_buf = buffers
    full, empty = bars
    num_p, num_q, num_k, num_tiles = sizes
    ws, ws_stride, ws_rows, ws_cols = scales
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_Q, 32])
    SUBS: gl.constexpr = BLOCK_P // 64
    stage = 0
    phase = 0
    zero = gl.zeros([64, BLOCK_Q], gl.float32, mma)
    gdc_wait()
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        p, q = _tile(tile, num_p, num_q, GROUP)
        row = p * BLOCK_P + ME * 64
        col = q * BLOCK_Q
        w_row = row if SWAP else col
        ws_row = ws + gl.minimum(w_row // 128, ws_rows - 1) * ws_stride
        acc = gl.zeros([64, BLOCK_Q], gl.float32, mma)
        for k in range(num_k):
            w_scales: gl.tuple = (gl.load(ws_row + k * KU),)
            for j in gl.static_range(1, KU):  # past the last block products are 0
                w_scales += (gl.load(ws_row + gl.minimum(k * KU + j, ws_cols - 1)),)
            used: gl.tuple = ()
            parts: gl.tuple = ()
            for j in gl.static_range(KU):
                if j % G == 0:
                    if j > 0:
                        stage, phase = _next(stage, phase, STAGES)
                    mbarrier.wait(full.index(stage), phase)
                slot = stage * G + j % G
                parts += (warpgroup_mma(p_buf.index(slot * SUBS + ME), q_buf.index(slot).permute((1, 0)), zero,
                                        use_acc=False, is_async=True),)
                used += (stage,)
                if j == 0:
                    scale = _scale(s_buf, slot, w_scales[0], mma, ME, BLOCK_Q, SWAP)
            for j in gl.static_range(KU):
                part = warpgroup_mma_wait(KU - 1 - j, deps=[parts[j]])
                if j % G == G - 1:
                    mbarrier.arrive(empty.index(used[j]))
                acc = gl.fma(part, scale, acc)
                if j < KU - 1:
                    scale = _scale(s_buf, used[j + 1] * G + (j + 1) % G, w_scales[j + 1], mma, ME, BLOCK_Q, SWAP)
            stage, phase = _next(stage, phase, STAGES)
        _store(acc, out_desc, out_buf, row, col, SWAP)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_p", "num_q", "num_k", "num_tiles", "scale_stride", "ws_stride", "ws_rows",
                              "ws_cols"])
def _gemm_kernel(p_desc, q_desc, s_desc, out_desc, ws, num_p, num_q, num_k, num_tiles, scale_stride, ws_stride,
                 ws_rows, ws_cols,
                 BLOCK_P: gl.constexpr, BLOCK_Q: gl.constexpr, SWAP: gl.constexpr, KU: gl.constexpr,
                 STAGES: gl.constexpr, GROUP: gl.constexpr, LETS_NEXT_START: gl.constexpr):
    SUBS: gl.constexpr = BLOCK_P // 64  # warpgroups
    G: gl.constexpr = 4 if KU == 4 else 1  # blocks of k a stage
    p_buf = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * G * SUBS, 64, 128], p_desc.layout)
    q_buf = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * G, BLOCK_Q, 128], q_desc.layout)
    s_buf = gl.allocate_shared_memory(gl.float32, [STAGES * G, s_desc.block_type.shape[0]], s_desc.layout)
    out_buf = gl.allocate_shared_memory(
        gl.bfloat16, [SUBS, out_desc.block_type.shape[0], out_desc.block_type.shape[1]], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=SUBS)
    fence_async_shared()
    descs = (p_desc, q_desc, s_desc)
    buffers = (p_buf, q_buf, s_buf)
    bars = (full, empty)
    sizes = (num_p, num_q, num_k, num_tiles)
    scales = (ws, ws_stride, ws_rows, ws_cols)
    if SUBS == 1:
        gl.warp_specialize([
            (_consume, (out_desc, out_buf.index(0), scales, buffers, bars, sizes, 0, BLOCK_P, BLOCK_Q, SWAP, KU, G,
                        STAGES, GROUP)),
            (_load, (descs, buffers, bars, sizes, scale_stride, BLOCK_P, BLOCK_Q, SWAP, KU, G, STAGES, GROUP,
                     LETS_NEXT_START)),
        ], [1], [24])
    elif SUBS == 2:
        gl.warp_specialize([
            (_consume, (out_desc, out_buf.index(0), scales, buffers, bars, sizes, 0, BLOCK_P, BLOCK_Q, SWAP, KU, G,
                        STAGES, GROUP)),
            (_consume, (out_desc, out_buf.index(1), scales, buffers, bars, sizes, 1, BLOCK_P, BLOCK_Q, SWAP, KU, G,
                        STAGES, GROUP)),
            (_load, (descs, buffers, bars, sizes, scale_stride, BLOCK_P, BLOCK_Q, SWAP, KU, G, STAGES, GROUP,
                     LETS_NEXT_START)),
        ], [4, 1], [232, 24])
    else:
        gl.warp_specialize([
            (_consume, (out_desc, out_buf.index(0), scales, buffers, bars, sizes, 0, BLOCK_P, BLOCK_Q, SWAP, KU, G,
                        STAGES, GROUP)),
            (_consume, (out_desc, out_buf.index(1), scales, buffers, bars, sizes, 1, BLOCK_P, BLOCK_Q, SWAP, KU, G,
                        STAGES, GROUP)),
            (_consume, (out_desc, out_buf.index(2), scales, buffers, bars, sizes, 2, BLOCK_P, BLOCK_Q, SWAP, KU, G,
                        STAGES, GROUP)),
            (_load, (descs, buffers, bars, sizes, scale_stride, BLOCK_P, BLOCK_Q, SWAP, KU, G, STAGES, GROUP,
                     LETS_NEXT_START)),
        ], [4, 4, 1], [160, 160, 24])
# fmt: on


def gemm_plan(num_tokens: int, n: int, num_sms: int) -> GemmPlan:
    """What won on an H200 (docs/kernels.md), as rules on how many tiles there are for how many SMs."""
    if num_tokens <= 64:
        shape = (64, max(16, triton.next_power_of_2(num_tokens)), True, 4)
    elif _num_tiles(num_tokens, 64, n, 64) <= num_sms:
        shape = (64, 64, True, 4)
    elif num_tokens <= 128 or _num_tiles(num_tokens, 128, n, 64) <= num_sms:
        shape = (128, 64, False, 2)
    elif _wave_cost(num_tokens, 192, n, num_sms) < 0.92 * _wave_cost(num_tokens, 128, n, num_sms):
        shape = (192, 128, False, 1)
    else:
        shape = (128, 128, False, 2)
    block_p, block_q, swap, unroll = shape
    blocks_a_stage = 4 if unroll == 4 else 1
    stage_bytes = blocks_a_stage * ((block_p + block_q) * BLOCK + 4 * (max(32, block_q) if swap else 256)) + 16
    stages = min(16, (SHARED_BYTES - block_p * block_q * 2) // stage_bytes)
    return GemmPlan(
        block_p=block_p, block_q=block_q, swap=swap, unroll=unroll, stages=stages, group=1 if swap else 16
    )  # fmt: skip


def block_fp8_gemm(
    x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor, out: Tensor, num_sms: int, spare_sms: int = 0
) -> None:
    """Writes out; shapes as in the module's docstring. spare_sms > 0: as many of num_sms are left to the next kernel,
    which may start as soon as the one ahead has ended."""
    num_tokens, k = x.shape
    n = w.shape[0]
    _check(x, x_scales, w, w_scales, out)
    if num_tokens == 0:
        return
    num_sms -= spare_sms
    plan = gemm_plan(num_tokens, n, num_sms)
    p, q = (w, x) if plan.swap else (x, w)
    num_p, num_q = -(-p.shape[0] // plan.block_p), -(-q.shape[0] // plan.block_q)
    box = [plan.block_q, 64] if plan.swap else [64, plan.block_q]
    # TMA writes to multiples of 128 bytes only: a stage's scales are 32 or more.
    tokens = max(32, plan.block_q) if plan.swap else triton.next_power_of_2(plan.block_p)
    stride = x_scales.stride(0)
    num_tiles = num_p * num_q
    _gemm_kernel[(min(num_sms, num_tiles),)](
        TensorDescriptor(p, p.shape, p.stride(), [64, BLOCK], _FP8),
        TensorDescriptor(q, q.shape, q.stride(), [plan.block_q, BLOCK], _FP8),
        TensorDescriptor(x_scales, [(x_scales.shape[0] - 1) * stride + x_scales.shape[1]], [1], [tokens], _SCALES),
        TensorDescriptor(out, out.shape, out.stride(), box, gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16)),
        w_scales, num_p, num_q, -(-k // (BLOCK * plan.unroll)), num_tiles, stride, w_scales.stride(0),
        w_scales.shape[0], w_scales.shape[1], BLOCK_P=plan.block_p, BLOCK_Q=plan.block_q, SWAP=plan.swap,
        KU=plan.unroll, STAGES=plan.stages, GROUP=plan.group, LETS_NEXT_START=spare_sms > 0, num_warps=4,
        launch_pdl=True,
        maxnreg=128 if plan.block_p == 64 else None,  # half of the registers: room for the small kernel ahead
    )  # fmt: skip


def _check(x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor, out: Tensor) -> None:
    (num_tokens, k), n = x.shape, w.shape[0]
    blocks = (-(-n // BLOCK), -(-k // BLOCK))
    if w.shape != (n, k) or out.shape != (num_tokens, n) or tuple(w_scales.shape) != blocks or k % 16 or n % 8:
        raise ValueError(
            f"got x {tuple(x.shape)}, w {tuple(w.shape)}, w_scales {tuple(w_scales.shape)}, out {tuple(out.shape)}; "
            "need [T, K], [N, K], [ceil(N / 128), ceil(K / 128)], [T, N], with K a multiple of 16 and N of 8."
        )
    is_ragged = x_scales.stride(1) != 1 or x_scales.stride(0) % 4  # TMA would begin a load inside of 16 bytes
    if x_scales.shape[0] != blocks[1] or x_scales.shape[1] < num_tokens or is_ragged:
        raise ValueError(
            f"got x_scales {tuple(x_scales.shape)} with strides {x_scales.stride()}; need "
            f"[{blocks[1]}, >= {num_tokens}] with contiguous rows at multiples of 16 bytes: one block of K a row."
        )
    fp8 = torch.float8_e4m3fn
    if (x.dtype, w.dtype, out.dtype) != (fp8, fp8, torch.bfloat16) or not w_scales.is_contiguous():
        raise ValueError(f"got {x.dtype}, {w.dtype} -> {out.dtype}; need e4m3, e4m3 -> bf16 and contiguous w_scales.")


def _num_tiles(rows: int, block_rows: int, columns: int, block_columns: int) -> int:
    return -(-rows // block_rows) * -(-columns // block_columns)


def _wave_cost(num_tokens: int, block_tokens: int, n: int, num_sms: int) -> int:
    """Waves times the tokens of a tile."""
    return -(-_num_tiles(num_tokens, block_tokens, n, 128) // num_sms) * block_tokens
