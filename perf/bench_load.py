"""Load: GB/s from an fp8 checkpoint in the page cache to a device, as one rank and as the eight ranks of a node.

    python -m perf.bench_load [--gb 16] [--device cuda|cpu] [--folder DIR] [--rounds 3] [--output FILE] [--save]

Writes a checkpoint of DeepSeek-V3's tensors at full size (64 experts, as many layers as --gb takes, the hub's form, in
files of 4.3 GB, random bytes) into a folder of its own below --folder, and removes it in the end. A round loads it as
one rank and as eight ranks by eight threads at once, as warm-up does; on fewer GPUs than eight they take turns. Rates
count what was read, replicated tensors once a rank; a tensor of every file is compared with the file afterwards.

headers     seconds until the checkpoint is open: once a replica.
read        what the machine gives: the same files, read by as many threads as a rank has into fixed buffers; GB/s.
to_device   copying such a pinned buffer to the device again and again; GB/s.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmoe_backend import models
from nmoe_backend.models.checkpoint import INDEX_FILE, Checkpoint, hub_files, scale_name, source_shape
from nmoe_backend.models.spec import ModelSpec
from nmoe_backend.runtime.weight_reader import NUM_READERS, STAGE_BYTES, ReadMeter
from nmoe_backend.runtime.weights import load_rank_weights
from nmoe_backend.safetensors_header import DTYPE_BYTES, TensorInfo, encode_header
from perf import results

NODE_RANKS = 8
NUM_EXPERTS = 64
FILE_BYTES = 4.3e9
POOL_BYTES = 1 << 26  # random bytes that all tensors are cut from, at random places
MODEL = Path(__file__).parent / "deepseek_v3" / "config.json"


def write_checkpoint(folder: Path, gb: float, sizes: Mapping[str, int]) -> Path:
    """DeepSeek-V3 with so many layers that the files take at least `gb`. `sizes`: other values of config.json."""
    config = {**json.loads(MODEL.read_text()), "n_routed_experts": NUM_EXPERTS, "first_k_dense_replace": 1, **sizes}
    config["num_nextn_predict_layers"] = 0
    tensors: list[tuple[str, str, tuple[int, ...]]] = []
    for num_layers in range(2, 62):
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": num_layers}))
        tensors = hub_tensors(models.load_spec(folder))
        if sum(map(_num_bytes, tensors)) >= gb * 1e9:
            break
    files: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    for tensor in tensors:
        if sum(map(_num_bytes, files[-1])) > FILE_BYTES:
            files.append([])
        files[-1].append(tensor)
    pool = torch.randint(0, 256, (POOL_BYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    weight_map = {}
    for number, held in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        weight_map |= {tensor: name for tensor, _, _ in held}
        _write_file(folder / name, held, pool, number)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def hub_tensors(spec: ModelSpec) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of every tensor of the hub's form, layer by layer."""
    params = models.parameters(spec, 0, 1)
    names = {param.name for param in params}
    found = []
    for param in params:
        dtype = "F32" if param.float32 else "F8_E4M3" if scale_name(param.name) in names else "BF16"
        found += [(source, dtype, source_shape(param)) for source in param.sources]
    return found


def load(checkpoint: Checkpoint, world_size: int, device: str) -> tuple[float, float, list[dict[str, Tensor]]]:
    """(seconds, bytes, weights) of all ranks of a world, loaded at once."""
    num_gpus = torch.cuda.device_count() if device == "cuda" else 0
    places = [torch.device("cuda", rank % num_gpus) if num_gpus else torch.device("cpu") for rank in range(world_size)]
    meter = ReadMeter(print)

    def one(rank: int) -> dict[str, Tensor]:
        return load_rank_weights(
            checkpoint,
            rank=rank,
            world_size=world_size,
            device=places[rank],
            dtype=torch.bfloat16,
            keep_quantized=True,
            on_read=meter,
        )

    with ThreadPoolExecutor(world_size) as pool:
        began = time.perf_counter()
        weights = list(pool.map(one, range(world_size)))
        seconds = time.perf_counter() - began
    return seconds, float(meter.num_bytes), weights


def check(checkpoint: Checkpoint, weights: Sequence[Mapping[str, Tensor]]) -> int:
    """Ends the program unless a kept tensor of every file is what the file holds, in the rank that has it. How many."""
    checked: set[Path] = set()
    for rank, held in enumerate(weights):
        share = checkpoint.share(rank, len(weights))
        for param in share.params:
            last = share.pieces(param)[-1]
            if last.file in checked or param.dequantized or param.name not in held:
                continue
            checked.add(last.file)
            found = held[param.name].view(len(param.sources), -1)[-1].cpu().view(torch.uint8)
            if not torch.equal(found, torch.frombuffer(_bytes_of(last), dtype=torch.uint8)):
                raise SystemExit(f"{param.name} of rank {rank} is not what {last.file} holds")
    return len(checked)


