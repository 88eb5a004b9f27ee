"""The file format, read and written without its library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nmoe_backend.safetensors_header import encode_header, read_header, read_index
from nmoe_backend.types import ConfigError


def write(path: Path, header: object, data: bytes) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2,), offsets: tuple[int, int] = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_encoded_header_reads_back_with_absolute_offsets(tmp_path):
    raw = encode_header({"b": ("BF16", (2, 3)), "a": ("F32", ()), "c": ("F8_E4M3", (5,))})
    assert len(raw) % 8 == 0
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw + bytes(12 + 4 + 5))
    tensors = read_header(path)
    assert list(tensors) == ["b", "a", "c"]
    assert [(t.dtype, t.shape, t.begin - len(raw), t.end - len(raw)) for t in tensors.values()] == [
        ("BF16", (2, 3), 0, 12),
        ("F32", (), 12, 16),
        ("F8_E4M3", (5,), 16, 21),
    ]


def test_split_gives_consecutive_equal_parts(tmp_path):
    info = read_header(write(tmp_path / "x", {"a": entry("BF16", (4, 6, 8), (0, 384))}, bytes(384)))["a"]
    parts = info.split(8, (3, 8))
    assert [part.begin - info.begin for part in parts] == list(range(0, 384, 48))
    assert {part.num_bytes for part in parts} == {48}
    assert {part.shape for part in parts} == {(3, 8)}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": entry()}, bytes(7)),  # truncated
        ({"a": entry()}, bytes(9)),  # more than it says
        ({"a": entry(offsets=(0, 7))}, bytes(7)),  # not 2 x 4 bytes
        ({"a": entry(offsets=(-8, 0))}, b""),
        ({"a": entry(dtype="F31")}, bytes(8)),
        ({"a": entry(shape=(-2,))}, bytes(8)),
        ({"a": {"dtype": "F32"}}, bytes(8)),
        ({"a": 3}, bytes(8)),
        ([1], b""),
        (b"{not json", b""),
        (b"\xff\xfe", b""),
    ],
)
def test_a_corrupt_file_is_a_config_error_with_its_name(tmp_path, header, data):
    path = write(tmp_path / "model-00003.safetensors", header, data)
    with pytest.raises(ConfigError, match=r"model-00003\.safetensors.*fetch it again"):
        read_header(path)


@pytest.mark.parametrize(
    "content", [b"", b"\x01\x00", (2**60).to_bytes(8, "little"), (50).to_bytes(8, "little") + b"{}"]
)
def test_a_file_cut_inside_its_header_is_a_config_error(tmp_path, content):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"m\.safetensors"):
        read_header(path)


def test_an_absent_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="absent"):
        read_header(tmp_path / "absent")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_a_config_error(tmp_path, text):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="weight_map"):
        read_index(path)
