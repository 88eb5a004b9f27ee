"""`nmoe drain`, and the socket by which a running `nmoe serve` hears of it.

The socket has an abstract name (Linux) made of http_port: no file that could stay behind or be stale, gone with its
process, and in the network namespace that the port is in too. So it works where a PID does not: from a sidecar, or from
a Kubernetes preStop hook. A connection asks for a drain, any number of them for the same one; when all has ended
each gets the exit code. Only the server's own user and root are heard (SO_PEERCRED).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

from nmoe_backend.config import ServeConfig
from nmoe_backend.types import ConfigError

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_BACKLOG = 64
_SLACK_S = 30.0  # beyond drain_s: a model's end, and the kill of what hangs


class ControlSocket:
    """The server's end; a context manager. One thread."""

    def __init__(self, http_port: int) -> None:
        self._waiting: list[socket.socket] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.bind(_name(http_port))
        except OSError as error:
            self._socket.close()
            raise ConfigError(
                f"another `nmoe serve` with http_port={http_port} runs on this host ({error.strerror}). "
                f"Stop it (nmoe drain --http-port {http_port}), or choose another port."
            ) from error
        self._socket.listen(_BACKLOG)
        self._socket.setblocking(False)
        self._code = 1  # unless somebody says else, the end is not a clean one

    def __enter__(self) -> ControlSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self.asks_for_drain()
        for peer in self._waiting:
            with peer, contextlib.suppress(ConnectionError):  # who asked may have gone: `nmoe drain --timeout`
                peer.send(bytes([self._code]))  # one byte into an empty buffer: never blocks
        self._socket.close()

    def asks_for_drain(self) -> bool:
        """Whether anybody asks, or has asked. Does not block."""
        while True:
            try:
                peer, _ = self._socket.accept()
            except BlockingIOError:
                return bool(self._waiting)
            credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            _, uid, _ = _CREDENTIALS.unpack(credentials)
            if uid in (0, os.geteuid()):
                self._waiting.append(peer)
            else:
                peer.close()

    def tell(self, code: int) -> None:
        """The exit code that those who asked will get."""
        self._code = code


def main(argv: Sequence[str] | None = None) -> int:
    """Asks the server to drain and waits until it has. Returns its exit code, 1 where there is no server."""
    parser = argparse.ArgumentParser(
        prog="nmoe drain", description="Let a running `nmoe serve` finish what it has begun, and end it."
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--config", "-c", type=Path, metavar="X.toml", help="of the server")
    target.add_argument("--http-port", type=int, help="of the server, where it is not the TOML's")
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="default: the TOML's drain_s and a little more"
    )
    values = parser.parse_args(argv)
    limit_s, http_port = values.timeout, values.http_port
    if values.config is not None:
        config = ServeConfig.from_toml(values.config)
        http_port = config.http_port
        limit_s = config.supervisor.drain_s + _SLACK_S if limit_s is None else limit_s
    return drain(http_port, limit_s)


def drain(http_port: int, limit_s: float | None) -> int:
    """The client's end. limit_s None: as long as it takes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(limit_s)
        try:
            connection.connect(_name(http_port))
            answer = connection.recv(1)
        except ConnectionRefusedError:
            print(f"nmoe drain: no `nmoe serve` with http_port={http_port} runs on this host.", file=sys.stderr)
            return 1
        except TimeoutError:
            print(f"nmoe drain: the server still runs after {limit_s:g} s.", file=sys.stderr)
            return 1
        except ConnectionResetError:
            answer = b""
    if not answer:
        print("nmoe drain: the server was killed, or you are neither its user nor root.", file=sys.stderr)
        return 1
    print("drained" if answer == b"\0" else "nmoe drain: the server ended by force or with an error")
    return answer[0]


def _name(http_port: int) -> str:
    return f"\0nmoe-serve-{http_port}"
