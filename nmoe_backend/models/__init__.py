"""Model families: the architecture table, and the two questions that the rest of the project asks it.

The only place where an architecture's name selects code. Torch-free: the converter uses it too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from nmoe_backend.generation import read_model_config
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
    config, path = read_model_config(model_path), model_path / "config.json"
    architectures = config.get("architectures")
    known = [name for name in architectures or () if name in FAMILIES] if isinstance(architectures, list) else []
    if not known:
        raise ConfigError(f"{path} names architectures {architectures!r}; known are {', '.join(sorted(FAMILIES))}.")
    return FAMILIES[known[0]].spec_from_config(config)


def parameters(spec: ModelSpec, rank: int, world_size: int) -> list[ParamSpec]:
    """Every tensor that `rank` of `world_size` holds. Raises ConfigError when the ranks cannot share the experts."""
    return FAMILIES[spec.architecture].parameters(spec, rank, world_size)
