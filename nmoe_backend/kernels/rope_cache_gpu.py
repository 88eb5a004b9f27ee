"""Between the projections and attention in one kernel: turn the queries, norm and turn the keys, write the cache.

    q_out[t, h] = turned(q[t, h])                                      R dims of each of H heads
    cache[cache_idx[t]] = [rms_norm(kv[t, :C]), turned(kv[t, C:])]     one latent and one key for all heads

Rotation and norm are those of rope.py and rms_norm.py, fp32 inside, rounded to the compute dtype where those round.
Tokens with cache_idx < 0 (padding of a bucket) write no cache; what their queries become is not looked at.

Layouts: q and q_out [T, H, R] with contiguous R and any other strides (a slice of [T, H, N + R], and the end of the
decode query [T, H, C + R]; q_out may be q); kv [T, C + R] with contiguous rows (a slice of the fused projection);
turns [num_positions, R / 2] complex64; cache [P, B, C + R] contiguous, so that a token is one row, found by an int64.
C and R are powers of two. Grid: (T, 1 + H / 32): program 0 of a token does its keys, the others 32 heads each.
"""

# A jit function has no types that mypy knows; launchers are typed.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_HEADS = 32  # of one program


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotation:
    turns: Tensor  # [num_positions, R / 2] complex64
    positions: Tensor  # [T] int64
    interleaved: bool


@triton.jit
def _turned(rows, turns_ptr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The R values at each of the pointers `rows` [n, 1], turned: the two halves [n, R / 2] of each pair."""
    pair = tl.arange(0, ROPE // 2)[None, :]
    cos, sin = tl.load(turns_ptr + 2 * pair), tl.load(turns_ptr + 2 * pair + 1)
    if INTERLEAVED:
        x = tl.load(rows + tl.arange(0, ROPE)[None, :])
        a, b = tl.split(tl.reshape(x, (x.shape[0], ROPE // 2, 2)))
    else:
        a, b = tl.load(rows + pair), tl.load(rows + ROPE // 2 + pair)
    a, b = a.to(tl.float32), b.to(tl.float32)
    return a * cos - b * sin, a * sin + b * cos


@triton.jit
def _store_pairs(rows, a, b, mask, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr):
    dtype = rows.dtype.element_ty
    if INTERLEAVED:
        x = tl.reshape(tl.join(a.to(dtype), b.to(dtype)), (a.shape[0], ROPE))
        tl.store(rows + tl.arange(0, ROPE)[None, :], x, mask=mask)
    else:
        pair = tl.arange(0, ROPE // 2)[None, :]
        tl.store(rows + pair, a.to(dtype), mask=mask)
        tl.store(rows + ROPE // 2 + pair, b.to(dtype), mask=mask)


@triton.jit
def _rope_cache_kernel(  # noqa: PLR0913
    q_ptr,
    q_out_ptr,
    kv_ptr,
    weight_ptr,
    turns_ptr,
    positions_ptr,
    cache_ptr,
    cache_idx_ptr,
    q_stride,
    q_head_stride,
    q_out_stride,
    q_out_head_stride,
    kv_stride,
    num_heads,
    eps,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
):
    gdc_wait()
    gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    turns = turns_ptr + tl.load(positions_ptr + token) * ROPE
    if tl.program_id(1) == 0:
        row = tl.load(cache_idx_ptr + token)
        if row >= 0:
            target = cache_ptr + row * (LATENT + ROPE)
            column = tl.arange(0, LATENT)
            latent = tl.load(kv_ptr + token * kv_stride + column)
            dtype = latent.dtype
            wide = latent.to(tl.float32)
            mean = tl.sum(wide * wide, axis=0) / LATENT
            normed = (wide * tl.rsqrt(mean + eps)).to(dtype).to(tl.float32)
            tl.store(target + column, (normed * tl.load(weight_ptr + column).to(tl.float32)).to(dtype))
            first = tl.zeros((1, 1), dtype=tl.int64)
            a, b = _turned(kv_ptr + token * kv_stride + LATENT + first, turns, ROPE, INTERLEAVED)
            _store_pairs(target + LATENT + first, a, b, first == 0, ROPE, INTERLEAVED)
    else:
        head = ((tl.program_id(1) - 1) * HEADS + tl.arange(0, HEADS))[:, None]
        known = tl.minimum(head, num_heads - 1)  # heads beyond the last repeat it, and are not stored
        a, b = _turned(q_ptr + token * q_stride + known * q_head_stride, turns, ROPE, INTERLEAVED)
        out = q_out_ptr + token * q_out_stride + known * q_out_head_stride
        _store_pairs(out, a, b, head < num_heads, ROPE, INTERLEAVED)


def rope_cache(
    q: Tensor, q_out: Tensor, kv: Tensor, kv_norm: tuple[Tensor, float], rotation: Rotation, cache: Tensor, idx: Tensor
) -> None:
    """q [T, H, R] -> q_out [T, H, R]; kv [T, C + R] normed with (weight [C], eps) -> cache [P, B, C + R] at [T].

    No two tokens share a row of the cache. Positions are inside the table; nothing here checks them.
    """
    weight, eps = kv_norm
    num_tokens, num_heads, rope_dim = q.shape
    latent_dim = weight.shape[0]
    width = latent_dim + rope_dim
    if kv.shape != (num_tokens, width) or cache.shape[2] != width or rotation.turns.shape[1] * 2 != rope_dim:
        raise ValueError(
            f"got q {tuple(q.shape)}, kv {tuple(kv.shape)}, cache {tuple(cache.shape)}, turns "
            f"{tuple(rotation.turns.shape)}, norm [{latent_dim}]; need [T, H, R], [T, C + R], [P, B, C + R], "
            "[*, R / 2], [C]."
        )
    if any(size & (size - 1) for size in (latent_dim, rope_dim)) or q_out.shape != q.shape or not cache.is_contiguous():
        raise ValueError(f"got C={latent_dim}, R={rope_dim}; need powers of two, and a contiguous cache.")
    int64 = all(t.dtype == torch.int64 for t in (idx, rotation.positions))
    if any(t.stride(-1) != 1 for t in (q, q_out, kv)) or not int64:
        raise ValueError("need contiguous last dims of q, q_out and kv, and int64 positions and cache rows.")
    if num_tokens == 0:
        return
    _rope_cache_kernel[(num_tokens, 1 + triton.cdiv(num_heads, _HEADS))](
        q, q_out, kv, weight, torch.view_as_real(rotation.turns), rotation.positions, cache, idx, *q.stride()[:2],
        *q_out.stride()[:2], kv.stride(0), num_heads, eps, latent_dim, rope_dim, rotation.interleaved, _HEADS,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip
