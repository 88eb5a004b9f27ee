"""Weights of one rank: from either checkpoint form to tensors on its device, under their nmoe-sharded names.

Reads only the bytes of this rank's experts and of the replicated tensors, one source at a time: the host never holds
more than one source tensor beside the result. Quantised weights stay as they are stored, or become the compute dtype
here, as the caller says.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nmoe_backend.kernels.block_fp8 import dequantize_blocks_reference
from nmoe_backend.models.checkpoint import RankCheckpoint, open_rank, scale_name, source_shape
from nmoe_backend.models.spec import ModelSpec, ParamSpec
from nmoe_backend.safetensors_header import TensorInfo
from nmoe_backend.types import ConfigError

_LOG = logging.getLogger(__name__)

_TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
}

Reader = Callable[[TensorInfo], bytearray]


def read_bytes(info: TensorInfo) -> bytearray:
    """The bytes of one tensor. Raises ConfigError when the file ends before it."""
    data = bytearray(info.num_bytes)
    try:
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.begin)
            view = memoryview(data)
            while view and (got := file.readinto(view)):
                view = view[got:]
    except OSError as error:
        raise ConfigError(f"cannot read {info.file}: {error.strerror}.") from error
    if view:
        raise ConfigError(f"{info.file} ended {len(view)} bytes early: it changed while it was read. Fetch it again.")
    return data


def load_rank_weights(
    model_path: Path,
    spec: ModelSpec,
    *,
    rank: int,
    world_size: int,
    device: torch.device | str,
    dtype: torch.dtype,
    keep_quantized: bool = False,
    read: Reader = read_bytes,
) -> dict[str, Tensor]:
    """Every parameter of the rank by name, in `dtype` (fp32 where ParamSpec says so), contiguous, on `device`.

    With `keep_quantized` a quantised weight stays as it is stored, with its fp32 scales under `<name>_scale_inv`
    (linears) or `<name>_scale` (stacked experts), unless its ParamSpec says `dequantized`. Otherwise all are
    dequantised, and no scales are in the result. Raises ConfigError, listing everything that is missing,
    unexpected, misshapen or of a wrong dtype, before the first tensor is read.
    """
    checkpoint = open_rank(Path(model_path), spec, rank, world_size)
    if checkpoint.ignored:
        _LOG.info("rank %d ignores %d tensors of MTP layers: %s", rank, len(checkpoint.ignored), checkpoint.ignored)
    by_name = {param.name: param for param in checkpoint.params}
    scale_of = {name: by_name[scale_name(name)] for name in by_name if scale_name(name) in by_name}
    kept = {name for name in scale_of if keep_quantized and not by_name[name].dequantized}
    left_out = {scale.name for name, scale in scale_of.items() if name not in kept}
    weights: dict[str, Tensor] = {}
    for name, param in by_name.items():
        if name in left_out:
            continue
        stored = _TORCH_DTYPES[checkpoint.pieces(param)[0].dtype]
        result_dtype = torch.float32 if param.float32 else stored if name in kept else dtype
        result = torch.empty(param.shape, dtype=result_dtype, device=device)
        _fill(result, checkpoint, spec, param, None if name in kept else scale_of.get(name), read)
        weights[name] = result
    return weights


def _fill(
    result: Tensor,
    checkpoint: RankCheckpoint,
    spec: ModelSpec,
    param: ParamSpec,
    scale: ParamSpec | None,
    read: Reader,
) -> None:
    """Copy the sources, one below the other, into `result`; source i of a stack is rows [i * R, (i + 1) * R).

    `scale`: the parameter with the scales of weights that are to be dequantised on the way.
    """
    rows = result.view(len(param.sources), *source_shape(param))
    scale_pieces = checkpoint.pieces(scale) if scale is not None else [None] * len(param.sources)
    for row, piece, scale_piece in zip(rows, checkpoint.pieces(param), scale_pieces, strict=True):
        source = _tensor(piece, read).to(result.device)
        if scale_piece is not None:
            assert spec.quant is not None, "only quantised checkpoints have scales"
            scales = _tensor(scale_piece, read).to(result.device)
            source = dequantize_blocks_reference(source, scales, spec.quant.block, result.dtype)
        row.copy_(source)


def _tensor(info: TensorInfo, read: Reader) -> Tensor:
    return torch.frombuffer(read(info), dtype=_TORCH_DTYPES[info.dtype]).view(info.shape)
