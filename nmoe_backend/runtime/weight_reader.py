"""Bytes of files into the tensors of one device, by a few threads a rank.

On a GPU a thread owns a stream and two pinned buffers: it reads a part of a tensor into one (`preadv`, without the
interpreter's lock) while the other's copy is on its way, so that of a rank's weights the host never holds more than
NUM_READERS x NUM_STAGES x STAGE_BYTES. On a CPU it reads into the tensor's own memory.

Ranks share nothing but the page cache. All of them take their tensors in one order, file by file, so that what every
rank needs comes from disk once. Passing it from GPU to GPU instead would spare the host a sixth of DeepSeek-V3's bytes
on eight ranks, all of them copies out of the page cache, and make every rank's load wait for its peers.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from nmoe_backend.safetensors_header import TensorInfo
from nmoe_backend.types import ConfigError

NUM_READERS = 8  # threads of a rank: one reads 7 GB/s out of the page cache, a GPU takes 54
NUM_STAGES = 2  # of a thread: one is filled while the other travels
STAGE_BYTES = 8 << 20
RUN_BYTES = 256 << 20  # neighbours in a file, which one thread reads in a row
SAY_EVERY_S = 10.0
TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
}

OnRead = Callable[[TensorInfo], None]


class Reader:
    """One thread's way from files to tensors of one device. Made by the thread that allocated the tensors."""

    def __init__(self, device: torch.device, on_read: OnRead) -> None:
        self._device, self._on_read = device, on_read
        self._path: Path | None = None
        self._file = -1
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            with torch.cuda.device(device):
                buffers = [torch.empty(STAGE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(NUM_STAGES)]
            self._stages = itertools.cycle([(buffer, torch.cuda.Event(blocking=True)) for buffer in buffers])
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))  # the tensors' memory may have been in use

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """In the thread that reads. Behind it every copy has arrived."""
        try:
            with torch.cuda.stream(self._stream):
                yield
            if self._stream is not None:
                self._stream.synchronize()
        finally:
            self._close()

    def read(self, info: TensorInfo) -> Tensor:
        """A new tensor with the file's values."""
        tensor = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype], device=self._device)
        self.fill(tensor, info)
        return tensor

    def fill(self, tensor: Tensor, info: TensorInfo) -> None:
        """Put the file's values into `tensor`: contiguous, of the file's dtype and size. On a GPU they are there for
        what follows on the reader's stream. Raises ConfigError when the file ends before them."""
        flat = tensor.view(-1).view(torch.uint8)
        assert flat.numel() == info.num_bytes, f"{info} does not fill {tuple(tensor.shape)} {tensor.dtype}"
        if self._stream is None:
            self._read(flat.numpy().data, info, info.begin)
        else:
            for first, part in zip(range(0, flat.numel(), STAGE_BYTES), flat.split(STAGE_BYTES), strict=False):
                buffer, has_left = next(self._stages)
                has_left.synchronize()
                stage = buffer[: part.numel()]
                self._read(stage.numpy().data, info, info.begin + first)
                part.copy_(stage, non_blocking=True)
                has_left.record(self._stream)
        self._on_read(info)

    def _read(self, view: memoryview, info: TensorInfo, offset: int) -> None:
        try:
            if self._path != info.file:
                self._close()
                self._file, self._path = os.open(info.file, os.O_RDONLY | os.O_CLOEXEC), info.file
            while view and (got := os.preadv(self._file, [view], offset)):
                view, offset = view[got:], offset + got
        except OSError as error:
            raise ConfigError(f"cannot read {info.file}: {error.strerror}.") from error
        if view:
            early = info.end - offset
            raise ConfigError(f"{info.file} ended {early} bytes early: it changed while it was read. Fetch it again.")

    def _close(self) -> None:
        if self._path is not None:
            os.close(self._file)
            self._path = None


Job = tuple[TensorInfo, Callable[[Reader], None]]  # where its bytes lie, what to do


def run_jobs(jobs: Sequence[Job], device: torch.device, on_read: OnRead) -> None:
    """Every job once, by NUM_READERS threads, in the order of their bytes. After an error all of them stop; it is
    raised here. `on_read` is called by any of the threads, with each tensor that was read."""
    runs = iter(_runs(sorted(jobs, key=lambda job: (job[0].file, job[0].begin))))
    failed = threading.Event()

    def work(reader: Reader) -> None:
        try:
            with reader.at_work():
                for _, do in itertools.chain.from_iterable(runs):  # a list's iterator: a run goes to one thread
                    if failed.is_set():
                        return
                    do(reader)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="nmoe-read") as pool:
        for ended in [pool.submit(work, Reader(device, on_read)) for _ in range(NUM_READERS)]:
            ended.result()


def _runs(jobs: Sequence[Job]) -> list[list[Job]]:
    """The jobs in groups that lie in one file, within RUN_BYTES (or that are one tensor, if that is larger)."""
    runs: list[list[Job]] = []
    for job in jobs:
        first = runs[-1][0][0] if runs else None
        if first is not None and first.file == job[0].file and job[0].end - first.begin <= RUN_BYTES:
            runs[-1].append(job)
        else:
            runs.append([job])
    return runs


class ReadMeter:
    """What all ranks have read, as an `OnRead`: says so every SAY_EVERY_S, and in the end what it was."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._lock = threading.Lock()
        self.num_bytes = 0
        self._began_s = self._said_s = time.monotonic()

    def __call__(self, info: TensorInfo) -> None:
        with self._lock:
            self.num_bytes += info.num_bytes
            due = time.monotonic() - self._said_s > SAY_EVERY_S
            if due:
                self._said_s = time.monotonic()
        if due:
            self._say(f"{self.summary()} so far")

    def summary(self) -> str:
        """`817.30 GB at 25.41 GB/s`"""
        rate = self.num_bytes / max(time.monotonic() - self._began_s, 1e-9)
        return f"{self.num_bytes / 1e9:.2f} GB at {rate / 1e9:.2f} GB/s"
