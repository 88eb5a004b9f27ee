"""The safetensors file format: headers, and where each tensor's bytes lie. Standard library only.

A file is: 8 bytes little-endian header length, that many bytes of JSON `{name: {dtype, shape, data_offsets}}`, then the
tensors' bytes (little-endian, C order) without gaps (https://github.com/huggingface/safetensors). Reading a header
touches no tensor bytes, so that the doctor and the converter can look at 700 GB in milliseconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nmoe_backend.types import ConfigError

DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip

_MAX_HEADER_BYTES = 100_000_000  # the reference implementation's bound


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """Where one tensor lies: bytes `[begin, end)` of `file`, absolute."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin

    def split(self, num_parts: int, shape: tuple[int, ...]) -> list[TensorInfo]:
        """The tensor as `num_parts` tensors of `shape` that lie one behind the other."""
        step = self.num_bytes // num_parts
        assert step * num_parts == self.num_bytes == num_parts * math.prod(shape) * DTYPE_BYTES[self.dtype], (
            f"{self.shape} is not {num_parts} x {shape}"
        )
        offsets = range(self.begin, self.end, step)
        return [TensorInfo(dtype=self.dtype, shape=shape, file=self.file, begin=o, end=o + step) for o in offsets]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of one file by name. Raises ConfigError, with the file's name, for a truncated or corrupt file."""
    remedy = "The file is truncated or corrupt: fetch it again."
    try:
        with path.open("rb") as file:
            file_bytes = file.seek(0, 2)
            file.seek(0)
            header_bytes = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or header_bytes > min(file_bytes - 8, _MAX_HEADER_BYTES):
                raise ConfigError(f"{path}: {file_bytes} bytes cannot hold a header of {header_bytes} bytes. {remedy}")
            raw = file.read(header_bytes)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}. {remedy}") from error
    try:
        table = json.loads(raw)
        tensors = {
            name: _tensor_info(path, entry, 8 + header_bytes) for name, entry in table.items() if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: the header cannot be read ({error!r}). {remedy}") from error
    needed = max((info.end for info in tensors.values()), default=8 + header_bytes)
    if needed != file_bytes:
        raise ConfigError(f"{path}: {file_bytes} bytes, but its header describes {needed}. {remedy}")
    return tensors


def encode_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The first bytes of a file that holds `{name: (dtype, shape)}` in that order, back to back.

    Padded with spaces so that the data starts at a multiple of 8, as the reference implementation does.
    """
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * DTYPE_BYTES[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def read_index(path: Path) -> dict[str, str]:
    """{tensor name: file name} of a `model.safetensors.index.json`. Raises ConfigError."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file_name) for name, file_name in weight_map.items()}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}. Fetch it again.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not an index with a weight_map ({error!r}). Fetch it again.") from error


def _tensor_info(path: Path, entry: Mapping[str, object], data_start: int) -> TensorInfo:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(isinstance(n, int) and n >= 0 for n in offsets):
        raise ValueError(f"data_offsets {offsets!r}")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype {dtype!r}")
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise ValueError(f"{end - begin} bytes for shape {shape} of {dtype}")
    return TensorInfo(dtype=dtype, shape=tuple(shape), file=path, begin=data_start + begin, end=data_start + end)
