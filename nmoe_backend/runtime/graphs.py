"""Capturing CUDA graphs on ranks that are threads of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from nmoe_backend.parallel.ranks import RankContext

Result = TypeVar("Result")


def capture(
    context: RankContext, run: Callable[[], Result], before: torch.cuda.CUDAGraph | None = None
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of what `run` launches on this rank's stream, and what it returned. All ranks of the group call it
    together, inside `activate`, behind a run of the same that has compiled and loaded every kernel. `before`: a graph
    whose memory this one uses again, because the two never run at the same time and are read before the next replay.

    Not `torch.cuda.graph`: that one empties the allocators of all devices first, while another rank may be capturing.
    """
    graph = torch.cuda.CUDAGraph()
    # Other ranks' threads allocate and copy meanwhile: only this thread's calls are held to a capture's rules.
    graph.capture_begin(pool=None if before is None else before.pool(), capture_error_mode="thread_local")
    try:
        result = run()
    finally:
        graph.capture_end()
    context.meet()  # a rank that went on would synchronise with this device, which ends a capture with an error
    return graph, result
