"""A real HAProxy with configs/deploy/haproxy.cfg over replicas on loopback."""

from __future__ import annotations

import csv
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

from nmoe_backend.server_process import ChildProcess
from tests.deploy.manifests import ROOT
from tests.front_end import FrontEnd
from tests.triton_server import TritonServer, free_ports, write_config
from tests.waiting import wait_until

CONFIG = ROOT / "configs" / "deploy" / "haproxy.cfg"
SERVERS = ("l1", "l2", "t1", "t2")


class Replica:
    """A Triton over two ranks and its front end, on ports that stay the same from start to start."""

    def __init__(self, name: str, folder: Path, checkpoint: Path) -> None:
        config = write_config(folder / f"{name}.toml", checkpoint, gpus=[0, 1])
        self.triton = TritonServer(config)
        self.front = FrontEnd(config, self.triton.grpc)

    def start(self) -> None:
        """Until it is ready."""
        self.triton.__enter__()
        try:
            self.front.__enter__()
        except BaseException:
            self.triton.process.kill()
            raise

    def kill(self) -> None:
        """As a power cut."""
        self.front.process.kill()
        self.triton.process.kill()

    def drain(self) -> None:
        """As `nmoe serve` does on SIGTERM: the front end first."""
        self.front.process.stop(60.0)
        self.triton.process.stop(60.0)


class Gateway:
    """One HAProxy; a context manager. `replicas`: server name -> replica, running or not."""

    def __init__(self, folder: Path, replicas: Mapping[str, Replica]) -> None:
        openai, grpc, metrics = free_ports(3)
        self.url, self.grpc, self.metrics = f"http://127.0.0.1:{openai}", f"127.0.0.1:{grpc}", f"127.0.0.1:{metrics}"
        self._socket = folder / "haproxy.sock"
        self.lines: list[str] = []
        text = CONFIG.read_text()
        for own, place in ((openai, "bind :9000"), (grpc, "bind :8001"), (metrics, "bind :8405")):
            text = _once(text, place, f"bind 127.0.0.1:{own}")
        text = _once(text, "maxconn 10000", "maxconn 500")  # two file descriptors each
        text = _once(text, "/run/haproxy/nmoe.sock", str(self._socket), count=None)
        for name in SERVERS:
            replica = replicas[name]
            text, changed = re.subn(rf"server {name} [\d.]+:9000", f"server {name} {replica.front.address}", text)
            assert changed == 1, name
            checked = f"server {name} {replica.triton.grpc} port {replica.triton.config.http_port}"
            text, changed = re.subn(rf"server {name} [\d.]+:8001", checked, text)
            assert changed == 1, name
        self._file = folder / "haproxy.cfg"
        self._file.write_text(text)
        self._process: ChildProcess | None = None

    def __enter__(self) -> Gateway:
        self._process = ChildProcess([program(), "-db", "-f", str(self._file)], {"PATH": "/bin"}, self.lines.append)
        wait_until(lambda: self._socket.exists() or self._ended(), "HAProxy has started", 10.0)
        assert not self._ended(), "\n".join(self.lines)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None, "enter first"
        self._process.stop(10.0)

    def _ended(self) -> bool:
        return self._process is not None and self._process.exit_code() is not None

    def command(self, text: str) -> str:
        """What HAProxy's administration socket answers."""
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(str(self._socket))
            control.sendall(f"{text}\n".encode())
            parts = []
            while part := control.recv(65536):
                parts.append(part)
        return b"".join(parts).decode()

    def is_up(self, backend: str, name: str) -> bool:
        """Whether the checks of that server pass and it takes traffic."""
        return self._servers()[backend, name]["status"].startswith("UP")

    def is_idle(self) -> bool:
        """Whether no server has a request, as HAProxy counts them when it balances."""
        return all(server["scur"] == "0" for server in self._servers().values())

    def _servers(self) -> dict[tuple[str, str], dict[str, str]]:
        """(backend, server) -> HAProxy's statistics of it."""
        rows = csv.DictReader(self.command("show stat").removeprefix("# ").splitlines())
        return {(row["pxname"], row["svname"]): row for row in rows if row["svname"] in SERVERS}


def program() -> str:
    """HAProxy, which Debian puts where only root looks."""
    found = shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    assert found is not None, "haproxy is not installed. Run: apt-get install haproxy"
    return found


def check(path: Path) -> str:
    """What HAProxy says about a configuration: warnings too."""
    done = subprocess.run([program(), "-c", "-f", str(path)], capture_output=True, text=True, timeout=30, check=False)
    return done.stdout + done.stderr


def _once(text: str, old: str, new: str, count: int | None = 1) -> str:
    assert old in text and (count is None or text.count(old + " ") + text.count(old + "\n") == count), old
    return text.replace(old, new)
