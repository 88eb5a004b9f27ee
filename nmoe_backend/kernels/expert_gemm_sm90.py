"""Grouped fp8 expert GEMMs on Hopper GPUs (sm_90a), in Gluon.

    expert_up    h[r] = quantise(silu(g) * u),  g, u = x[r] . w13[e, 0 or 1]    x [R, D] -> h [R, I] e4m3 + scales
    expert_down  y[r] = h[r] . w2[e]                                            h [R, I] -> y [R, D] bf16

Row r belongs to expert e as the tiles say (expert_rows_gpu.py): tile = (expert, its first tile, its first row, the row
past its last), 128 rows each; `num_tiles` is on the device, the grid is one program an SM, so nothing depends on the
batch in a launch. Rows past an expert's last one are neither stored nor do they influence others, NaN included.

Shapes: x, h e4m3 row-major; their scales [columns / 128, >= R] fp32, one block of columns a row; w13 [E, 2, I, D] e4m3
with scales [E, 2, I / 128, D / 128] fp32, w2 [E, D, I] with [E, D / 128, I / 128], contiguous. I a multiple of 128, D
of 256.

Numerics: a product over 128 columns in the tensor core, times both scales, summed in fp32 in the order of columns.
SwiGLU in fp32 on those sums; h in blocks of 128: s = max(max |h|, 1e-4) / 448, value = e4m3(h * (1 / s)).
A row's result depends on nothing but the row.

Tile: 128 rows x (128 gate + 128 up columns), or x 256 columns; two warpgroups of 64 rows with both halves of their
columns, so that SwiGLU and the block's maximum stay in a warpgroup's registers; one warp feeds the TMA queue, four
stages of 48 KB. A warpgroup has one product in flight (two would need 256 registers) and does everything but the sum
under it, so that the other one's products fill what is left. A tile loads 16, 64, 80 or 128 rows of x; with up to 64
the second warpgroup only passes stages on. Rows of a stage that no tile of the program has loaded are zeros: a decode
step runs at the card's power limit, and a product with zeros takes less of it than one with rows of another expert.
Units of one expert run side by side, rows innermost, so that its weights come from memory once.
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

BLOCK = 128
_STAGES = 4
_FP8 = gl.NVMMASharedLayout(128, 8, 2)
_SCALES = gl.NVMMASharedLayout(0, 32, 1)


# fmt: off
@gluon.jit
def _tile(tiles, unit, NUM_N: gl.constexpr, CACHE: gl.constexpr):
    """Unit -> (expert, tile of columns, first row, row past the expert's last)."""
    info = tiles + unit // NUM_N * 4
    expert = gl.load(info, cache_modifier=CACHE)
    first = gl.load(info + 1, cache_modifier=CACHE)
    begin = gl.load(info + 2, cache_modifier=CACHE)
    end = gl.load(info + 3, cache_modifier=CACHE)
    num = (end - begin + 127) // 128
    at = unit - first * NUM_N
    return expert, at // num, begin + at % num * 128, end


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    stage += 1
    wrap = stage == STAGES
    return gl.where(wrap, 0, stage), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def _before(stage, STAGES: gl.constexpr):
    return gl.where(stage == 0, STAGES, stage) - 1


@gluon.jit
def _size(rows):
    """0 ... 3: a tile of so many rows loads 16, 64, 80 or 128."""
    return (rows > 16).to(gl.int32) + (rows > 64).to(gl.int32) + (rows > 80).to(gl.int32)


@gluon.jit
def _request_weights(w_desc, w_buf, bar, row, k, size, stage, FULL: gl.constexpr, HALF: gl.constexpr):
    """Both halves of a stage's weights; the barrier learns of all bytes of the stage. FULL: size is 3."""
    tma.async_copy_global_to_shared(w_desc, [row, k * 128], bar, w_buf.index(stage * 2))
    tma.async_copy_global_to_shared(w_desc, [row + HALF, k * 128], bar, w_buf.index(stage * 2 + 1))
    if FULL:
        mbarrier.expect(bar, (256 + 128) * 128 + 512)
    else:
        mbarrier.expect(bar, (256 + 16) * 128 + 512, pred=size == 0)
        mbarrier.expect(bar, (256 + 64) * 128 + 512, pred=size == 1)
        mbarrier.expect(bar, (256 + 80) * 128 + 512, pred=size == 2)
        mbarrier.expect(bar, (256 + 128) * 128 + 512, pred=size == 3)


@gluon.jit
def _request_rows(x_descs, s_desc, x_buf, s_buf, bar, row, k, size, stage, scale_stride,
                  FULL: gl.constexpr, STAGES: gl.constexpr):
    x16_desc, x64_desc, x128_desc = x_descs
    if FULL:
        x128_buf = x_buf._reinterpret(gl.float8e4nv, [STAGES, 128, 128], x128_desc.layout)
        tma.async_copy_global_to_shared(x128_desc, [row, k * 128], bar, x128_buf.index(stage))
    else:
        x16_buf = x_buf._reinterpret(gl.float8e4nv, [STAGES * 8, 16, 128], x16_desc.layout)
        x80_buf, upper_buf = x16_buf.index(stage * 8 + 4), x_buf.index(stage * 2 + 1)
        tma.async_copy_global_to_shared(x16_desc, [row, k * 128], bar, x16_buf.index(stage * 8), pred=size == 0)
        tma.async_copy_global_to_shared(x64_desc, [row, k * 128], bar, x_buf.index(stage * 2), pred=size > 0)
        tma.async_copy_global_to_shared(x16_desc, [row + 64, k * 128], bar, x80_buf, pred=size == 2)
        tma.async_copy_global_to_shared(x64_desc, [row + 64, k * 128], bar, upper_buf, pred=size == 3)
    tma.async_copy_global_to_shared(s_desc, [k * scale_stride + row], bar, s_buf.index(stage))


@gluon.jit
def _load_tile(x_descs, s_desc, w_desc, x_buf, s_buf, w_buf, full, empty, row, w_row, size, begun, stage, phase,
               scale_stride, FULL: gl.constexpr, NUM_K: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr):
    """The stages of a tile from k = begun on."""
    for k in range(begun, NUM_K):
        mbarrier.wait(empty.index(stage), phase)
        bar = full.index(stage)
        _request_weights(w_desc, w_buf, bar, w_row, k, size, stage, FULL, HALF)
        _request_rows(x_descs, s_desc, x_buf, s_buf, bar, row, k, size, stage, scale_stride, FULL, STAGES)
        stage, phase = _next(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def _load(x_descs, s_desc, w_desc, tiles, num_tiles, x_buf, s_buf, w_buf, full, empty, scale_stride,
          NUM_N: gl.constexpr, NUM_K: gl.constexpr, EXPERT_ROWS: gl.constexpr, STEP: gl.constexpr, HALF: gl.constexpr,
          STAGES: gl.constexpr):
    """A full tile has a loop of its own: a hundred instructions a stage, most of them predicates, would be the slowest
    part of the kernel."""
    stage = 0
    phase = 1
    # The weights of the first stages are on their way before the kernel ahead has ended. It lets others start only
    # after those before it have ended (gdc_launch_dependents behind gdc_wait), so that the tiles are in L2 by now.
    num_units = gl.load(num_tiles, cache_modifier=".cg") * NUM_N
    ahead = 0
    if gl.program_id(0) < num_units:
        expert, n, row, end = _tile(tiles, gl.program_id(0), NUM_N, ".cg")
        ahead += gl.minimum(NUM_K, STAGES)
        w_row = expert * EXPERT_ROWS + n * STEP
        for s in range(ahead):
            _request_weights(w_desc, w_buf, full.index(s), w_row, s, _size(end - row), s, False, HALF)
    gdc_wait()
    for unit in range(gl.program_id(0), num_units, gl.num_programs(0)):
        expert, n, row, end = _tile(tiles, unit, NUM_N, "")
        w_row = expert * EXPERT_ROWS + n * STEP
        size = _size(end - row)
        begun = gl.where(unit == gl.program_id(0), ahead, 0)
        for k in range(begun):
            _request_rows(x_descs, s_desc, x_buf, s_buf, full.index(k), row, k, size, k, scale_stride, False, STAGES)
            stage, phase = _next(stage, phase, STAGES)
        if size == 3:
            stage, phase = _load_tile(x_descs, s_desc, w_desc, x_buf, s_buf, w_buf, full, empty, row, w_row, size,
                                      begun, stage, phase, scale_stride, True, NUM_K, HALF, STAGES)
        else:
            stage, phase = _load_tile(x_descs, s_desc, w_desc, x_buf, s_buf, w_buf, full, empty, row, w_row, size,
                                      begun, stage, phase, scale_stride, False, NUM_K, HALF, STAGES)


@gluon.jit
def _store_rows(out, value, row, end, column, width, layout: gl.constexpr):
    value = gl.convert_layout(value, layout)
    r = row + gl.arange(0, 64, gl.SliceLayout(1, layout))
    c = column + gl.arange(0, 128, gl.SliceLayout(0, layout))
    gl.store(out + r.to(gl.int64)[:, None] * width + c[None, :], value, mask=(r < end)[:, None])


@gluon.jit
def _store_tile(acc0, acc1, out, out_scales, row, end, n, out_stride, SWIGLU: gl.constexpr, WIDTH: gl.constexpr,
                mma: gl.constexpr):
    """SwiGLU and quantisation of 64 rows x (128 + 128) sums, or both halves as bf16."""
    fp8_rows: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    bf16_rows: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    if SWIGLU:
        h = acc0 / (1.0 + gl.exp(-acc0)) * acc1
        s = gl.maximum(gl.max(gl.abs(h), axis=1), 1e-4) * (1.0 / 448.0)
        r = row + gl.arange(0, 64, gl.SliceLayout(1, mma))
        gl.store(out_scales + n.to(gl.int64) * out_stride + r, s, mask=r < end)
        h = (h * (1.0 / s)[:, None]).to(gl.float8e4nv)
        _store_rows(out, h, row, end, n * 128, WIDTH, fp8_rows)
    else:
        _store_rows(out, acc0.to(gl.bfloat16), row, end, n * 256, WIDTH, bf16_rows)
        _store_rows(out, acc1.to(gl.bfloat16), row, end, n * 256 + 128, WIDTH, bf16_rows)


@gluon.jit
def _consume(out, out_scales, ws, tiles, num_tiles, x_buf, s_buf, w_buf, full, empty, out_stride,
             ME: gl.constexpr, SWIGLU: gl.constexpr, NUM_N: gl.constexpr, NUM_K: gl.constexpr,
             EXPERT_ROWS: gl.constexpr, STEP: gl.constexpr, HALF: gl.constexpr, WIDTH: gl.constexpr,
             STAGES: gl.constexpr):
    """Warpgroup ME: rows [64 ME, 64 ME + 64) of each tile, both halves of its columns, one product at a time.

    All that is not a product or a sum is done under a product in flight: under the second of stage k, stage k - 1 is
    given back, k + 1 awaited and its scales read; those of weights are loaded one stage ahead.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    row_layout: gl.constexpr = gl.SliceLayout(1, mma)
    stage = 0
    phase = 0
    zero = gl.zeros([64, 128], gl.float32, mma)
    gdc_wait()
    if SWIGLU:
        gdc_launch_dependents()
    num_units = gl.load(num_tiles) * NUM_N
    for unit in range(gl.program_id(0), num_units, gl.num_programs(0)):
        expert, n, row, end = _tile(tiles, unit, NUM_N, "")
        row += ME * 64
        ws_row = ws + (expert * EXPERT_ROWS + n * STEP) // 128 * NUM_K
        if row < end:
            acc0 = gl.zeros([64, 128], gl.float32, mma)
            acc1 = gl.zeros([64, 128], gl.float32, mma)
            s0 = gl.zeros([64], gl.float32, row_layout)
            s1 = gl.zeros([64], gl.float32, row_layout)
            next0 = gl.load(ws_row)
            next1 = gl.load(ws_row + HALF // 128 * NUM_K)
            mbarrier.wait(full.index(stage), phase)
            scale = s_buf.index(stage).slice(ME * 64, 64).load(row_layout)
            for k in range(NUM_K):
                w0 = next0
                w1 = next1
                ahead = gl.minimum(k + 1, NUM_K - 1)
                next0 = gl.load(ws_row + ahead)
                next1 = gl.load(ws_row + HALF // 128 * NUM_K + ahead)
                after, after_phase = _next(stage, phase, STAGES)
                for half in range(2):
                    part = warpgroup_mma(x_buf.index(stage * 2 + ME), w_buf.index(stage * 2 + half).permute((1, 0)),
                                         zero, use_acc=False, is_async=True)
                    if half == 0:
                        s0 = scale * w0
                        s1 = scale * w1
                    else:
                        mbarrier.arrive(empty.index(_before(stage, STAGES)), pred=k > 0)
                        mbarrier.wait(full.index(after), after_phase, pred=k < NUM_K - 1)
                        scale = s_buf.index(after).slice(ME * 64, 64).load(row_layout)
                    part = warpgroup_mma_wait(0, deps=[part])
                    if half == 0:
                        acc0 = gl.fma(part, s0[:, None], acc0)
                    else:
                        acc1 = gl.fma(part, s1[:, None], acc1)
                stage = after
                phase = after_phase
            mbarrier.arrive(empty.index(_before(stage, STAGES)))
            _store_tile(acc0, acc1, out, out_scales, row, end, n, out_stride, SWIGLU, WIDTH, mma)
        else:
            for _k in range(NUM_K):
                mbarrier.wait(full.index(stage), phase)
                mbarrier.arrive(empty.index(stage))
                stage, phase = _next(stage, phase, STAGES)


@gluon.jit(do_not_specialize=["scale_stride", "out_stride"])
def _expert_kernel(x16_desc, x64_desc, x128_desc, s_desc, w_desc, ws, out, out_scales, tiles, num_tiles, scale_stride,
                   out_stride, SWIGLU: gl.constexpr, NUM_N: gl.constexpr, NUM_K: gl.constexpr,
                   EXPERT_ROWS: gl.constexpr, STEP: gl.constexpr, HALF: gl.constexpr, WIDTH: gl.constexpr,
                   STAGES: gl.constexpr):
    x_buf = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * 2, 64, 128], x64_desc.layout)
    w_buf = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * 2, 128, 128], w_desc.layout)
    s_buf = gl.allocate_shared_memory(gl.float32, [STAGES, 128], s_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    # Rows that no tile of this program has loaded are multiplied all the same.
    zeros_layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    for s in gl.static_range(STAGES * 2):
        x_buf.index(s).store(gl.zeros([64, 128], gl.float32, zeros_layout).to(gl.float8e4nv))
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (out, out_scales, ws, tiles, num_tiles, x_buf, s_buf, w_buf, full, empty, out_stride, 0, SWIGLU,
                        NUM_N, NUM_K, EXPERT_ROWS, STEP, HALF, WIDTH, STAGES)),
            (_consume, (out, out_scales, ws, tiles, num_tiles, x_buf, s_buf, w_buf, full, empty, out_stride, 1, SWIGLU,
                        NUM_N, NUM_K, EXPERT_ROWS, STEP, HALF, WIDTH, STAGES)),
            (_load, ((x16_desc, x64_desc, x128_desc), s_desc, w_desc, tiles, num_tiles, x_buf, s_buf, w_buf, full,
                     empty, scale_stride, NUM_N, NUM_K, EXPERT_ROWS, STEP, HALF, STAGES)),
        ], [4, 1], [232, 40])
# fmt: on


def expert_up(
    x: Tensor, x_scales: Tensor, w13: Tensor, w13_scales: Tensor, tiles: Tensor, num_tiles: Tensor, h: Tensor,
    h_scales: Tensor, num_sms: int,
) -> None:  # fmt: skip
    """x [R, D], x_scales [D / 128, >= R], w13 [E, 2, I, D] -> h [R, I] e4m3, h_scales [I / 128, >= R]; one window's
    tiles [tiles, 4] and num_tiles [1]."""
    num_experts, _, i, d = w13.shape
    blocks = (num_experts, 2, i // BLOCK, d // BLOCK)
    _check(x, x_scales, w13, w13_scales, blocks, h, torch.float8_e4m3fn)
    if h_scales.shape[0] != i // BLOCK or h_scales.shape[1] < h.shape[0] or h_scales.stride(1) != 1:
        raise ValueError(f"got h_scales {tuple(h_scales.shape)}; need contiguous rows [{i // BLOCK}, >= {h.shape[0]}].")
    if h.shape[1] != i or i % BLOCK or d % BLOCK:
        raise ValueError(f"got w13 {tuple(w13.shape)}, h {tuple(h.shape)}; need h [R, I], I and D multiples of 128.")
    _expert_kernel[(num_sms,)](
        *_descriptors(x, x_scales, w13), w13_scales, h, h_scales, tiles, num_tiles, x_scales.stride(0),
        h_scales.stride(0), SWIGLU=True, NUM_N=i // BLOCK, NUM_K=d // BLOCK, EXPERT_ROWS=2 * i, STEP=BLOCK, HALF=i,
        WIDTH=i, STAGES=_STAGES, num_warps=4, launch_pdl=True,
    )  # fmt: skip


def expert_down(
    h: Tensor, h_scales: Tensor, w2: Tensor, w2_scales: Tensor, tiles: Tensor, num_tiles: Tensor, y: Tensor,
    num_sms: int,
) -> None:  # fmt: skip
    """h [R, I], h_scales [I / 128, >= R], w2 [E, D, I] -> y [R, D] bf16; tiles as for expert_up."""
    num_experts, d, i = w2.shape
    _check(h, h_scales, w2, w2_scales, (num_experts, d // BLOCK, i // BLOCK), y, torch.bfloat16)
    if y.shape[1] != d or d % (2 * BLOCK) or i % BLOCK:
        raise ValueError(f"got w2 {tuple(w2.shape)}, y {tuple(y.shape)}; need y [R, D], D % 256 == 0, I % 128 == 0.")
    _expert_kernel[(num_sms,)](
        *_descriptors(h, h_scales, w2), w2_scales, y, y, tiles, num_tiles, h_scales.stride(0), 0, SWIGLU=False,
        NUM_N=d // (2 * BLOCK), NUM_K=i // BLOCK, EXPERT_ROWS=d, STEP=2 * BLOCK, HALF=BLOCK, WIDTH=d, STAGES=_STAGES,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip


def expert_up_reference(x: Tensor, x_scales: Tensor, w13: Tensor, w13_scales: Tensor) -> Tensor:
    """Rows of one expert in float64, not quantised: x [r, D], x_scales [D / 128, r], w13 [2, I, D] -> h [r, I]"""
    gate, up = _dequantised_rows(x, x_scales) @ _dequantised(w13, w13_scales).transpose(1, 2)
    return torch.nn.functional.silu(gate) * up


def expert_down_reference(h: Tensor, h_scales: Tensor, w2: Tensor, w2_scales: Tensor) -> Tensor:
    """Rows of one expert in float64: h [r, I], h_scales [I / 128, r], w2 [D, I] -> y [r, D]"""
    return _dequantised_rows(h, h_scales) @ _dequantised(w2, w2_scales).t()


def _dequantised_rows(x: Tensor, scales: Tensor) -> Tensor:
    return x.double() * scales.t().double().repeat_interleave(BLOCK, -1)


def _dequantised(w: Tensor, scales: Tensor) -> Tensor:
    return w.double() * scales.double().repeat_interleave(BLOCK, -1).repeat_interleave(BLOCK, -2)


def _descriptors(x: Tensor, x_scales: Tensor, w: Tensor) -> tuple[TensorDescriptor, ...]:
    w = w.view(-1, w.shape[-1])
    length = (x_scales.shape[0] - 1) * x_scales.stride(0) + x_scales.shape[1]
    return (
        *(TensorDescriptor(x, x.shape, x.stride(), [rows, BLOCK], _FP8) for rows in (16, 64, 128)),
        TensorDescriptor(x_scales, [length], [1], [128], _SCALES),
        TensorDescriptor(w, w.shape, w.stride(), [128, BLOCK], _FP8),
    )


def _check(
    x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor, blocks: tuple[int, ...], out: Tensor, dtype: torch.dtype
) -> None:
    k = w.shape[-1]
    if x.shape[1] != k or out.shape[0] != x.shape[0] or tuple(w_scales.shape) != blocks:
        raise ValueError(
            f"got x {tuple(x.shape)}, w {tuple(w.shape)}, w_scales {tuple(w_scales.shape)}, out {tuple(out.shape)}; "
            f"need x [R, {k}], w_scales {blocks}, R rows of out."
        )
    if x_scales.shape[0] != k // BLOCK or x_scales.shape[1] < x.shape[0] or x_scales.stride(1) != 1:
        raise ValueError(
            f"got x_scales {tuple(x_scales.shape)}, strides {x_scales.stride()}; need [{k // BLOCK}, >= {x.shape[0]}] "
            "with contiguous rows: one block of columns a row."
        )
    fp8 = torch.float8_e4m3fn
    if (x.dtype, w.dtype, out.dtype) != (fp8, fp8, dtype) or not (w.is_contiguous() and w_scales.is_contiguous()):
        raise ValueError(f"got {x.dtype}, {w.dtype} -> {out.dtype}; need contiguous e4m3, e4m3 -> {dtype}.")
