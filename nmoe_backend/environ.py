"""The only module that reads the process environment: debug switches, the name of the TOML, CUDA's settings, and a
child's environment.

Nothing here changes results. Every function takes the environment as an argument so that a test passes its own; the
default is the process's, read at the call. Callers parse once, at load, and hand the values on.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nmoe_backend.types import ConfigError

CONFIG_VARIABLE = "NMOE_CONFIG"
API_KEYS_VARIABLE = "NMOE_API_KEYS"
_DEBUG_VARIABLES = ("NMOE_DEBUG_SYNC", "NMOE_DEBUG_FINITE", "NMOE_LOG_LEVEL")
_LOG_LEVELS = ("debug", "info", "warning", "error")
_BOOLEANS = {"": False, "0": False, "false": False, "1": True, "true": True}


@dataclass(frozen=True, kw_only=True, slots=True)
class DebugSwitches:
    """What somebody who looks for a bug turns on; slower, with the same results."""

    debug_sync: bool = False  # NMOE_DEBUG_SYNC: synchronise after every operation, so that an error names its culprit
    debug_finite: bool = False  # NMOE_DEBUG_FINITE: a NaN or Inf after a layer is an error that names the layer
    log_level: str = "info"  # NMOE_LOG_LEVEL


def process_environment() -> Mapping[str, str]:
    """The environment of this process, as a copy."""
    return dict(os.environ)


def debug_switches(environment: Mapping[str, str] | None = None) -> DebugSwitches:
    """Parse NMOE_DEBUG_* and NMOE_LOG_LEVEL. A value or a debug variable that we do not know is an error."""
    env = process_environment() if environment is None else environment
    for name in env:
        if name.startswith(("NMOE_DEBUG_", "NMOE_LOG_")) and name not in _DEBUG_VARIABLES:
            near = difflib.get_close_matches(name, _DEBUG_VARIABLES, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"environment variable {name} is not known. Did you mean {near}? Known: {', '.join(_DEBUG_VARIABLES)}."
            )
    level = env.get("NMOE_LOG_LEVEL", "info").lower()
    if level not in _LOG_LEVELS:
        raise ConfigError(f"NMOE_LOG_LEVEL={level!r} is not a level. Set one of: {', '.join(_LOG_LEVELS)}.")
    return DebugSwitches(
        debug_sync=_boolean(env, "NMOE_DEBUG_SYNC"), debug_finite=_boolean(env, "NMOE_DEBUG_FINITE"), log_level=level
    )


def config_path(environment: Mapping[str, str] | None = None) -> Path | None:
    """The TOML that NMOE_CONFIG names, or None where it is unset. An empty value or a missing file is an error."""
    env = process_environment() if environment is None else environment
    value = env.get(CONFIG_VARIABLE)
    if value is None:
        return None
    path = Path(value)
    if not value or not path.is_file():
        raise ConfigError(
            f"{CONFIG_VARIABLE}={value!r} is not a file. "
            "Set it to the path of a TOML such as configs/tiny.toml, or unset it."
        )
    return path.resolve()


def api_keys(environment: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The keys in NMOE_API_KEYS, separated by commas; none where it is unset. A variable without a key is an error."""
    env = process_environment() if environment is None else environment
    value = env.get(API_KEYS_VARIABLE)
    if value is None:
        return ()
    keys = tuple(key for key in (part.strip() for part in value.split(",")) if key)
    if not keys:
        raise ConfigError(f"{API_KEYS_VARIABLE} is set but holds no key. Set it to key1,key2 or unset it.")
    return keys


def export(name: str, value: str) -> None:
    """Set a variable of this process and of the children that it will start."""
    os.environ[name] = value


def cuda_settings(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables that a process needs before it starts CUDA, where ranks on several GPUs write to each other and wait
    for each other. Settings of the user's that rule this out are an error."""
    env = process_environment() if environment is None else environment
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if "expandable_segments:true" in env.get(name, "").replace(" ", "").lower():
            raise ConfigError(
                f"{name}={env[name]!r} asks for expandable segments, and ranks need memory that peers can map: plain "
                "allocations. Take expandable_segments:True out of it."
            )
    loading = env.get("CUDA_MODULE_LOADING", "EAGER")
    if loading.upper() != "EAGER":
        raise ConfigError(
            f"CUDA_MODULE_LOADING={loading!r}: a kernel that is loaded at its first launch may wait for a peer's, "
            "which waits for it. Set it to EAGER, or unset it."
        )
    return {"CUDA_MODULE_LOADING": "EAGER"}


def kernel_cache(folder: Path, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Where Triton-lang keeps compiled kernels, so that only the first start compiles. A folder of the user's stays."""
    env = process_environment() if environment is None else environment
    return {} if env.get("TRITON_CACHE_DIR") else {"TRITON_CACHE_DIR": str(folder / "kernels")}


def cache_dir(environment: Mapping[str, str] | None = None) -> Path:
    """Where compiled kernels and prepared server folders live by default: $XDG_CACHE_HOME/nmoe or ~/.cache/nmoe."""
    env = process_environment() if environment is None else environment
    if base := env.get("XDG_CACHE_HOME"):
        return Path(base) / "nmoe"
    home = env.get("HOME")
    return (Path(home) if home else Path.home()) / ".cache" / "nmoe"


def child_environment(
    values: Mapping[str, str], prepend: Mapping[str, str], environment: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The environment of a child process: this one, `values` set, and `prepend` put in front of ':'-separated paths."""
    child = dict(process_environment() if environment is None else environment)
    child.update(values)
    for name, front in prepend.items():
        rest = child.get(name, "")
        child[name] = f"{front}:{rest}" if rest else front
    return child


def _boolean(env: Mapping[str, str], name: str) -> bool:
    value = env.get(name, "")
    if value.lower() not in _BOOLEANS:
        raise ConfigError(f"{name}={value!r} is neither on nor off. Set it to 1 or 0, or unset it.")
    return _BOOLEANS[value.lower()]
