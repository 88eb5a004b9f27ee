"""The debug switches of environ.py, as a wrapped table of operations: a normal start carries no check at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from nmoe_backend.environ import DebugSwitches
from nmoe_backend.layers.ops import Ops
from nmoe_backend.types import RankError

NO_CHECKS = DebugSwitches()


def with_checks(ops: Ops, switches: DebugSwitches) -> Ops:
    """`ops` itself, or with each operation followed by what the switches ask for: a synchronisation (so that a device
    error names its operation) and a look for NaN and Inf in what it returns."""
    if not (switches.debug_sync or switches.debug_finite):
        return ops
    return replace(_wrap_all(ops, switches), rdep=_wrap_all(ops.rdep, switches))


def _wrap_all(table: Any, switches: DebugSwitches) -> Any:
    wrapped = {f.name: _wrap(f.name, getattr(table, f.name), switches) for f in fields(table) if f.name != "rdep"}
    return replace(table, **wrapped)


def _wrap(name: str, operation: Callable[..., Any], switches: DebugSwitches) -> Callable[..., Any]:
    def checked(*args: Any) -> Any:
        result = operation(*args)
        if switches.debug_sync and torch.cuda.is_available():
            torch.cuda.synchronize()
        if switches.debug_finite:
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                    shapes = [tuple(arg.shape) for arg in args if isinstance(arg, Tensor)]
                    raise RankError(
                        f"{name} returned NaN or Inf in a tensor {tuple(tensor.shape)} {tensor.dtype}, from inputs "
                        f"{shapes}. Check the weights, then the operation."
                    )
        return result

    return checked
