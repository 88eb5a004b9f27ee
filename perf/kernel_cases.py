"""Our kernels at DeepSeek-V3's shapes, ready to be called: what bench_kernels.py times, beside the peers' for the same.

A Case is made on the GPU when it is its turn and dropped after it; its inputs are random, its routing group-limited
(4 of 8 groups a token). Calls allocate nothing that the production step would not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nmoe_backend.kernels.block_fp8_gemm_sm90 import block_fp8_gemm
from nmoe_backend.kernels.expert_gemm_sm90 import expert_down, expert_up
from nmoe_backend.kernels.expert_rows_gpu import expert_row_index, expert_rows, gather_expert_rows, num_expert_rows
from nmoe_backend.kernels.mla_absorb_sm90 import absorb_queries, expand_values
from nmoe_backend.kernels.mla_sm90.decode import mla_decode
from nmoe_backend.kernels.mla_sm90.decode_plan import make_mla_decode_plan, plan_mla_decode
from nmoe_backend.kernels.mla_sm90.prefill import attend, mla_prefill
from nmoe_backend.kernels.mla_sm90.prefill_plan import make_mla_prefill_plan, plan_mla_prefill
from nmoe_backend.kernels.rdep import rdep_local_ids_reference
from nmoe_backend.kernels.rms_norm_gpu import rms_norm
from nmoe_backend.kernels.rope_cache_gpu import Rotation, rope_cache
from nmoe_backend.kernels.router import router_reference
from nmoe_backend.kernels.router_gpu import router, router_logits, split_weight
from nmoe_backend.kernels.swiglu_rows_gpu import swiglu_rows
from nmoe_backend.parallel.ranks import RankGroup
from nmoe_backend.runtime.sampler_kernels import KernelSampler
from nmoe_backend.types import EngineLimits, SamplingParams, SlotInit
from perf.kernel_peers import PAGE, Peers

FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16
HEADS, LATENT, ROPE, NOPE, VALUE = 128, 512, 64, 128, 128
HIDDEN, INTERMEDIATE, EXPERTS, LOCAL, TOP_K, WORLD = 7168, 2048, 256, 32, 8, 8
VOCAB = 129280
SCALE = (NOPE + ROPE) ** -0.5
DECODE_SHAPES = ((32, 2000), (128, 2000), (256, 2000), (32, 8192), (4, 131072))
PREFILL_SHAPES = ((4, 2000), (1, 8192), (1, 2000), (32, 256))
GEMM_SHAPES = ((2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168), (7168, 2048), (36864, 7168))
GEMM_TOKENS = (32, 128, 256, 4096)
EXPERT_TOKENS = (32, 256, 512, 4096)  # of a rank: 8, 64, 128 and 1,024 rows an expert
SMALL_TOKENS = (32, 256, 4096)
DEVICE = "cuda:0"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation at one shape."""

    operation: str
    shape: str
    ours: Callable[[], Tensor | None]
    peers: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    flops: float = 0.0
    num_bytes: float = 0.0
    compare: bool = False  # ours and the peers give the same numbers


Maker = Callable[[Peers], Case]


def makers() -> Iterator[tuple[str, Maker]]:
    """(operation, what makes the case), in the table's order."""
    for rows, context in DECODE_SHAPES:
        yield "mla_decode", lambda peers, s=(rows, context): _decode(peers, *s)
    for rows, length in PREFILL_SHAPES:
        yield "mla_prefill", lambda peers, s=(rows, length): _prefill(peers, *s)
    for n, k in GEMM_SHAPES:
        for tokens in GEMM_TOKENS:
            yield "fp8_gemm", lambda peers, s=(tokens, n, k): _gemm(peers, *s)
    for tokens in EXPERT_TOKENS:
        yield "expert_up", lambda peers, t=tokens: _experts(peers, t, "expert_up")
        yield "expert_down", lambda peers, t=tokens: _experts(peers, t, "expert_down")
    for tokens in SMALL_TOKENS:
        for operation in ("expert_index", "expert_gather"):
            yield operation, lambda peers, t=tokens, o=operation: _experts(peers, t, o)
        for operation in SMALL:
            yield operation, lambda _, t=tokens, o=operation: SMALL[o](t)
    for operation in SAMPLING:
        for rows in (1, 32, 64, 256):
            yield operation, lambda _, o=operation, r=rows: _sample(o, r)


