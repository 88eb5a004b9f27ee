"""What each of our Python-backend models does first: print line by line, check NumPy, find the TOML."""

from __future__ import annotations

import faulthandler
import io
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nmoe_backend import environ
from nmoe_backend.config import ServeConfig
from nmoe_backend.types import ConfigError

CONFIG_PARAMETER = "nmoe_config"


def load_config(args: Mapping[str, str], environment: Mapping[str, str] | None = None) -> ServeConfig:
    """The config for a model, from Triton's `initialize` arguments: NMOE_CONFIG, else config.pbtxt's `nmoe_config`.

    A relative path in config.pbtxt is relative to the model's folder.
    """
    print_lines_at_once()
    check_numpy(np.__version__)
    path = environ.config_path(environment)
    if path is None:
        parameters = json.loads(args["model_config"]).get("parameters", {})
        value = parameters.get(CONFIG_PARAMETER, {}).get("string_value", "")
        path = Path(args["model_repository"], value).resolve()
        if not value or not path.is_file():
            raise ConfigError(
                f"{args['model_name']}: {environ.CONFIG_VARIABLE} is not set and parameter {CONFIG_PARAMETER} of "
                f"config.pbtxt is {value!r} ({path}), need the path of a TOML such as configs/tiny.toml. "
                "Set one of them."
            )
    return ServeConfig.from_toml(path)


def print_lines_at_once() -> None:
    """The stub ignores PYTHONUNBUFFERED, and its output is a pipe: progress would come out when the server ends."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)


def end_with_server(poll_s: float = 1.0, limit_s: float = 120.0) -> None:
    """Start a thread that ends this process once its server is gone.

    Without `finalize` the stub may hang for ever then, in C++ with the interpreter's lock, because tensors of ours are
    left in its shared memory: it would hold the GPU.
    Where the thread itself gets no turn for `limit_s`, faulthandler's watchdog, which needs no lock, ends the process.
    (A parent-death signal would come too early: it belongs to the server's thread that started the stub.)
    """
    server = os.getppid()

    def watch() -> None:
        while os.getppid() == server:
            faulthandler.dump_traceback_later(limit_s, exit=True)
            time.sleep(poll_s)
        os._exit(1)

    threading.Thread(target=watch, name="server-watch", daemon=True).start()


def check_numpy(version: str) -> None:
    """The stub was compiled against NumPy 1: under NumPy 2 every tensor arrives empty, and over gRPC nobody notices."""
    if int(version.split(".")[0]) >= 2:
        raise ConfigError(
            f"the Python of Triton's stub has NumPy {version}, needs NumPy 1 (tensors would arrive empty). "
            "Run: pip install 'numpy<2', or start with scripts/serve."
        )
