"""Where a real tritonserver is, and the command that starts it with our model repository.

Two sources, in this order: `tritonserver` on PATH (NVIDIA's container), or the `nvidia-pytriton` wheel beside the
running Python. The wheel is not runnable as it lies: its Python backend lacks the stub of the running version, and run
bits may be missing. So a runnable copy (23 MB) is prepared once in the cache folder, complete or not there at all: it
is built aside and renamed, which also makes two starts at the same time safe.

The stub ignores PYTHONPATH and runs the `python3` that stands first on PATH; that one must be the running Python, with
NumPy below 2, because the stub was compiled against NumPy 1. The server's own libraries and libpython come from
LD_LIBRARY_PATH.
"""

from __future__ import annotations

import ctypes.util
import hashlib
import importlib.metadata
import importlib.util
import math
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nmoe_backend import environ
from nmoe_backend.config import ServeConfig
from nmoe_backend.types import ConfigError

_INSTALL = (
    "Run scripts/serve, which installs it (pip install nvidia-pytriton==0.7.0), or use NVIDIA's Triton container."
)
_FINALIZE_S = 15  # beyond drain_s, at which `nmoe serve` cuts off what still runs: at its own limit this server crashes
_STUB = "triton_python_backend_stub"
_BACKEND_FILES = ("libtriton_python.so", "triton_python_backend_utils.py")


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """A tritonserver that can be started."""

    binary: Path
    backends: Path
    library_dirs: tuple[Path, ...]  # for LD_LIBRARY_PATH, in order; empty where the loader needs no help
    description: str


def python_tag() -> str:
    """`3.11`: names the stub."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def find_server(cache: Path, environment: Mapping[str, str] | None = None) -> Server:
    """The server to use, prepared under `cache` where it comes from the wheel. ConfigError if there is none."""
    env = environ.process_environment() if environment is None else environment
    on_path = shutil.which("tritonserver", path=env.get("PATH", ""))
    if on_path is not None:
        return _installed(Path(on_path).resolve())
    return _from_wheel(cache)


def server_command(
    config: ServeConfig, repository: Path, extra_flags: Sequence[str], shm_prefix: str
) -> tuple[list[str], dict[str, str]]:
    """The argv and the environment of tritonserver. `extra_flags` come last, so that they win."""
    server = find_server(config.torch_extensions_dir)
    argv = [
        str(server.binary),
        f"--model-repository={repository}",
        f"--backend-directory={server.backends}",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
        "--disable-auto-complete-config",  # our config.pbtxt are complete; completing would start every stub twice
        f"--http-address={config.host}",
        f"--http-port={config.http_port}",
        f"--grpc-address={config.host}",
        f"--grpc-port={config.grpc_port}",
        f"--metrics-address={config.host}",
        f"--metrics-port={config.metrics_port}",
        f"--allow-gpu-metrics={'true' if config.device == 'cuda' else 'false'}",
        f"--exit-timeout-secs={math.ceil(config.supervisor.drain_s) + _FINALIZE_S}",
    ]
    if config.device == "cpu":
        argv.append("--pinned-memory-pool-byte-size=0")
    if config.is_traced:
        settings = ("mode=opentelemetry", "level=TIMESTAMPS", "rate=1", "count=-1")
        argv += [f"--trace-config={one}" for one in (*settings, f"opentelemetry,url={config.trace_endpoint}")]
    argv += extra_flags
    values = {environ.CONFIG_VARIABLE: str(config.config_path.absolute())}
    if config.device == "cuda":
        values |= environ.cuda_settings()
    prepend = {"PATH": str(Path(sys.executable).parent)}
    if server.library_dirs:
        prepend["LD_LIBRARY_PATH"] = ":".join(map(str, server.library_dirs))
    return argv, environ.child_environment(values, prepend)


def libpython_dir() -> Path | None:
    """The folder of the shared libpython that the stub is linked to; None where the loader finds it by itself."""
    name = f"libpython{python_tag()}.so.1.0"
    folders = [Path(str(sysconfig.get_config_var("LIBDIR"))), Path(sys.base_prefix) / "lib"]
    for folder in folders:
        if (folder / name).exists():
            return folder
    if ctypes.util.find_library(f"python{python_tag()}") is not None:
        return None
    raise ConfigError(
        f"the shared library {name} is not installed (looked in {', '.join(map(str, folders))} and in the loader's "
        f"cache), and Triton's Python backend is linked to it. Run: apt-get install libpython{python_tag()}"
    )


def _installed(binary: Path) -> Server:
    """NVIDIA's layout: <root>/bin/tritonserver and <root>/backends."""
    backends = binary.parent.parent / "backends"
    if not (backends / "python" / "libtriton_python.so").exists():
        raise ConfigError(
            f"{binary} has no Python backend at {backends / 'python'}. Use an image with it (NVIDIA's, tag *-py3), "
            "or take this tritonserver off PATH to use the nvidia-pytriton wheel."
        )
    return Server(binary=binary, backends=backends, library_dirs=(), description=f"{binary}")


def _from_wheel(cache: Path) -> Server:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ConfigError(f"no tritonserver on PATH and no nvidia-pytriton in {sys.prefix}. {_INSTALL}")
    site = Path(spec.origin).parent.parent
    source = site / "pytriton" / "tritonserver"
    version = importlib.metadata.version("nvidia-pytriton")
    libpython = libpython_dir()
    root = _prepare(source, cache / "tritonserver", version)
    library_dirs = (site / "nvidia_pytriton.libs", *((libpython,) if libpython else ()))
    return Server(
        binary=root / "bin" / "tritonserver",
        backends=root / "backends",
        library_dirs=library_dirs,
        description=f"nvidia-pytriton {version}",
    )


def _prepare(source: Path, parent: Path, version: str) -> Path:
    """A runnable copy of the wheel's server. Returns the folder; a finished one is taken as it is."""
    key = hashlib.sha256(str(source).encode()).hexdigest()[:8]
    target = parent / f"{version}-py{python_tag()}-{key}"
    if target.is_dir():
        return target
    stub = source / "python_backend_stubs" / python_tag() / _STUB
    if not stub.exists():
        raise ConfigError(f"nvidia-pytriton {version} has no stub for Python {python_tag()}. Use Python 3.11 or 3.12.")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".preparing-", dir=parent))
    except OSError as error:
        raise ConfigError(
            f"cannot write {parent}: {error.strerror}. Set torch_extensions_dir to a folder that you may write."
        ) from error
    try:
        _copy(source, stub, work)
    except OSError as error:
        shutil.rmtree(work)
        raise ConfigError(
            f"cannot write {parent}: {error.strerror}. Free 25 MB there, or set torch_extensions_dir to another folder."
        ) from error
    try:
        work.rename(target)
    except OSError:
        # somebody else was faster; theirs is the same
        shutil.rmtree(work)
        if not target.is_dir():
            raise
    return target


def _copy(source: Path, stub: Path, work: Path) -> None:
    python_backend = work / "backends" / "python"
    python_backend.mkdir(parents=True)
    (work / "bin").mkdir()
    for name in _BACKEND_FILES:
        shutil.copyfile(source / "backends" / "python" / name, python_backend / name)
    for origin, copy in (
        (stub, python_backend / _STUB),
        (source / "bin" / "tritonserver", work / "bin" / "tritonserver"),
    ):
        shutil.copyfile(origin, copy)
        copy.chmod(0o755)
    work.chmod(0o755)
