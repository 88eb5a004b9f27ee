"""Triton's perf_analyzer, out of tritonclient's wheel, with the libraries that it needs. The arguments are its own:

    .venv/bin/python -m perf.perf_analyzer -m deepseek_v3 -u localhost:8001 -i grpc --streaming --async \\
      --input-data perf/perf_analyzer_input.json --concurrency-range 1:16:5 --measurement-mode count_windows \\
      --measurement-request-count 96 --stability-percentage 50 -f sweep.csv

The input's conversations are for the tiny model; `python -m perf.lengths` writes it, for other sizes too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from nmoe_backend import environ
from nmoe_backend.tritonserver import find_server

INPUT = Path(__file__).parent / "perf_analyzer_input.json"
PROGRAM = Path(sys.executable).parent / "perf_analyzer"
_LIBRARIES = (("libb64-*.so.0d", "libb64.so.0d"), ("libcudart-*.so.12.*", "libcudart.so.12"))


def environment(cache: Path) -> dict[str, str]:
    """This process's, with libraries: links below `cache` give those of pytriton's wheel Debian's names."""
    links = cache / "perf_analyzer"
    links.mkdir(parents=True, exist_ok=True)
    library_dirs = find_server(cache).library_dirs
    for pattern, name in _LIBRARIES:
        for found in (found for library_dir in library_dirs for found in library_dir.glob(pattern)):
            (links / name).unlink(missing_ok=True)
            (links / name).symlink_to(found)
    prepend = {"LD_LIBRARY_PATH": ":".join(map(str, (links, *library_dirs))), "PATH": str(PROGRAM.parent)}
    return environ.child_environment({}, prepend)


def main(argv: Sequence[str]) -> None:
    """Becomes perf_analyzer."""
    os.execve(PROGRAM, [str(PROGRAM), *argv], environment(environ.cache_dir(environ.process_environment())))


if __name__ == "__main__":
    main(sys.argv[1:])
