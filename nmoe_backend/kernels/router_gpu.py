"""The router on a GPU: logits on tensor cores at fp32 accuracy, then the whole choice in one kernel.

Logits = x W^T with x [T, D] bf16 and W [E, D] fp32. W is kept as a sum of bf16 parts, `split_weight`: three parts hold
all 24 bits of any fp32 mantissa, and one part holds a weight that was trained in bf16, as DeepSeek's published ones
were. Products of two bf16 values are exact in fp32, so that the only error left is that of the fp32 sums: the same as
a plain fp32 product's, up to the order of additions. (tf32 would round W to 11 bits: errors of 1e-3 relative to a
logit, and another choice for some percent of the tokens.)

The K dimension is cut into SPLITS chunks of fixed size, each summed on its own, and the chunks are added in ascending
order. Few tokens: a program a chunk, so that 132 SMs have work; the choice kernel adds them up. Many tokens: one
program walks over all chunks with the same order of additions. A token's logits do not depend on its neighbours.

The choice (what it computes: router.py) takes a warp a token. Scores + bias become int32 of the same order, because a
warp reduces an int32 in one instruction; the best are taken one by one, of equals the lowest id. exp is the hardware's
(2 ulp), so scores differ from torch's by about 1e-7.

Layouts: x rows contiguous, any row stride that is a multiple of 8 values; parts [P, E, D]; partial logits [S, T, E].
"""

# A jit function has no types that mypy knows; launchers are typed.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

SPLITS = 16
_MANY_TOKENS = 4096  # from here on the partial logits cost more than idle SMs
_LOWEST = tl.constexpr(-(2**31))
_NO_EXPERT = tl.constexpr(2**31 - 1)


@triton.jit
def _logits_kernel(  # noqa: PLR0913
    x_ptr,
    parts_ptr,
    out_ptr,
    num_tokens,
    x_stride,
    E: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,  # of one program
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    split = tl.program_id(2)
    in_step, in_experts = token < num_tokens, expert < E
    x_row = x_ptr + token.to(tl.int64)[:, None] * x_stride
    weight_row = parts_ptr + expert.to(tl.int64)[None, :] * D
    total = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float32)
    gdc_wait()
    gdc_launch_dependents()
    for chunk in range(CHUNKS):
        begin = (split * CHUNKS + chunk) * CHUNK
        acc = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float32)
        for step in range(0, CHUNK, BLOCK_K):
            k = begin + step + tl.arange(0, BLOCK_K)
            x = tl.load(x_row + k[None, :], mask=in_step[:, None] & (k[None, :] < D), other=0.0)
            for part in tl.static_range(PARTS):
                weight = tl.load(
                    weight_row + part * E * D + k[:, None], mask=in_experts[None, :] & (k[:, None] < D), other=0.0
                )
                acc = tl.dot(x, weight, acc)
        total += acc
    out = out_ptr + (split.to(tl.int64) * num_tokens + token)[:, None] * E + expert[None, :]
    tl.store(out, total, mask=in_step[:, None] & in_experts[None, :])


@triton.jit
def _router_kernel(  # noqa: PLR0913
    logits_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    num_tokens,
    split_stride,
    scale,
    SPLITS: tl.constexpr,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,  # experts of a group
    TOP_K: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_step = token < num_tokens
    group, member = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_M)
    expert = group[:, None] * MEMBERS + member[None, :]
    exists = (group[:, None] < GROUPS) & (member[None, :] < MEMBERS)
    mask = in_step[:, None, None] & exists[None]
    logit_ptrs = logits_ptr + token.to(tl.int64)[:, None, None] * (GROUPS * MEMBERS) + expert[None]
    bias = tl.load(bias_ptr + expert, mask=exists, other=0.0)
    gdc_wait()
    gdc_launch_dependents()
    logits = tl.load(logit_ptrs, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        logits += tl.load(logit_ptrs + split * split_stride, mask=mask, other=0.0)
    scores = 1.0 / (1.0 + tl.exp(-logits))
    choice = scores + bias[None]
    bits = choice.to(tl.int32, bitcast=True)
    keys = tl.where(exists[None], bits ^ ((bits >> 31) & 0x7FFFFFFF), _LOWEST)
    if GROUPS > 1:
        first = tl.max(keys, axis=2)
        is_first = keys == first[:, :, None]
        second = tl.max(tl.where(is_first, _LOWEST, keys), axis=2)
        second = tl.where(tl.sum(is_first.to(tl.int32), axis=2) > 1, first, second)
        best_two = _choice_of(first) + _choice_of(second)  # [T, G]
        best_two = tl.where(group[None, :] < GROUPS, best_two, float("-inf"))
        mine, other = best_two[:, :, None], best_two[:, None, :]
        ahead = (other > mine) | ((other == mine) & (group[None, None, :] < group[None, :, None]))
        kept = tl.sum(ahead.to(tl.int32), axis=2) < TOPK_GROUPS
        keys = tl.where(kept[:, :, None] & exists[None], keys, _LOWEST)
    keys = tl.reshape(keys, (BLOCK_T, BLOCK_G * BLOCK_M))
    score_bits = tl.reshape(scores.to(tl.int32, bitcast=True), (BLOCK_T, BLOCK_G * BLOCK_M))
    expert = tl.reshape(tl.where(exists, expert, _NO_EXPERT), (BLOCK_G * BLOCK_M,))[None, :]
    rank = tl.arange(0, BLOCK_K)
    ids = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.int32)
    weights = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        best = tl.max(keys, axis=1)
        chosen = tl.min(tl.where(keys == best[:, None], expert, _NO_EXPERT), axis=1)
        is_chosen = expert == chosen[:, None]
        score = tl.max(tl.where(is_chosen, score_bits, 0), axis=1).to(tl.float32, bitcast=True)  # scores are positive
        ids = tl.where(rank[None, :] == k, chosen[:, None], ids)
        weights = tl.where(rank[None, :] == k, score[:, None], weights)
        keys = tl.where(is_chosen, _LOWEST, keys)
    if RENORMALIZE:
        weights = weights / (tl.sum(weights, axis=1)[:, None] + 1e-20)
    out = token.to(tl.int64)[:, None] * TOP_K + rank[None, :]
    out_mask = in_step[:, None] & (rank[None, :] < TOP_K)
    tl.store(ids_ptr + out, ids, mask=out_mask)
    tl.store(weights_ptr + out, weights * scale, mask=out_mask)


