"""What layers are written against: the operations of a decoder, each as large as the most fused form of it.

Two tables implement it, `PlainOps` (plain torch, any device and dims) and `HopperOps` (kernels for sm_90a, DeepSeek's
head geometry, 128 x 128 fp8 weights). `layers/table.py` picks one at load; nothing changes it afterwards.

The residual stream is a tensor of its own: a layer adds what the layer before it computed when it norms, so that
addition, norm and quantisation are one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from nmoe_backend.kernels.block_fp8 import Fp8Blocks
from nmoe_backend.layers.batch import Batch
from nmoe_backend.layers.rows import Form, Rows
from nmoe_backend.models.spec import MLASpec, RouterSpec

LinearWeight = Tensor | Fp8Blocks  # [out, in]


@dataclass(frozen=True, kw_only=True)
class ExpertWeights:
    """A rank's own routed experts. Plain: w13 [E, 2 I, D], w2 [E, D, I]; fp8: w13 [E, 2, I, D], w2 [E, D, I]."""

    num_local: int
    w13: Tensor | Fp8Blocks  # gate rows, then up rows
    w2: Tensor | Fp8Blocks


@dataclass(frozen=True, kw_only=True)
class MLAWeights:
    """What attention multiplies with between its projections."""

    spec: MLASpec
    kv_norm: Tensor  # [C]
    w_kv_b: Tensor  # [H, N + V, C]: per head W_UK's rows, then W_UV's


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """The largest step that a table must have room for."""

    max_rows: int  # sequences
    max_tokens: int
    max_seq_len: int
    max_keys: int  # of all sequences together, each one's in whole blocks of KEY_BLOCK


class LayerOps(Protocol):
    """One table of operations for one rank. What `pack*` returns is for the same table's operations only."""

    @property
    def pads_steps(self) -> bool:
        """Whether all ranks of a step must bring equally many tokens, padding included, and what differs between steps
        must be on the device: Batch says in which form."""

    @property
    def captures(self) -> bool:
        """Whether a step of these operations can be captured in a CUDA graph."""

    @property
    def has_sampler(self) -> bool:
        """Whether the sampler's kernels belong to it; else tokens are chosen in plain torch."""

    def allocate(self, shape: StepShape) -> None:
        """Buffers that live as long as the table; called once, before the first step."""

    def norm(self, x: Tensor, weight: Tensor, eps: float, form: Form, residual: Tensor | None = None) -> Rows:
        """RMSNorm of x [T, D], or of residual + x, which is then kept in `residual`."""

    def pack_linear(self, parts: Sequence[LinearWeight]) -> Any:
        """Weights of several linears of one input, to be multiplied at once."""

    def linear(self, rows: Rows, weight: Any, *, beside_next: bool = False) -> Tensor:
        """[T, in] -> [T, sum of the parts' outs] in the compute dtype. beside_next: the operation behind it reads
        nothing of the result and may run at the same time."""

    def swiglu(self, gate_up: Tensor) -> Rows:
        """[T, 2 I] -> silu(first half) * second half, for a linear"""

    def pack_router(self, weight: Tensor) -> Tensor:
        """[E, D] fp32"""

    def route(self, rows: Rows, weight: Tensor, bias: Tensor, spec: RouterSpec) -> tuple[Tensor, Tensor]:
        """-> expert ids [T, K], weights [T, K] fp32"""

    def pack_mla(self, weights: MLAWeights) -> Any:
        """One layer's."""

    def plan_mla(self, batch: Batch, spec: MLASpec, rope_table: Tensor) -> Any:
        """What is the same for all layers of a step."""

    def mla(self, q: Tensor, kv: Tensor, weights: Any, plan: Any, cache: Tensor) -> Rows:
        """q [T, H (N + R)], kv [T, C + R] as projected -> [T, H V] for a linear. Turns, norms, writes the cache [P, B,
        C + R], attends."""

    def pack_experts(self, weights: ExpertWeights) -> Any:
        """A rank's experts of one layer."""

    def head(self, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """[N, D], [V, D] -> [N, V] fp32, in `out` where it is given"""


class SharedExpert(Protocol):
    """What every token visits, in two halves, so that each can run beside something that travels."""

    def up(self, rows: Rows, *, beside_next: bool = False) -> Tensor:
        """[T, D] -> [T, 2 I]"""

    def down(self, gate_up: Tensor, *, beside_next: bool = False) -> Tensor:
        """[T, 2 I] -> [T, D]"""


class Exchange(Protocol):
    """This rank's end of the expert exchange, with the experts that it serves."""

    @property
    def error_word(self) -> Tensor | None:
        """[1] int32 on the device, not 0 once the exchange gave up; None where it raises instead."""

    @property
    def expert_rows(self) -> Tensor:
        """[E] int64 on the device: rows that each expert of this rank has computed since load, all layers together."""

    def forward(
        self, rows: Rows, choice: tuple[Tensor, Tensor], experts: Any, batch: Batch, shared: SharedExpert | None
    ) -> Tensor:
        """rows [T, D], choice (ids [T, K], weights [T, K]) -> [T, D] in the compute dtype, the shared expert added."""
