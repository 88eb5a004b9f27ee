"""Weights of one rank: from either checkpoint form to tensors on its device, under their nmoe-sharded names.

Reads only the bytes of this rank's experts and of the replicated tensors, straight into the result where they are kept
as they are stored (weight_reader.py). What becomes the compute dtype, dequantised or not, passes through one more
tensor on the device, one source at a time and thread.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from nmoe_backend.kernels.block_fp8 import dequantize_blocks_reference
from nmoe_backend.models.checkpoint import Checkpoint, RankCheckpoint, scale_name, source_shape
from nmoe_backend.models.spec import ParamSpec
from nmoe_backend.runtime.weight_reader import TORCH_DTYPES, Job, OnRead, Reader, run_jobs
from nmoe_backend.safetensors_header import TensorInfo

_LOG = logging.getLogger(__name__)


def _nobody(info: TensorInfo) -> None:
    pass


def load_rank_weights(
    checkpoint: Checkpoint,
    *,
    rank: int,
    world_size: int,
    device: torch.device | str,
    dtype: torch.dtype,
    keep_quantized: bool = False,
    on_read: OnRead = _nobody,
) -> dict[str, Tensor]:
    """Every parameter of the rank by name, in `dtype` (fp32 where ParamSpec says so), contiguous, on `device`.

    With `keep_quantized` a quantised weight stays as it is stored, with its fp32 scales under `<name>_scale_inv`
    (linears) or `<name>_scale` (stacked experts), unless its ParamSpec says `dequantized`. Otherwise all are
    dequantised, and no scales are in the result. `on_read` is called from several threads. Raises ConfigError, listing
    everything that is missing, unexpected, misshapen or of a wrong dtype, before the first tensor is read.
    """
    share = checkpoint.share(rank, world_size)
    if share.ignored:
        _LOG.info("rank %d ignores %d tensors of MTP layers: %s", rank, len(share.ignored), share.ignored)
    by_name = {param.name: param for param in share.params}
    scale_of = {name: by_name[scale_name(name)] for name in by_name if scale_name(name) in by_name}
    kept = {name for name in scale_of if keep_quantized and not by_name[name].dequantized}
    left_out = {scale.name for name, scale in scale_of.items() if name not in kept}
    block = checkpoint.spec.quant.block if checkpoint.spec.quant is not None else (1, 1)
    weights: dict[str, Tensor] = {}
    jobs: list[Job] = []
    for name, param in by_name.items():
        if name in left_out:
            continue
        stored = TORCH_DTYPES[share.pieces(param)[0].dtype]
        result_dtype = torch.float32 if param.float32 else stored if name in kept else dtype
        weights[name] = torch.empty(param.shape, dtype=result_dtype, device=device)
        jobs += _jobs(weights[name], share, param, None if name in kept else scale_of.get(name), block)
    run_jobs(jobs, torch.device(device), on_read)
    return weights


def _jobs(
    result: Tensor, share: RankCheckpoint, param: ParamSpec, scale: ParamSpec | None, block: tuple[int, int]
) -> Iterator[Job]:
    """One a source: they stand one below the other in `result`; source i of a stack is rows [i * R, (i + 1) * R).

    `scale`: the parameter with the scales of weights that are to be dequantised on the way.
    """
    rows = result.view(len(param.sources), *source_shape(param))
    scale_pieces = share.pieces(scale) if scale is not None else [None] * len(param.sources)
    for row, piece, scale_piece in zip(rows, share.pieces(param), scale_pieces, strict=True):
        if scale_piece is not None:
            yield piece, partial(_dequantise, row, piece, scale_piece, block)
        elif TORCH_DTYPES[piece.dtype] != row.dtype:
            yield piece, partial(_cast, row, piece)
        else:
            yield piece, partial(_keep, row, piece)


def _keep(row: Tensor, piece: TensorInfo, reader: Reader) -> None:
    reader.fill(row, piece)


def _cast(row: Tensor, piece: TensorInfo, reader: Reader) -> None:
    row.copy_(reader.read(piece))


def _dequantise(
    row: Tensor, piece: TensorInfo, scale_piece: TensorInfo, block: tuple[int, int], reader: Reader
) -> None:
    row.copy_(dequantize_blocks_reference(reader.read(piece), reader.read(scale_piece), block, row.dtype))