@triton.jit
def _choice_of(keys):
    """score + bias, from a key"""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


def split_weight(weight: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """weight [E, D] fp32 -> [P, E, D] in `dtype`, the fewest parts whose sum is the weight exactly. At load."""
    parts: list[Tensor] = []
    rest = weight
    while not parts or bool((rest != 0).any()):
        if len(parts) == 3:
            raise ValueError(
                f"a router weight of dtype {weight.dtype} is not the sum of 3 {dtype} parts (largest rest "
                f"{float(rest.abs().max()):g}). Needs finite fp32 values in bf16's range."
            )
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].to(rest.dtype)
    return torch.stack(parts)


def router_logits(x: Tensor, parts: Tensor) -> Tensor:
    """x [T, D] in the parts' dtype, parts [P, E, D] -> [S, T, E] fp32, to be added up over S (1 or SPLITS)."""
    num_tokens, dim = x.shape
    num_parts, num_experts, _ = parts.shape
    if x.dtype != parts.dtype or parts.shape[2] != dim or x.stride(1) != 1 or not parts.is_contiguous():
        raise ValueError(
            f"got x {tuple(x.shape)} {x.dtype} of strides {x.stride()} and parts {tuple(parts.shape)} {parts.dtype}; "
            "need [T, D] with contiguous rows and contiguous [P, E, D] of one dtype."
        )
    block_t, block_e, block_k = 64, 64 if num_tokens <= 256 else 128, 64
    chunk = triton.cdiv(dim, SPLITS * block_k) * block_k
    splits = 1 if num_tokens >= _MANY_TOKENS else SPLITS
    out = torch.empty(splits, num_tokens, num_experts, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(num_tokens, block_t), triton.cdiv(num_experts, block_e), splits)
    if num_tokens:
        _logits_kernel[grid](
            x, parts, out, num_tokens, x.stride(0), num_experts, dim, num_parts, chunk, SPLITS // splits,
            block_t, block_e, block_k, num_warps=4, num_stages=4, launch_pdl=True,
        )  # fmt: skip
    return out


def router(
    logits: Tensor, bias: Tensor, top_k: int, num_groups: int, topk_groups: int, renormalize: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """logits [T, E] or [S, T, E] (to be added up), bias [E] -> ids [T, K] int32, best first, weights [T, K]; fp32.

    As `router_reference`. NaN in a row changes what is chosen in that row, never beyond the range of ids.
    """
    logits = logits if logits.dim() == 3 else logits.unsqueeze(0)
    splits, num_tokens, num_experts = logits.shape
    members = num_experts // num_groups
    kept = topk_groups * members if num_groups > 1 else num_experts
    if num_experts % num_groups or not 0 < top_k <= kept or (num_groups > 1 and members < 2):
        raise ValueError(
            f"got top_k={top_k} of {num_experts} experts in {num_groups} groups, {topk_groups} kept; "
            "need equal groups of at least 2 and top_k experts in the kept ones."
        )
    if logits.dtype != torch.float32 or bias.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(f"got logits {logits.dtype} and bias {bias.dtype}; need contiguous fp32.")
    ids = torch.empty(num_tokens, top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits.device)
    if num_tokens:
        _router_kernel[(num_tokens,)](
            logits, bias, ids, weights, num_tokens, logits.stride(0), scale, splits, num_groups, members, top_k,
            topk_groups, renormalize, 1, triton.next_power_of_2(num_groups), triton.next_power_of_2(members),
            triton.next_power_of_2(top_k), num_warps=1, launch_pdl=True,
        )  # fmt: skip
    return ids, weights
