"""`nmoe bench`: the GPU benchmarks. They are part of the source tree (perf/) and not of the installed package, because
they use the tests' helpers and other libraries' kernels; this finds them beside it and hands the command over."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from nmoe_backend.types import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """perf/suite.py's exit code. ConfigError where there is no source tree."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "perf" / "suite.py").exists():
        raise ConfigError(
            f"{root} is not a source tree of nmoe: it has no perf/suite.py, and the benchmarks are not in the "
            "installed package. Run it from a checkout (scripts/_setup gpu test, then .venv/bin/nmoe bench)."
        )
    sys.path.insert(0, str(root))
    try:
        suite = importlib.import_module("perf.suite")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the benchmarks need {error.name}, which is not in {sys.prefix}. Run: scripts/_setup gpu test"
        ) from error
    return int(suite.main(argv))
