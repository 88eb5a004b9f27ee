"""The table of operations: the one place where a device decides what runs.

Picked once at load by the explicit device of the config, and never changed or fallen back from. What an operation
computes, with shapes and numerics, stands in its file in kernels/.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nmoe_backend.kernels.block_fp8 import Fp8Blocks, block_fp8_experts_reference, block_fp8_linear_reference
from nmoe_backend.kernels.experts import experts_reference
from nmoe_backend.kernels.kv_write import kv_write_reference
from nmoe_backend.kernels.linear import linear_reference
from nmoe_backend.kernels.mla_decode import mla_decode_reference
from nmoe_backend.kernels.mla_prefill import mla_prefill_paged_reference, mla_prefill_reference
from nmoe_backend.kernels.rdep import rdep_combine_reference, rdep_local_ids_reference, rdep_send_reference
from nmoe_backend.kernels.rms_norm import rms_norm_reference
from nmoe_backend.kernels.rope import rope_reference
from nmoe_backend.kernels.router import router_reference
from nmoe_backend.parallel.rdep import RdepOps
from nmoe_backend.types import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Ops:
    """One implementation of each operation, for one kind of device."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    linear: Callable[[Tensor, Tensor], Tensor]
    block_fp8_linear: Callable[[Tensor, Fp8Blocks], Tensor]
    rope: Callable[[Tensor, Tensor, bool], Tensor]
    kv_write: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    mla_prefill: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
    mla_prefill_paged: Callable[[Tensor, Tensor, Tensor, Tensor, int, Tensor, float], Tensor]
    mla_decode: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]
    router: Callable[[Tensor, Tensor, int, int, int, bool, float], tuple[Tensor, Tensor]]
    experts: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    block_fp8_experts: Callable[[Tensor, Tensor, Tensor, Fp8Blocks, Fp8Blocks], Tensor]
    rdep: RdepOps


def ops_for(device: torch.device) -> Ops:
    """The table of a device kind. Raises ConfigError for a kind that nothing here was tested on."""
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"got device {device}; there are operations for cpu and cuda. Set device to one of them.")
    return Ops(
        rms_norm=rms_norm_reference,
        linear=linear_reference,
        block_fp8_linear=block_fp8_linear_reference,
        rope=rope_reference,
        kv_write=kv_write_reference,
        mla_prefill=mla_prefill_reference,
        mla_prefill_paged=mla_prefill_paged_reference,
        mla_decode=mla_decode_reference,
        router=router_reference,
        experts=experts_reference,
        block_fp8_experts=block_fp8_experts_reference,
        rdep=RdepOps(
            local_ids=rdep_local_ids_reference,
            send=rdep_send_reference,
            combine=rdep_combine_reference,
        ),
    )
