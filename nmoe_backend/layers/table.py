"""Which table of operations a rank runs: one choice, at load, from the explicit device and what the model is.

cpu                                      plain torch
cuda, dims and weights of `hopper_misfit` == ""   the kernels for sm_90a; another GPU than Hopper is an error
cuda, other dims, formats or dtypes      plain torch: right, slow, and never captured in a graph
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nmoe_backend.environ import DebugSwitches
from nmoe_backend.layers.debug import checked, with_checks
from nmoe_backend.layers.layer_ops import Exchange, LayerOps
from nmoe_backend.layers.ops import ops_for
from nmoe_backend.layers.plain_ops import PlainExchange, PlainOps
from nmoe_backend.models.spec import DenseSpec, MLASpec, ModelSpec, MoESpec
from nmoe_backend.parallel.ranks import RankContext
from nmoe_backend.parallel.rdep import Rdep, RdepShape
from nmoe_backend.types import ConfigError

PASS_ROWS = 512  # rows of an expert pass: 512 rows of DeepSeek-V3's widest intermediate are 16 MB in fp32
_MLA_DIMS = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRequest:
    """What the choice depends on beside the device, and the sizes of what the table allocates at once."""

    spec: ModelSpec
    max_tokens: int  # that a rank feeds in one step at most: max_batch_size + max_prefill_tokens
    dtype: torch.dtype  # of the computation
    keep_quantized: bool = False  # what `load_rank_weights` was told
    loopback_ranks: int = 0  # that this lone one stands for; 0: it is what it is
    deterministic: bool = True  # see HopperOps
    pass_rows: int = PASS_ROWS


def hopper_misfit(spec: ModelSpec, dtype: torch.dtype, keep_quantized: bool) -> str:
    """Why the kernels for sm_90a cannot run this model; "" where they can."""
    if dtype != torch.bfloat16 or not keep_quantized or spec.quant is None or spec.quant.block != (128, 128):
        return f"they compute in bfloat16 on fp8 weights in 128 x 128 blocks, not in {dtype} on {spec.quant}"
    if spec.hidden_size % 256 or spec.hidden_size > 16384:
        return f"hidden_size={spec.hidden_size} is not a multiple of 256 up to 16384"
    for layer in spec.layers:
        reason = _mla_misfit(layer.attn) or _ffn_misfit(layer.ffn)
        if reason:
            return reason
    moe_sizes = {layer.ffn.intermediate_size for layer in spec.layers if isinstance(layer.ffn, MoESpec)}
    return f"experts have intermediate sizes {sorted(moe_sizes)}, not one" if len(moe_sizes) > 1 else ""


def _mla_misfit(attn: MLASpec) -> str:
    for name, size in _MLA_DIMS.items():
        if getattr(attn, name) != size:
            return f"{name}={getattr(attn, name)} is not {size}"
    if attn.num_heads % 64 or attn.q_lora_rank % 128:
        return f"num_heads={attn.num_heads} is no multiple of 64, or q_lora_rank={attn.q_lora_rank} none of 128"
    return ""


def _ffn_misfit(ffn: DenseSpec | MoESpec) -> str:
    sizes = [ffn.intermediate_size]
    if isinstance(ffn, MoESpec):
        sizes.append(ffn.shared_intermediate_size)
        router = ffn.router
        if router.num_groups > 1 and router.num_experts // router.num_groups < 2:
            return f"{router.num_groups} groups of {router.num_experts} experts are smaller than 2"
    return f"intermediate sizes {sizes} are not multiples of 128" if any(size % 128 for size in sizes) else ""


def build_table(rank: RankContext, request: TableRequest, switches: DebugSwitches) -> tuple[LayerOps, Exchange | None]:
    """The rank's operations and its end of the exchange (None without routed experts). Raises ConfigError."""
    misfit = hopper_misfit(request.spec, request.dtype, request.keep_quantized)
    if rank.device.type == "cuda" and not misfit:
        return _hopper(rank, request, switches)
    if request.loopback_ranks:
        raise ConfigError(
            f"got loopback_ranks={request.loopback_ranks} on {rank.device} ({misfit or 'not a GPU'}); one rank stands "
            'for several on a Hopper GPU with DeepSeek-shaped fp8 weights only. Set device = "cuda", or remove it.'
        )
    return _plain(rank, request, switches)


def _hopper(rank: RankContext, request: TableRequest, switches: DebugSwitches) -> tuple[LayerOps, Exchange | None]:
    capability = torch.cuda.get_device_capability(rank.device)
    assert capability == (9, 0), f"the kernels run on 9.0 only, not on {capability}: ask preflight.py before"
    # Imported here: triton is not there on a machine without a GPU.
    from nmoe_backend.layers.hopper_exchange import build_exchange
    from nmoe_backend.layers.hopper_ops import HopperOps

    num_sms = torch.cuda.get_device_properties(rank.device).multi_processor_count
    ops = HopperOps(rank.device, num_sms, deterministic=request.deterministic)
    exchange = build_exchange(rank, request.spec, request.max_tokens, request.loopback_ranks, num_sms)
    return checked(ops, switches), exchange


def _plain(rank: RankContext, request: TableRequest, switches: DebugSwitches) -> tuple[LayerOps, Exchange | None]:
    ops = with_checks(ops_for(rank.device), switches)
    routers = [layer.ffn.router for layer in request.spec.layers if isinstance(layer.ffn, MoESpec)]
    if not routers:
        return PlainOps(ops), None
    shape = RdepShape(
        max_tokens=request.max_tokens,
        hidden_size=request.spec.hidden_size,
        top_k=routers[0].top_k,
        num_local=routers[0].num_experts // rank.world_size,
        dtype=request.dtype,
        pass_rows=request.pass_rows,
    )
    return PlainOps(ops), PlainExchange(Rdep(rank, shape, ops.rdep))
