"""How long a start takes and of what: the engine's, with and without compiled kernels; captures by eight rank threads;
weights from files.

Each function is called in a process of its own: a start leaves memory, threads and compiled kernels behind.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from nmoe_backend.config import ServeConfig
from nmoe_backend.safetensors_header import DTYPE_BYTES, encode_header

STAGE = re.compile(r"(?:replica \d+: )?(.+): ([0-9.]+) s$")  # warmup.py's lines
CAPTURE_RANKS = 8
# DeepSeek's head geometry and number of layers in a width that fits eight times on one GPU: what a capture costs the
# host is its launches, which are the same.
NARROW = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "q_lora_rank": 512,
    "n_routed_experts": 64,
    "vocab_size": 4096,
}
# Full-size layers, few enough for a file set of about 17 GB.
TWO_LAYERS = {
    "num_hidden_layers": 2,
    "first_k_dense_replace": 0,
    "n_routed_experts": 192,
    "num_nextn_predict_layers": 0,
}
POOL_BYTES = 64 << 20


def stages(lines: list[str]) -> dict[str, float]:
    """Seconds of each stage, from a start's progress lines."""
    found = (STAGE.fullmatch(line.strip()) for line in lines)
    return {match[1]: float(match[2]) for match in found if match is not None}


def start_engine(config: ServeConfig, kernel_cache: Path | None) -> dict[str, Any]:
    """Seconds of warmup.start, in all and by stage. `kernel_cache`: where compiled kernels are kept instead."""
    if kernel_cache is not None:
        os.environ["TRITON_CACHE_DIR"] = str(kernel_cache)
    lines: list[str] = []
    began = time.monotonic()
    from nmoe_backend import warmup

    imported_s = time.monotonic() - began
    warmup.start(config, lines.append).close()
    return {"total_s": round(time.monotonic() - began, 2), "import_s": round(imported_s, 2), "stages_s": stages(lines)}


def write_narrow_model(folder: Path, source: Path) -> Path:
    """config.json of NARROW's widths."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text()) | NARROW
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def capture(config: ServeConfig) -> dict[str, Any]:
    """Seconds in which all ranks of a replica capture their graphs, each from its own thread.

    Virtual ranks capture nothing in service, because their graphs could not run: a kernel that spins on a peer would
    keep it from running. A capture runs no kernel, so here they do.
    """
    from nmoe_backend import models, warmup
    from nmoe_backend.parallel.ranks import RankContext

    lines: list[str] = []
    spec = models.load_spec(config.model_path)
    with mock.patch.object(RankContext, "has_own_device", True):
        workers, _ = warmup.build_workers(config, config.replicas[0], spec, lines.append)
    num_graphs = sum(" rows" in line or " tokens" in line for line in lines)
    for worker in workers:
        worker.close()
    return {"ranks": len(workers), "graphs_a_rank": num_graphs, "layers": len(spec.layers), "stages_s": stages(lines)}


def write_checkpoint(folder: Path, source: Path, num_files: int = 4) -> int:
    """A checkpoint in the hub's form of TWO_LAYERS of the model in `source`; its bytes. Values are random bytes below
    e4m3's NaN, the same 64 MB again and again."""
    from nmoe_backend import models
    from nmoe_backend.models.checkpoint import scale_name, source_shape

    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text()) | TWO_LAYERS
    (folder / "config.json").write_text(json.dumps(config))
    params = models.parameters(models.load_spec(folder), 0, 1)
    names = {param.name for param in params}
    scales = {scale_name(param.name) for param in params} & names
    files: list[dict[str, tuple[str, tuple[int, ...]]]] = [{} for _ in range(num_files)]
    sizes = [0] * num_files
    for param in params:
        kind = (
            "F8_E4M3" if scale_name(param.name) in names else "F32" if param.name in scales or param.float32 else "BF16"
        )
        for name in param.sources:
            smallest = sizes.index(min(sizes))
            files[smallest][name] = kind, tuple(source_shape(param))
            sizes[smallest] += math.prod(source_shape(param)) * DTYPE_BYTES[kind]
    pool = bytes(byte & 0x3F for byte in random.Random(0).randbytes(1 << 20)) * (POOL_BYTES >> 20)
    weight_map = {}
    for index, tensors in enumerate(files):
        name = f"model-{index + 1:05d}-of-{num_files:05d}.safetensors"
        weight_map.update(dict.fromkeys(tensors, name))
        with (folder / name).open("wb") as file:
            file.write(encode_header(tensors))
            for size in _pieces(sizes[index], len(pool)):
                file.write(pool[:size])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(sizes)


def _pieces(total: int, most: int) -> Iterator[int]:
    while total:
        yield min(total, most)
        total -= min(total, most)


def load_weights(folder: Path, device: str) -> dict[str, Any]:
    """Seconds and GB/s of one rank that holds all of the checkpoint; the files are in the page cache, just written."""
    import torch

    from nmoe_backend import models
    from nmoe_backend.runtime.weights import load_rank_weights

    spec = models.load_spec(folder)
    torch.zeros(1, device=device)
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    _read_all(folder)
    began = time.monotonic()
    load_rank_weights(folder, spec, rank=0, world_size=1, device=device, dtype=torch.bfloat16, keep_quantized=True)
    if device != "cpu":
        torch.cuda.synchronize()
    took_s = time.monotonic() - began
    return {"gb": round(num_bytes / 1e9, 2), "seconds": round(took_s, 2), "gb_s": round(num_bytes / 1e9 / took_s, 2)}


def _read_all(folder: Path) -> None:
    """Every byte once, so that none comes from a disk later."""
    buffer = bytearray(POOL_BYTES)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