def _randn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.float32 if dtype is torch.float32 else BF16).to(dtype)


def _num_sms() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count


def _tables(rows: int, length: int) -> Tensor:
    """[S, n] int32: pages of PAGE tokens in random order."""
    pages = -(-length // PAGE)
    return torch.randperm(rows * pages, device=DEVICE).to(torch.int32).view(rows, pages)


def _decode(peers: Peers, rows: int, context: int) -> Case:
    tables = _tables(rows, context)
    q, cache = _randn(rows, HEADS, LATENT + ROPE), _randn(tables.numel(), PAGE, LATENT + ROPE)
    lens = torch.full((rows,), context, dtype=torch.int32, device=DEVICE)
    split = None if rows <= 64 else 4096  # as layers/hopper_ops.py where it is not deterministic
    plan = make_mla_decode_plan(rows, context, rows * context, HEADS, q.device, split)
    plan_mla_decode(plan, lens)
    out = torch.empty(rows, HEADS, LATENT, dtype=BF16, device=DEVICE)

    def ours() -> Tensor:
        mla_decode(q, cache, tables, plan, out, SCALE)
        return out

    return Case(
        operation="mla_decode",
        shape=f"{rows} x {context}",
        ours=ours,
        peers=peers.mla_decode(q, cache, tables, lens, SCALE),
        flops=2 * rows * HEADS * context * (2 * LATENT + ROPE),
        num_bytes=rows * context * 2 * (LATENT + ROPE),
        compare=True,
    )


def _prefill(peers: Peers, rows: int, length: int) -> Case:
    """Attention alone, on keys that are expanded already, as the peers take them."""
    tokens, tables = rows * length, _tables(rows, length)
    q, cache = _randn(tokens, HEADS, NOPE + ROPE), _randn(tables.numel(), PAGE, LATENT + ROPE)
    w_kv_b = _randn(HEADS, NOPE + VALUE, LATENT) * LATENT**-0.5
    keys = rows * -(-length // 128) * 128
    plan = make_mla_prefill_plan(rows, tokens, 1, HEADS, q.device, keys)
    bounds = torch.arange(rows + 1, dtype=torch.int32, device=DEVICE) * length
    num_rows = torch.tensor([rows], dtype=torch.int32, device=DEVICE)
    plan_mla_prefill(plan, bounds, torch.zeros(rows, dtype=torch.int32, device=DEVICE), num_rows)
    out = torch.empty(tokens, HEADS, VALUE, dtype=BF16, device=DEVICE)
    mla_prefill(q, cache, tables, w_kv_b, plan, out, SCALE)  # leaves the expanded keys in the plan

    def ours() -> Tensor:
        plan.counters.zero_()
        attend(q, plan, 0, out, SCALE)
        return out

    padded = plan.keys.view(rows, -1, LATENT + ROPE)[:, :length, LATENT:]
    expanded = plan.expanded.view(rows, -1, HEADS, NOPE + VALUE)[:, :length]
    rope = padded.unsqueeze(2).expand(-1, -1, HEADS, -1)
    k = torch.cat([expanded[..., :NOPE], rope], -1).flatten(0, 1).contiguous()
    v = expanded[..., NOPE:].flatten(0, 1).contiguous()
    return Case(
        operation="mla_prefill",
        shape=f"{rows} x {length}",
        ours=ours,
        peers=peers.mla_prefill(q, k, v, length, SCALE),
        flops=rows * length * (length + 1) * HEADS * (NOPE + ROPE + VALUE),
        compare=True,
    )


def _gemm(peers: Peers, tokens: int, n: int, k: int) -> Case:
    num_sms = _num_sms()
    x, w = _randn(tokens, k, dtype=FP8), _randn(n, k, dtype=FP8)
    w_scales = torch.rand(-(-n // 128), k // 128, device=DEVICE)
    wide = torch.rand(k // 128, -(-tokens // 16) * 16, device=DEVICE)
    x_scales = wide[:, :tokens]
    out = torch.empty(tokens, n, dtype=BF16, device=DEVICE)

    def ours() -> Tensor:
        block_fp8_gemm(x, x_scales, w, w_scales, out, num_sms)
        return out

    return Case(
        operation="fp8_gemm",
        shape=f"{tokens} x {n} x {k}",
        ours=ours,
        peers=peers.gemm(x, x_scales.t().contiguous(), w, w_scales),
        flops=2 * tokens * n * k,
        num_bytes=n * k + tokens * (k + 2 * n),
        compare=True,
    )


def routed(tokens: int) -> tuple[Tensor, Tensor]:
    """What a balanced rank of eight receives of `tokens` a rank: local ids [W, T, K] int32; and rows [E] of each of
    its experts."""
    logits = torch.randn(tokens, EXPERTS, device=DEVICE)
    ids, _ = router_reference(logits, torch.zeros(EXPERTS, device=DEVICE), TOP_K, 8, 4, True, 2.5)
    local = rdep_local_ids_reference(ids, WORLD, LOCAL).contiguous()
    return local, local[local >= 0].bincount(minlength=LOCAL)


def _experts(peers: Peers, tokens: int, operation: str) -> Case:
    """A rank's share of a layer: index, gather, gate and up with SwiGLU and quantisation, down."""
    ids, counts = routed(tokens)
    num_sms, choices = _num_sms(), tokens * TOP_K
    rows = expert_rows(ids, LOCAL, min(ids.numel(), max(16384, 2 * choices)))
    size = num_expert_rows(rows.window_rows, LOCAL)
    payload, scales = _randn(WORLD, tokens, HIDDEN, dtype=FP8), torch.rand(WORLD, tokens, HIDDEN // 128, device=DEVICE)
    x, x_scales = _randn(size, HIDDEN, dtype=FP8), torch.rand(HIDDEN // 128, size, device=DEVICE)
    tiles, num_tiles = rows.tiles[0], rows.num_tiles[:1]
    expert_row_index(rows, ids, LOCAL, tokens)
    shape = f"{tokens} tokens, {choices // LOCAL} rows an expert"

    def index() -> None:
        expert_row_index(rows, ids, LOCAL, tokens)

    def gather() -> None:
        gather_expert_rows(rows, 0, payload, scales, x, x_scales, tokens)

    if operation == "expert_index":
        return Case(operation=operation, shape=shape, ours=index)
    if operation == "expert_gather":
        return Case(operation=operation, shape=shape, ours=gather, num_bytes=2 * choices * HIDDEN)
    gather()
    is_up = operation == "expert_up"
    n, k = (2 * INTERMEDIATE, HIDDEN) if is_up else (HIDDEN, INTERMEDIATE)
    w = torch.empty(LOCAL, n, k, dtype=FP8, device=DEVICE)
    for one in w:
        one.copy_(torch.randn(n, k, device=DEVICE))
    w_scales = torch.rand(LOCAL, n // 128, k // 128, device=DEVICE)
    h, h_scales = _randn(size, INTERMEDIATE, dtype=FP8), torch.rand(INTERMEDIATE // 128, size, device=DEVICE)
    y = torch.empty(size, HIDDEN, dtype=BF16, device=DEVICE)
    w13, w13_scales = w.view(LOCAL, 2, n // 2, k), w_scales.view(LOCAL, 2, n // 256, k // 128)

    def up() -> None:
        expert_up(x, x_scales, w13, w13_scales, tiles, num_tiles, h, h_scales, num_sms)

    def down() -> None:
        expert_down(h, h_scales, w, w_scales, tiles, num_tiles, y, num_sms)

    return Case(
        operation=operation,
        shape=shape,
        ours=up if is_up else down,
        peers=peers.grouped(counts, w, w_scales, max(1, choices // LOCAL)),
        flops=2 * choices * n * k,
        num_bytes=LOCAL * n * k,
    )


def _router(tokens: int) -> Case:
    parts = split_weight(_randn(EXPERTS, HIDDEN).float() * HIDDEN**-0.5)
    x, bias = _randn(tokens, HIDDEN), torch.zeros(EXPERTS, device=DEVICE)
    return Case(
        operation="router",
        shape=f"{tokens}",
        ours=lambda: router(router_logits(x, parts), bias, TOP_K, 8, 4, True, 2.5)[1],
        num_bytes=2 * HIDDEN * (tokens + EXPERTS),
    )


def _rows_of(tokens: int, size: int) -> tuple[Tensor, Tensor]:
    """Room for fp8 rows and their scales, as layers/hopper_ops.py lays them out."""
    scales = torch.empty(size // 128, -(-tokens // 16) * 16, device=DEVICE)
    return torch.empty(tokens, size, dtype=FP8, device=DEVICE), scales[:, :tokens]


def _norm(tokens: int) -> Case:
    """residual += x; norm; both as bf16 and as fp8 with scales."""
    x, residual, weight = _randn(tokens, HIDDEN), _randn(tokens, HIDDEN), torch.ones(HIDDEN, dtype=BF16, device=DEVICE)
    out = torch.empty_like(x)
    values, scales = _rows_of(tokens, HIDDEN)
    return Case(
        operation="add_norm_quantize",
        shape=f"{tokens} x {HIDDEN}",
        ours=lambda: rms_norm(x, weight, 1e-6, residual=residual, out=out, values=values, scales=scales.t()),
        num_bytes=tokens * HIDDEN * (2 + 2 + 2 + 2 + 1),
    )


def _rope(tokens: int) -> Case:
    q, q_out = _randn(tokens, HEADS, NOPE + ROPE), _randn(tokens, HEADS, LATENT + ROPE)
    kv, weight = _randn(tokens, LATENT + ROPE), torch.ones(LATENT, dtype=BF16, device=DEVICE)
    cache = _randn(-(-tokens // PAGE) + 1, PAGE, LATENT + ROPE)
    places = torch.randperm(tokens, device=DEVICE)
    turns = torch.polar(torch.ones(4096, ROPE // 2, device=DEVICE), torch.rand(4096, ROPE // 2, device=DEVICE))
    rotation = Rotation(turns=turns, positions=places % 4096, interleaved=True)
    return Case(
        operation="rope_cache",
        shape=f"{tokens} x {HEADS} heads",
        ours=lambda: rope_cache(
            q[..., NOPE:], q_out[..., LATENT:], kv, (weight, 1e-6), rotation, cache, places
        ),
        num_bytes=tokens * 2 * (2 * HEADS * ROPE + 2 * (LATENT + ROPE)),
    )  # fmt: skip


def _swiglu(tokens: int) -> Case:
    x = _randn(tokens, 2 * INTERMEDIATE)
    values, scales = _rows_of(tokens, INTERMEDIATE)
    return Case(
        operation="swiglu_quantize",
        shape=f"{tokens} x {INTERMEDIATE}",
        ours=lambda: swiglu_rows(x, values, scales),
        num_bytes=tokens * INTERMEDIATE * 5,
    )


def _absorb(tokens: int) -> Case:
    """The query into the latent space. Against torch.bmm over heads, which leaves the rope part alone too."""
    q, w_kv_b = _randn(tokens, HEADS, NOPE + ROPE), _randn(HEADS, NOPE + VALUE, LATENT) * LATENT**-0.5
    latent = torch.zeros(tokens, HEADS, LATENT + ROPE, dtype=BF16, device=DEVICE)
    theirs, w_uk = torch.zeros_like(latent), w_kv_b[:, :NOPE]

    def ours() -> Tensor:
        absorb_queries(q, w_kv_b, latent)
        return latent

    def by_bmm() -> Tensor:
        torch.bmm(q[..., :NOPE].transpose(0, 1), w_uk, out=theirs[..., :LATENT].transpose(0, 1))
        return theirs

    return Case(
        operation="absorb_queries",
        shape=f"{tokens} x {HEADS} heads",
        ours=ours,
        peers={"torch.bmm": by_bmm},
        flops=2 * HEADS * tokens * NOPE * LATENT,
        num_bytes=2 * HEADS * (tokens * (NOPE + LATENT) + NOPE * LATENT),
        compare=True,
    )


def _expand(tokens: int) -> Case:
    """Attended latents into values, as fp8 with scales; torch.bmm gives them as bf16."""
    attended, w_kv_b = _randn(tokens, HEADS, LATENT), _randn(HEADS, NOPE + VALUE, LATENT) * LATENT**-0.5
    values, scales = _rows_of(tokens, HEADS * VALUE)
    theirs, w_uv = torch.empty(tokens, HEADS, VALUE, dtype=BF16, device=DEVICE), w_kv_b[:, NOPE:].transpose(1, 2)
    return Case(
        operation="expand_values",
        shape=f"{tokens} x {HEADS} heads",
        ours=lambda: expand_values(attended, w_kv_b, values, scales),
        peers={
            "torch.bmm, not quantised": lambda: torch.bmm(
                attended.transpose(0, 1), w_uv, out=theirs.transpose(0, 1)
            )
        },
        flops=2 * HEADS * tokens * VALUE * LATENT,
        num_bytes=HEADS * (tokens * (2 * LATENT + VALUE) + 2 * VALUE * LATENT),
    )  # fmt: skip


SMALL: dict[str, Callable[[int], Case]] = {
    "router": _router,
    "add_norm_quantize": _norm,
    "rope_cache": _rope,
    "swiglu_quantize": _swiglu,
    "absorb_queries": _absorb,
    "expand_values": _expand,
}


SAMPLING: dict[str, SamplingParams] = {
    "sample_greedy": SamplingParams(temperature=0.0),
    "sample_plain": SamplingParams(),
    "sample_top_p": SamplingParams(temperature=0.6, top_p=0.95),
    "sample_everything": SamplingParams(
        temperature=0.6, top_p=0.95, repetition_penalty=1.1, bad_words_ids=((5,), (6, 7)), num_logprobs=5
    ),
}


def _sample(operation: str, rows: int) -> Case:
    """All rows ask for the same; logits fall off as a language model's do."""
    limits = EngineLimits(
        num_ranks=1, num_pages=1, page_size=PAGE, max_batch_size=rows, max_prefill_tokens=1, max_seq_len=4096,
        max_queue_size=1, itl_target_ms=1.0, rank_timeout_s=1.0, eos_token_ids=(), vocab_size=VOCAB,
    )  # fmt: skip
    sampler = KernelSampler(limits, RankGroup.create(1, [DEVICE], 60.0)[0], captures=False)
    sampling = SAMPLING[operation]
    for slot in range(rows):
        sampler.admit(SlotInit(slot=slot, sampling=replace(sampling, seed=slot), prompt_ids=(1, 2, 3)))
    fall = 2.4 * torch.arange(1, VOCAB + 1, device=DEVICE).log()
    for row in sampler.logits:
        row.normal_().mul_(3).sub_(fall[torch.randperm(VOCAB, device=DEVICE)])
    sampler.sample(sampler.logits, range(rows), [2000] * rows)  # loads the columns and chooses what is launched
    variant = sampler.variant_of(range(rows))
    return Case(
        operation=operation,
        shape=f"{rows} x {VOCAB}",
        ours=lambda: sampler.launch(rows, variant),
        num_bytes=4 * rows * VOCAB,
    )
