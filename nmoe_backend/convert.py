"""`nmoe convert`: from the hub's form to nmoe-sharded files, one per rank, by copying bytes.

The header of a rank's file is known before its first tensor is read, so the file is written front to back in bounded
chunks: memory does not grow with the size of a rank. Only fp32 parameters (the router's) change their dtype.

What is on disk while it runs, per rank:
    model{r}-mp{w}.safetensors.partial   header, then tensors in order
    model{r}-mp{w}.safetensors.journal   names of the tensors whose bytes are durable, one a line
and `nmoe_convert.json`, which says what is converted. A tensor's name reaches the journal only after an fsync of its
bytes, so a conversion that died at any point goes on behind the last journaled tensor. A rename ends each rank.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nmoe_backend import models
from nmoe_backend.models.checkpoint import Checkpoint, RankCheckpoint, hub_files, sharded_file
from nmoe_backend.safetensors_header import DTYPE_BYTES, TensorInfo, encode_header
from nmoe_backend.types import ConfigError

RECORD_FILE = "nmoe_convert.json"

_CHUNK_BYTES = 8 << 20
_SYNC_BYTES = 256 << 20  # an fsync per tensor would cost more than the copy; this is what a crash can lose
_SIDECARS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE*",
    "config.json",  # last: a folder without it is incomplete
)

Progress = Callable[[int, int, int], None]  # (rank, bytes of its file that are written, bytes of its file)


def main(argv: list[str]) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="nmoe convert", description="Write a checkpoint in the nmoe-sharded form: one file per rank."
    )
    parser.add_argument("--from", dest="source", type=Path, required=True, help="folder in the hub's form")
    parser.add_argument("--to", dest="out", type=Path, required=True, help="folder to write (made if missing)")
    parser.add_argument("--world", type=int, required=True, help="number of ranks")
    args = parser.parse_args(argv)
    try:
        convert(args.source, args.out, args.world, ProgressPrinter(args.world))
    except ConfigError as error:
        print(f"nmoe convert: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"nmoe convert: {error}. What is written stays: the same command goes on from there.", file=sys.stderr)
        return 1
    print(f"{args.out} is complete: {args.world} ranks")
    return 0


def convert(source: Path, out: Path, world_size: int, progress: Progress = lambda rank, done, total: None) -> None:
    """Write or complete the conversion of `source` in `out`. Raises ConfigError, and OSError of the file system.

    Ranks that are already complete cost one look at their header. An `out` that was begun from another source, or
    from this one before it changed, or for another number of ranks, is an error.
    """
    if world_size < 1:
        raise ConfigError(f"--world is {world_size}; it must be at least 1.")
    if source.resolve() == out.resolve():
        raise ConfigError(f"--from and --to are the same folder, {source}; write to a folder of its own.")
    spec = models.load_spec(source)
    hub_files(source)  # a clear error when the source is not in the hub's form
    record = _record(source, world_size)
    _check_record(out, record)
    checkpoint = Checkpoint(source, spec)
    jobs = [_RankJob.plan(checkpoint, out, rank, world_size) for rank in range(world_size)]
    _check_disk_space(out, sum(job.missing_bytes() for job in jobs))
    out.mkdir(parents=True, exist_ok=True)
    _write_durably(out / RECORD_FILE, (json.dumps(record, indent=2) + "\n").encode())
    for job in jobs:
        job.write(progress)
        if _record(source, world_size) != record:
            raise ConfigError(f"{source} changed while it was converted; remove {out} and convert again.")
        job.finish()
    for pattern in _SIDECARS:
        for path in sorted(source.glob(pattern)):
            _write_durably(out / path.name, path.read_bytes())


class ProgressPrinter:
    """Prints a line every two seconds and one at the end of each rank."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._rank = -1
        self._begin_s = self._printed_s = 0.0
        self._begin_bytes = 0

    def __call__(self, rank: int, done: int, total: int) -> None:
        now = time.monotonic()
        if rank != self._rank:
            self._rank, self._begin_bytes, self._begin_s, self._printed_s = rank, done, now, now
        if done < total and now - self._printed_s < 2.0:
            return
        self._printed_s = now
        elapsed, written = now - self._begin_s, done - self._begin_bytes
        speed = f"{written / elapsed / 1e9:.2f} GB/s" if written and elapsed > 0 else "already there"
        print(f"rank {rank + 1} of {self._world_size}: {done / 1e9:.2f} of {total / 1e9:.2f} GB, {speed}", flush=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class _RankJob:
    """One rank's file: what it will hold, and how much of it is there."""

    rank: int
    path: Path
    checkpoint: RankCheckpoint
    header: bytes
    ends: Mapping[str, int]  # parameter -> where its bytes end in the file, in file order

    @classmethod
    def plan(cls, checkpoint: Checkpoint, out: Path, rank: int, world_size: int) -> _RankJob:
        share = checkpoint.share(rank, world_size)
        layout = {
            param.name: ("F32" if param.float32 else share.pieces(param)[0].dtype, param.shape)
            for param in share.params
        }
        header = encode_header(layout)
        ends, end = {}, len(header)
        for name, (dtype, shape) in layout.items():
            end += math.prod(shape) * DTYPE_BYTES[dtype]
            ends[name] = end
        path = out / sharded_file(rank, world_size)
        return cls(rank=rank, path=path, checkpoint=share, header=header, ends=ends)

    @property
    def total(self) -> int:
        return max(self.ends.values())

    @property
    def partial(self) -> Path:
        return self.path.with_name(self.path.name + ".partial")

    @property
    def journal(self) -> Path:
        return self.path.with_name(self.path.name + ".journal")

    def missing_bytes(self) -> int:
        """Bytes that the file system must still take."""
        there = self.path if self.path.exists() else self.partial
        return max(0, self.total - (there.stat().st_size if there.exists() else 0))

    def write(self, progress: Progress) -> None:
        """Write what is missing of the rank's file."""
        if self.path.exists():
            if self.path.stat().st_size != self.total or not self._has_header(self.path):
                raise ConfigError(f"{self.path} is not what this conversion writes; remove it and convert again.")
            progress(self.rank, self.total, self.total)
            return
        done = self._journaled()
        offset = self.ends[done[-1]] if done else 0
        with self.partial.open("r+b" if offset else "wb") as target, self.journal.open("ab") as journal:
            journal.truncate(sum(len(name) + 1 for name in done))  # a crash can leave half a line at its end
            target.truncate(offset)
            target.seek(offset)
            if not offset:
                target.write(self.header)
            progress(self.rank, target.tell(), self.total)
            self._copy(target, journal, len(done), progress)

    def finish(self) -> None:
        """Give the complete file its name."""
        if self.partial.exists():
            self.partial.rename(self.path)
            _sync_folder(self.path.parent)
        self.journal.unlink(missing_ok=True)

    def _copy(self, target: BinaryIO, journal: BinaryIO, num_done: int, progress: Progress) -> None:
        synced = target.tell()
        names: list[str] = []
        for param in self.checkpoint.params[num_done:]:
            for piece in self.checkpoint.pieces(param):
                for chunk in _chunks(piece, widen=param.float32):
                    target.write(chunk)
                    progress(self.rank, target.tell(), self.total)
            assert target.tell() == self.ends[param.name], f"{param.name} ends at {target.tell()}"
            names.append(param.name)
            if target.tell() - synced >= _SYNC_BYTES or target.tell() == self.total:
                _sync(target)
                _append_names(journal, names)
                synced, names = target.tell(), []

    def _journaled(self) -> list[str]:
        """Parameters whose bytes are safely in the partial file: a prefix of all, in file order."""
        if not (self.journal.exists() and self.partial.exists()):
            return []
        lines = self.journal.read_bytes().split(b"\n")[:-1]  # behind the last newline: half a line
        names = [line.decode() for line in lines]
        if not names:
            return []
        is_prefix = names == list(self.ends)[: len(names)]
        if not is_prefix or not self._has_header(self.partial) or self.partial.stat().st_size < self.ends[names[-1]]:
            raise ConfigError(
                f"{self.partial} and its journal do not belong to this conversion; remove both and convert again."
            )
        return names

    def _has_header(self, path: Path) -> bool:
        with path.open("rb") as file:
            return file.read(len(self.header)) == self.header


def _chunks(piece: TensorInfo, *, widen: bool) -> Iterator[bytes]:
    """The bytes of one source in bounded parts, as fp32 if `widen`. Raises ConfigError when the file ends early."""
    with piece.file.open("rb", buffering=0) as file:
        file.seek(piece.begin)
        left = piece.num_bytes
        while left:
            chunk = file.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise ConfigError(f"{piece.file} ended {left} bytes early: it changed while it was read.")
            left -= len(chunk)
            yield _to_float32(chunk, piece.dtype) if widen else chunk


def _to_float32(data: bytes, dtype: str) -> bytes:
    """Exact: every bf16 and fp16 value is an fp32 value."""
    if dtype == "F32":
        return data
    if dtype == "F16":
        count = len(data) // 2
        return struct.pack(f"<{count}f", *struct.unpack(f"<{count}e", data))
    assert dtype == "BF16", dtype  # the upper half of an fp32
    wide = bytearray(2 * len(data))
    wide[2::4], wide[3::4] = data[0::2], data[1::2]
    return bytes(wide)


def _record(source: Path, world_size: int) -> dict[str, object]:
    """What identifies a conversion. Sizes and times, not contents: hashing 700 GB would double the reading."""
    stats = {path.name: path.stat() for path in hub_files(source)}
    return {
        "world_size": world_size,
        "config_sha256": hashlib.sha256((source / "config.json").read_bytes()).hexdigest(),
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
    }


def _check_record(out: Path, record: Mapping[str, object]) -> None:
    """Raises ConfigError when `out` holds anything but the beginning of this very conversion."""
    path = out / RECORD_FILE
    if not path.exists():
        if any(out.glob("model*.safetensors*")):
            raise ConfigError(f"{out} holds model files but no {RECORD_FILE}; write to an empty folder.")
        return
    try:
        found = json.loads(path.read_bytes())
        differs = [key for key in record if found.get(key) != record[key]]
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read ({error!r}); remove {out} and convert again.") from error
    if "world_size" in differs:
        raise ConfigError(
            f"{out} holds a conversion for world {found.get('world_size')}, need {record['world_size']}; "
            "write to another folder."
        )
    if differs:
        raise ConfigError(
            f"the source changed since the conversion into {out} began ({', '.join(differs)}); "
            f"remove {out} and convert again."
        )


def _check_disk_space(out: Path, needed: int) -> None:
    folder = next(path for path in (out, *out.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"{out} needs {needed / 1e9:.2f} GB more and its file system has {free / 1e9:.2f} GB free; "
            "free some space, or write elsewhere."
        )


def _append_names(journal: BinaryIO, names: list[str]) -> None:
    journal.write("".join(f"{name}\n" for name in names).encode())
    _sync(journal)


def _write_durably(path: Path, data: bytes) -> None:
    """All of it or nothing: a temporary file, then a rename. The same content leaves the file alone."""
    if path.exists() and path.read_bytes() == data:
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        _sync(file)
    temporary.rename(path)
    _sync_folder(path.parent)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make renames in it durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
