"""`nmoe api`: the OpenAI front end as processes of its own, in front of a Triton that serves `deepseek_v3`.

One process where `workers` is 1, else uvicorn's supervisor with that many behind one port. SIGTERM drains: no new
connections, running answers get `drain_s`, then what is left is cancelled.
"""

from __future__ import annotations

import argparse
import functools
import gc
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp
from uvicorn.supervisors import Multiprocess

from nmoe_backend import environ
from nmoe_backend.api.app import make_app, wrap
from nmoe_backend.api.metrics import ApiMetrics
from nmoe_backend.api.protocol import BoundedHeadProtocol
from nmoe_backend.api.service import Service, make_service
from nmoe_backend.config import ServeConfig
from nmoe_backend.event_log import JsonFormatter, start_log
from nmoe_backend.http_probe import url_host
from nmoe_backend.types import ConfigError

_KEEP_ALIVE_S = 75  # longer than the minute after which load balancers close an idle connection
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # of prometheus_client: where worker processes share their values


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 after a drain, 1 where it could not start."""
    parser = argparse.ArgumentParser(prog="nmoe api", description="OpenAI's API in front of a Triton.")
    parser.add_argument("--config", "-c", required=True, type=Path, metavar="X.toml")
    parser.add_argument("--triton", metavar="HOST:PORT", help="gRPC of the server; default: this host, grpc_port")
    parser.add_argument("--host", help="instead of the TOML's host")
    parser.add_argument("--openai-port", type=int, help="instead of the TOML's openai_port")
    parser.add_argument("--model-path", help="instead of the TOML's model_path (only its tokenizer and JSON are read)")
    values = parser.parse_args(argv)
    names = ("host", "openai_port", "model_path")
    overrides: dict[str, object] = {name: value for name in names if (value := getattr(values, name)) is not None}
    if values.model_path is not None:  # a path that somebody types is relative to where they stand
        overrides["model_path"] = str(Path(values.model_path).absolute())
    try:
        return serve(values.config, overrides, values.triton)
    except ConfigError as error:
        print(f"nmoe api: {error}", file=sys.stderr)
        return 1


def serve(config_path: Path, overrides: Mapping[str, object], triton: str | None) -> int:
    """Until a signal."""
    config = ServeConfig.from_toml(config_path, overrides)
    address = triton or f"{url_host(config.host)}:{config.grpc_port}"
    workers = max(1, config.openai.workers)
    app = functools.partial(create, config_path.absolute(), overrides, address, int(time.time()))
    settings = uvicorn.Config(
        app, factory=True, http=BoundedHeadProtocol, workers=workers, log_config=_log_config(), access_log=False,
        lifespan="on", timeout_keep_alive=_KEEP_ALIVE_S, timeout_graceful_shutdown=round(config.openai.drain_s),
        server_header=False,
    )  # fmt: skip
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _ignore)  # uvicorn raises the signal again when it has drained: the exit code is 0 then
    with _listen(config) as listener, tempfile.TemporaryDirectory(prefix="nmoe-api-") as folder:
        if workers == 1:
            uvicorn.Server(settings).run([listener])
        else:
            environ.export(METRICS_FOLDER, folder)
            Multiprocess(settings, sockets=[listener]).run()
    return 0


def create(config_path: Path, overrides: Mapping[str, object], triton: str, created: int) -> ASGIApp:
    """The application of one worker process; uvicorn calls it there."""
    config = ServeConfig.from_toml(config_path, overrides)
    folder = environ.process_environment().get(METRICS_FOLDER) if config.openai.workers > 1 else None
    metrics = ApiMetrics(Path(folder) if folder else None)

    @asynccontextmanager
    async def running() -> AsyncIterator[Service]:
        stop_log = start_log(environ.debug_switches().log_level)
        service = make_service(config, triton)
        gc.collect()
        gc.freeze()  # what was loaded stays: a full collection over it would stop every stream for 40 ms
        yield service
        await service.close()
        stop_log()

    return wrap(make_app(running, created, metrics), config.openai, metrics)


def _listen(config: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.openai_port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {config.host}:{config.openai_port}: {error.strerror}. Free the port, or set openai_port."
        ) from error
    listener.set_inheritable(True)
    return listener


def _ignore(_signal: int, _frame: object) -> None:
    pass


def _log_config() -> dict[str, object]:
    """Uvicorn's own words, one line each, on standard output; start_log sees to ours."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"()": JsonFormatter}},
        "handlers": {"out": {"class": "logging.StreamHandler", "formatter": "line", "stream": "ext://sys.stdout"}},
        "loggers": {"uvicorn": {"handlers": ["out"], "level": "WARNING", "propagate": False}},
    }


if __name__ == "__main__":
    sys.exit(main())
