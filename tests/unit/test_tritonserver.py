"""A server is found on PATH or in the wheel, prepared once, and started with what the config says."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from nmoe_backend import tritonserver
from nmoe_backend.config import ServeConfig
from nmoe_backend.types import ConfigError
from tests.model_folder import write_model_folder, write_toml


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """What the wheel holds, in miniature."""
    source = tmp_path / "site" / "pytriton" / "tritonserver"
    stub = source / "python_backend_stubs" / tritonserver.python_tag() / "triton_python_backend_stub"
    for path in (
        source / "bin" / "tritonserver",
        source / "backends" / "python" / "libtriton_python.so",
        source / "backends" / "python" / "triton_python_backend_utils.py",
        stub,
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    return source


def container(tmp_path: Path, backend: bool = True) -> Path:
    """NVIDIA's layout: <root>/bin and <root>/backends."""
    binary = tmp_path / "opt" / "bin" / "tritonserver"
    binary.parent.mkdir(parents=True)
    binary.touch(mode=0o755)
    if backend:
        (tmp_path / "opt" / "backends" / "python").mkdir(parents=True)
        (tmp_path / "opt" / "backends" / "python" / "libtriton_python.so").touch()
    return binary


def test_the_server_on_path_wins_and_needs_no_libraries(tmp_path: Path) -> None:
    binary = container(tmp_path)
    server = tritonserver.find_server(tmp_path / "cache", {"PATH": f"/nowhere:{binary.parent}"})
    assert (server.binary, server.backends) == (binary, tmp_path / "opt" / "backends")
    assert server.library_dirs == ()
    assert not (tmp_path / "cache").exists()


def test_a_server_without_the_python_backend_is_an_error(tmp_path: Path) -> None:
    binary = container(tmp_path, backend=False)
    with pytest.raises(ConfigError, match="no Python backend at .*backends/python"):
        tritonserver.find_server(tmp_path / "cache", {"PATH": str(binary.parent)})


def test_no_server_at_all_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tritonserver.importlib.util, "find_spec", lambda _name: None)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"no tritonserver on PATH and no nvidia-pytriton .*Run scripts/serve"):
        tritonserver.find_server(tmp_path / "cache", {"PATH": "/nowhere"})


def test_the_wheels_copy_is_runnable_complete_and_made_once(wheel: Path, tmp_path: Path) -> None:
    root = tritonserver._prepare(wheel, tmp_path / "cache", "0.7.0")
    files = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
    assert set(files) == {
        "bin/tritonserver",
        "backends/python/libtriton_python.so",
        "backends/python/triton_python_backend_utils.py",
        "backends/python/triton_python_backend_stub",
    }
    for name in ("bin/tritonserver", "backends/python/triton_python_backend_stub"):
        assert files[name].stat().st_mode & 0o111 == 0o111
    before = files["bin/tritonserver"].stat().st_mtime_ns
    assert tritonserver._prepare(wheel, tmp_path / "cache", "0.7.0") == root
    assert files["bin/tritonserver"].stat().st_mtime_ns == before


def test_concurrent_starts_end_with_one_copy_and_no_leftovers(wheel: Path, tmp_path: Path) -> None:
    barrier, roots = threading.Barrier(4), []

    def prepare() -> None:
        barrier.wait()
        roots.append(tritonserver._prepare(wheel, tmp_path / "cache", "0.7.0"))

    threads = [threading.Thread(target=prepare) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(roots)) == 1 and len(roots) == 4
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [roots[0].name]


def test_a_python_without_a_stub_is_an_error(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tritonserver, "python_tag", lambda: "3.99")
    with pytest.raises(ConfigError, match=r"no stub for Python 3\.99"):
        tritonserver._prepare(wheel, tmp_path / "cache", "0.7.0")


def test_a_missing_libpython_names_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tritonserver, "python_tag", lambda: "3.99")
    with pytest.raises(ConfigError, match=r"libpython3\.99\.so\.1\.0 is not installed.*apt-get install libpython3\.99"):
        tritonserver.libpython_dir()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_command_carries_the_config(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = container(tmp_path)
    monkeypatch.setenv("PATH", str(binary.parent))
    monkeypatch.setenv("LD_LIBRARY_PATH", "/theirs")
    monkeypatch.delenv("CUDA_MODULE_LOADING", raising=False)  # a refused start of another test exported it
    path = write_toml(
        tmp_path / "c.toml",
        write_model_folder(tmp_path / "model"),
        f'device = "{device}"\nhost = "0.0.0.0"\nhttp_port = 1\ngrpc_port = 2\nmetrics_port = 3',
    )
    monkeypatch.chdir(tmp_path)
    config = ServeConfig.from_toml("c.toml")
    argv, env = tritonserver.server_command(config, tmp_path / "repo", ["--log-verbose=1"], "nmoe_x_")
    assert argv[0] == str(binary) and argv[-1] == "--log-verbose=1"
    for flag in (
        f"--model-repository={tmp_path / 'repo'}",
        "--backend-config=python,shm-region-prefix-name=nmoe_x_",
        "--http-address=0.0.0.0",
        "--http-port=1",
        "--grpc-address=0.0.0.0",
        "--grpc-port=2",
        "--metrics-address=0.0.0.0",
        "--metrics-port=3",
        "--exit-timeout-secs=45",
    ):
        assert flag in argv
    assert env["NMOE_CONFIG"] == str(path)
    assert env["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    assert env["LD_LIBRARY_PATH"] == "/theirs"
    assert env.get("CUDA_MODULE_LOADING") == ("EAGER" if device == "cuda" else None)
