"""How long a start takes and of what: the engine's, with and without compiled kernels, and captures by eight rank
threads. What weights cost is bench_load.py's.

Each function is called in a process of its own: a start leaves memory, threads and compiled kernels behind.
"""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from nmoe_backend.config import ServeConfig

STAGE = re.compile(r"(?:replica \d+: )?(.+?): ([0-9.]+) s(?:, .*)?")  # warmup.py's lines
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


def stages(lines: list[str]) -> dict[str, float]:
    """Seconds of each stage, from a start's progress lines."""
    found = (STAGE.fullmatch(line.strip()) for line in lines)
    return {match[1]: float(match[2]) for match in found if match is not None}


def start_engine(config_path: Path, kernel_cache: Path | None) -> dict[str, Any]:
    """Seconds of warmup.start, in all and by stage. `kernel_cache`: where compiled kernels are kept instead."""
    if kernel_cache is not None:
        os.environ["TRITON_CACHE_DIR"] = str(kernel_cache)
    lines: list[str] = []
    began = time.monotonic()
    from nmoe_backend import warmup

    imported_s = time.monotonic() - began
    warmup.start(ServeConfig.from_toml(config_path), lines.append).close()
    return {"total_s": round(time.monotonic() - began, 2), "import_s": round(imported_s, 2), "stages_s": stages(lines)}


def write_narrow_model(folder: Path, source: Path) -> Path:
    """config.json of NARROW's widths."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text()) | NARROW
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def capture(config_path: Path) -> dict[str, Any]:
    """Seconds in which all ranks of a replica capture their graphs, each from its own thread.

    Virtual ranks capture nothing in service, because their graphs could not run: a kernel that spins on a peer would
    keep it from running. A capture runs no kernel, so here they do. Ranks that share a device must not wait for it
    while another one captures, so they also meet before.
    """
    from nmoe_backend import models, warmup
    from nmoe_backend.parallel.ranks import RankContext
    from nmoe_backend.runtime import graphs, sampler_kernels, step_graphs

    def meet_first(context: RankContext, *args: Any) -> Any:
        context.meet()
        return graphs.capture(context, *args)

    lines: list[str] = []
    config = ServeConfig.from_toml(config_path)
    spec = models.load_spec(config.model_path)
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(RankContext, "has_own_device", True))
        for module in (step_graphs, sampler_kernels):
            patches.enter_context(mock.patch.object(module, "capture", meet_first))
        workers, _ = warmup.build_workers(config, config.replicas[0], spec, lines.append)
    for worker in workers:
        worker.close()
    return {"ranks": len(workers), "layers": len(spec.layers), "stages_s": stages(lines)}
