"""The doctor's checks of the host: Python, packages, server, ports, shared memory, write access."""

from __future__ import annotations

import importlib.metadata
import os
import socket
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from nmoe_backend import tritonserver
from nmoe_backend.config import Device, ServeConfig
from nmoe_backend.findings import Finding, fail, fail_from, ok, warn
from nmoe_backend.types import ConfigError

MEASURED: Mapping[str, str] = {"torch": "2.11", "triton": "3.6"}  # the versions under which figures were taken
_NEEDED = ("safetensors", "tokenizers", "jinja2")
_SHM_NEEDED = 64 * 2**20  # the Python backend's regions of four models, before they grow
_SHM_COMFORTABLE = 256 * 2**20
MB = 2**20
ANY_PORT = 0  # the system picks a free one


def package_versions() -> dict[str, str | None]:
    """Installed versions, None where absent; read from metadata, nothing is imported."""
    versions: dict[str, str | None] = {}
    for name in ("numpy", "torch", "triton", *_NEEDED):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def check_python(version: tuple[int, ...]) -> Finding:
    """3.11 or 3.12: what the locks are tested with."""
    text = ".".join(map(str, version))
    if tuple(version) in ((3, 11), (3, 12)):
        return ok("python", text)
    return fail("python", f"{text}, needs 3.11 or 3.12", "Run with python3.11 or python3.12; scripts/serve picks one.")


def check_packages(versions: Mapping[str, str | None], device: Device) -> list[Finding]:
    """NumPy below 2 for the stub; torch, and on a GPU the measured torch and triton; the rest present."""
    findings = [_check_numpy(versions["numpy"])]
    if versions["torch"] is None:
        findings.append(fail("torch", "is not installed", _lock(device)))
    elif device == "cpu":
        findings.append(ok("torch", versions["torch"]))
    else:
        findings += [_check_measured(name, versions[name]) for name in MEASURED]
    missing = [name for name in _NEEDED if versions[name] is None]
    if missing:
        findings.append(fail("packages", f"missing: {', '.join(missing)}", _lock(device)))
    return findings


def _check_numpy(version: str | None) -> Finding:
    if version is None:
        return fail("numpy", "is not installed", "pip install 'numpy<2'")
    if int(version.split(".")[0]) >= 2:
        return fail(
            "numpy",
            f"{version}, needs < 2: Triton's Python backend was compiled against NumPy 1, with 2 tensors arrive empty",
            "pip install 'numpy<2'",
        )
    return ok("numpy", version)


def _check_measured(name: str, version: str | None) -> Finding:
    measured = MEASURED[name]
    if version is None:
        return fail(name, "is not installed, and device is cuda", _lock("cuda"))
    if version == measured or version.startswith(f"{measured}."):
        return ok(name, version)
    return warn(
        name,
        f"{version}; measured with {measured}",
        f"Expect other figures, or {_lock('cuda')[0].lower()}{_lock('cuda')[1:]}",
    )


def _lock(device: Device) -> str:
    return f"Install the lock: pip install -r requirements/{'gpu' if device == 'cuda' else 'cpu'}.lock"


def check_server(cache: Path) -> Finding:
    """A tritonserver exists and, from the wheel, is prepared for this Python."""
    try:
        server = tritonserver.find_server(cache)
    except ConfigError as error:
        return fail_from("tritonserver", error)
    return ok("tritonserver", server.description)


def port_is_free(host: str, port: int) -> bool:
    """Whether we could listen there now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def check_ports(config: ServeConfig, is_free: Callable[[str, int], bool]) -> list[Finding]:
    """Every port that `nmoe serve` opens must be free: the server's three, and the front end's where there is one."""
    if not is_free(config.host, ANY_PORT):
        remedy = "Set host to an address of this machine: 127.0.0.1, or 0.0.0.0 for all of them (--host)."
        return [fail("host", f"cannot listen on any port of {config.host!r}", remedy)]
    ports = {"http_port": config.http_port, "grpc_port": config.grpc_port, "metrics_port": config.metrics_port}
    if config.openai.workers:
        ports["openai_port"] = config.openai_port
    taken = {name: port for name, port in ports.items() if not is_free(config.host, port)}
    findings = [
        fail(
            name,
            f"cannot listen on {config.host}:{port}",
            f"Stop what listens there (ss -ltnp 'sport = :{port}'), or choose another (--{name.replace('_', '-')} N).",
        )
        for name, port in taken.items()
    ]
    if not findings:
        findings.append(ok("ports", f"{', '.join(map(str, ports.values()))} on {config.host} are free"))
    return findings


def shared_memory_bytes() -> tuple[int, int] | None:
    """(size, free) of /dev/shm; None where it does not exist."""
    try:
        stat = os.statvfs("/dev/shm")
    except OSError:
        return None
    return stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize


def check_shared_memory(size_free: tuple[int, int] | None) -> Finding:
    """The Python backend moves every tensor through /dev/shm."""
    remedy = (
        "In a container: docker run --shm-size=1g. Elsewhere: mount -o remount,size=1G /dev/shm, or delete stale files."
    )
    if size_free is None:
        return fail("shm", "/dev/shm does not exist, and the Python backend needs it", remedy)
    size, free = size_free
    text = f"/dev/shm: {free // MB} MB free of {size // MB} MB"
    if free < _SHM_NEEDED:
        return fail("shm", f"{text}, needs {_SHM_NEEDED // MB} MB", remedy)
    if free < _SHM_COMFORTABLE:
        return warn("shm", f"{text}; many concurrent requests need more than that", remedy)
    return ok("shm", text)


def check_writable(folder: Path) -> Finding:
    """Compiled kernels and the prepared server are kept there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        remedy = "Set torch_extensions_dir in the TOML to a folder that you may write."
        return fail("kernel_cache", f"cannot write {folder}: {error.strerror}", remedy)
    return ok("kernel_cache", f"{folder} is writable")
