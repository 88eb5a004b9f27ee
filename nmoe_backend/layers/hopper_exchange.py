"""The routed experts on Hopper GPUs: dispatch, this rank's experts over what arrived, combine; no host sync inside.

What arrives is sorted by expert in windows that bound the memory (expert_rows_gpu.py): a step launches as many windows
as its worst skew could need, ceil(W * T * K / window_rows), and a window without rows costs its launches (about 12 us).
A window holds what a rank receives in the largest step when routing is balanced, T_cap * K, and an eighth more: 1.0 GB
at DeepSeek-V3's sizes and 4,352 tokens. It holds WINDOW_ROWS at least, so that steps of few tokens are one window
whatever their skew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nmoe_backend.kernels.block_fp8 import Fp8Blocks
from nmoe_backend.kernels.expert_gemm_sm90 import expert_down, expert_up
from nmoe_backend.kernels.expert_rows_gpu import (
    ExpertRows,
    expert_row_index,
    expert_rows,
    gather_expert_rows,
    num_expert_rows,
)
from nmoe_backend.kernels.rdep_gpu import RdepLayout
from nmoe_backend.layers.batch import Batch
from nmoe_backend.layers.layer_ops import ExpertWeights, SharedExpert
from nmoe_backend.layers.rows import Rows
from nmoe_backend.models.spec import ModelSpec, MoESpec
from nmoe_backend.parallel.ranks import RankContext
from nmoe_backend.parallel.rdep_device import DeviceRdep

WINDOW_ROWS = 16384  # of 256 tokens a rank, 8 ranks and 8 choices, all to one rank; 0.45 GB at DeepSeek-V3's sizes
GROUP = 128


class HopperExchange:
    """`Exchange` of one rank; its buffers serve all layers in turn."""

    def __init__(self, rdep: DeviceRdep, intermediate_size: int, num_sms: int) -> None:
        layout, device = rdep.layout, rdep.buffers.arena.device
        self.rdep = rdep
        self._num_sms = num_sms
        ids = rdep.received["ids"]
        window_rows = min(ids.numel(), max(WINDOW_ROWS, layout.max_tokens * layout.top_k * 9 // 8))
        self._index = expert_rows(ids, layout.num_local, window_rows)
        num_rows = num_expert_rows(window_rows, layout.num_local)
        d, i, fp8 = layout.hidden_size, intermediate_size, torch.float8_e4m3fn
        self._x = torch.zeros(num_rows, d, dtype=fp8, device=device)
        self._x_scales = torch.zeros(d // GROUP, num_rows, device=device)
        self._h = torch.zeros(num_rows, i, dtype=fp8, device=device)
        self._h_scales = torch.zeros(i // GROUP, num_rows, device=device)
        self._y = torch.zeros(num_rows, d, dtype=torch.bfloat16, device=device)

    @property
    def error_word(self) -> Tensor:
        return self.rdep.error_word

    @property
    def expert_rows(self) -> Tensor:
        return self._index.totals

    def forward(
        self,
        rows: Rows,
        choice: tuple[Tensor, Tensor],
        experts: ExpertWeights,
        batch: Batch,
        shared: SharedExpert | None,
    ) -> Tensor:
        """Dispatch and give_back run beside the GEMM of the shared expert that is launched ahead of each."""
        values, scales = rows.require_fp8()
        gate_up = None if shared is None else shared.up(rows, beside_next=True)
        self.rdep.dispatch((values, scales.t()), choice, batch.num_real, beside=shared is not None)
        self.rdep.barrier()
        index, added = self._index_rows(experts, batch.num_tokens), None
        for window in range(index.num_windows):
            self._compute(experts, index, window, batch.num_tokens)
            beside = False
            if shared is not None and gate_up is not None and window == 0:  # which has all rows of a balanced step
                added, beside = shared.down(gate_up, beside_next=True), True
            self.rdep.give_back(self._y, index.row_idx, batch.num_tokens, index.slots_of(window), beside=beside)
        self.rdep.barrier()
        out = torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)
        self.rdep.combine(choice[0], batch.num_real, added, out)
        return out

    def _index_rows(self, experts: ExpertWeights, step_tokens: int) -> ExpertRows:
        """Where every received row that wants one of this rank's experts goes, in the windows that a step may need."""
        layout = self.rdep.layout
        choices = layout.world_size * step_tokens * layout.top_k
        index = self._index.part(-(-choices // self._index.window_rows))
        expert_row_index(index, self.rdep.received["ids"], experts.num_local, step_tokens)
        return index

    def _compute(self, experts: ExpertWeights, index: ExpertRows, window: int, step_tokens: int) -> None:
        """This rank's experts over the rows of a window, into self._y."""
        w13, w2, num_sms, received = experts.w13, experts.w2, self._num_sms, self.rdep.received
        assert isinstance(w13, Fp8Blocks) and isinstance(w2, Fp8Blocks), "table.py lets only fp8 weights through"
        gather_expert_rows(index, window, received["payload"], received["scales"], self._x, self._x_scales, step_tokens)
        tiles, num_tiles = index.tiles[window], index.num_tiles[window : window + 1]
        expert_up(self._x, self._x_scales, w13.values, w13.scales, tiles, num_tiles, self._h, self._h_scales, num_sms)
        expert_down(self._h, self._h_scales, w2.values, w2.scales, tiles, num_tiles, self._y, num_sms)


def build_exchange(
    rank: RankContext, spec: ModelSpec, max_tokens: int, loopback_ranks: int, num_sms: int
) -> HopperExchange | None:
    """None for a model without routed experts."""
    moes = [layer.ffn for layer in spec.layers if isinstance(layer.ffn, MoESpec)]
    if not moes:
        return None
    world_size = loopback_ranks or rank.world_size
    layout = RdepLayout(
        world_size=world_size,
        max_tokens=max_tokens,
        hidden_size=spec.hidden_size,
        top_k=moes[0].router.top_k,
        num_local=moes[0].router.num_experts // world_size,
        row_dtype=torch.float8_e4m3fn,
        scales_per_row=spec.hidden_size // GROUP,
        return_dtype=torch.bfloat16,
    )
    # Half of the host's limit: the device's verdict names the rank that is missing, so it should come first.
    rdep = DeviceRdep(rank, layout, loopback=loopback_ranks > 0, max_wait_s=rank.timeout_s / 2)
    return HopperExchange(rdep, moes[0].intermediate_size, num_sms)
