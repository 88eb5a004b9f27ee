"""Model families: the architecture table, and the two questions that the rest of the project asks it.

The only place where an architecture's name selects code. Torch-free: the doctor and the converter use it too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from nmoe_backend.models import deepseek_v3
from nmoe_backend.models.spec import ModelSpec, ParamSpec
from nmoe_backend.types import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What a family's file provides."""

    spec_from_config: Callable[[Mapping[str, object]], ModelSpec]
    parameters: Callable[[ModelSpec, int, int], list[ParamSpec]]


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        deepseek_v3.ARCHITECTURE: Family(
            spec_from_config=deepseek_v3.spec_from_config, parameters=deepseek_v3.parameters
        ),
    }
)


def load_spec(model_path: Path) -> ModelSpec:
    """ModelSpec of the checkpoint in `model_path`, read from its config.json. Raises ConfigError."""
    path = Path(model_path) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}. model_path must name a checkpoint folder.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); fetch the checkpoint again.") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds a {type(config).__name__}; it must be a JSON object.")
    architectures = config.get("architectures")
    known = [name for name in architectures or () if name in FAMILIES] if isinstance(architectures, list) else []
    if not known:
        raise ConfigError(f"{path} names architectures {architectures!r}; known are {', '.join(sorted(FAMILIES))}.")
    return FAMILIES[known[0]].spec_from_config(config)


def parameters(spec: ModelSpec, rank: int, world_size: int) -> list[ParamSpec]:
    """Every tensor that `rank` of `world_size` holds. Raises ConfigError when the ranks cannot share the experts."""
    return FAMILIES[spec.architecture].parameters(spec, rank, world_size)