def read_rate(files: Sequence[Path], threads: int) -> float:
    """Bytes a second from the page cache into a buffer of each thread."""
    parts = [(file, at) for file in files for at in range(0, file.stat().st_size, STAGE_BYTES)]

    def read(index: int) -> int:
        buffer, done = bytearray(STAGE_BYTES), 0
        for file, at in parts[index::threads]:
            with file.open("rb", buffering=0) as opened:
                done += os.preadv(opened.fileno(), [buffer], at)
        return done

    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        done = sum(pool.map(read, range(threads)))
        return done / (time.perf_counter() - began)


def copy_rate(repeats: int = 400) -> float:
    """Bytes a second from pinned memory to the first GPU."""
    source = torch.empty(STAGE_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(STAGE_BYTES, dtype=torch.uint8, device="cuda:0")
    times = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    target.copy_(source, non_blocking=True)
    times[0].record()
    for _ in range(repeats):
        target.copy_(source, non_blocking=True)
    times[1].record()
    torch.cuda.synchronize()
    return repeats * STAGE_BYTES / (times[0].elapsed_time(times[1]) / 1e3)


def measure(folder: Path, device: str, rounds: int) -> list[dict[str, Any]]:
    """One line a world size: its rates in all rounds, interleaved."""
    opened = []
    rates: dict[int, list[float]] = {1: [], NODE_RANKS: []}
    amounts: dict[int, float] = {}
    for _ in range(rounds):
        began = time.perf_counter()
        checkpoint = Checkpoint(folder, models.load_spec(folder))
        opened.append(time.perf_counter() - began)
        for world_size, found in rates.items():
            seconds, amounts[world_size], weights = load(checkpoint, world_size, device)
            found.append(amounts[world_size] / seconds / 1e9)
            files = check(checkpoint, weights)
            print(
                f"{world_size} rank(s): {amounts[world_size] / 1e9:.2f} GB, {found[-1]:.2f} GB/s; {files} files checked"
            )
            del weights
            if device == "cuda":
                torch.cuda.empty_cache()
    return [
        {
            "ranks": world_size,
            "gb": amounts[world_size] / 1e9,
            "gb_s": statistics.median(found),
            "gb_s_rounds": found,
            "headers_s": statistics.median(opened),
        }
        for world_size, found in rates.items()
    ]


def goals(lines: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The figures that stand beside P6."""
    made = {}
    for line in lines:
        method = f"perf/bench_load.py: {line['gb']:.1f} GB out of the page cache, {line['ranks']} rank(s), one GPU"
        name = "load_one_rank" if line["ranks"] == 1 else "load_eight_ranks"
        made[name] = results.goal_line(round(line["gb_s"], 2), "GB/s", "beside P6", args, method=method)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line a load, then the table; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=16.0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--folder", type=Path, help="on a disk with --gb free; default: the system's temporary folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=json.loads, default={}, help="JSON: other values of config.json, for a test")
    results.add_arguments(parser)
    args = results.parse(parser, argv)
    if args.device == "cuda":
        results.require_gpu()
    with tempfile.TemporaryDirectory(prefix="nmoe-load-", dir=args.folder) as folder:
        files = hub_files(write_checkpoint(Path(folder), args.gb, args.sizes))
        read_rate(files, NUM_READERS)  # fills the page cache where writing has not
        copies = {"read_gb_s": read_rate(files, NUM_READERS) / 1e9}
        if args.device == "cuda":
            copies["to_device_gb_s"] = copy_rate() / 1e9
        print(f"{NUM_READERS} threads: {copies}", flush=True)
        lines = measure(Path(folder), args.device, args.rounds)
    for line in lines:
        took = f"{line['gb_s']:.2f} GB/s of {line['gb']:.2f} GB, headers {line['headers_s']:.2f} s"
        print(f"{line['ranks']} rank(s): {took}")
    made = results.document(
        "load", args, method=__doc__ or "", results=[{**line, **copies} for line in lines], goals=goals(lines, args)
    )
    results.write(made, args)
    return 0


def _num_bytes(tensor: tuple[str, str, tuple[int, ...]]) -> int:
    return math.prod(tensor[2]) * DTYPE_BYTES[tensor[1]]


def _write_file(path: Path, tensors: Sequence[tuple[str, str, tuple[int, ...]]], pool: Tensor, seed: int) -> None:
    bytes_of_pool = pool.numpy().data
    with path.open("wb") as file:
        file.write(encode_header({name: (dtype, shape) for name, dtype, shape in tensors}))
        for index, tensor in enumerate(tensors):
            left, at = _num_bytes(tensor), (seed * 7919 + index * 104729) % POOL_BYTES
            while left:
                left -= file.write(bytes_of_pool[at : at + left])
                at = 0


def _bytes_of(info: TensorInfo) -> bytearray:
    with info.file.open("rb") as file:
        file.seek(info.begin)
        return bytearray(file.read(info.num_bytes))


if __name__ == "__main__":
    sys.exit(main())
