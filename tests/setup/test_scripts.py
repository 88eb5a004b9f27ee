"""scripts/serve and scripts/test on machines that lack something: a clear error with the remedy, and no traceback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("bash", "dirname", "sed", "cat", "cut", "sha256sum", "flock", "realpath", "env", "rm", "mkdir", "mktemp", "mv")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A PATH folder with the tools that every Debian has, and no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found is not None, f"{tool} is missing here: apt-get install coreutils util-linux sed"
        (folder / tool).symlink_to(found)
    return folder


def install(machine: Path, name: str, script: str) -> None:
    """An executable on that machine."""
    path = machine / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def python(machine: Path, name: str, version: str, modules: str = "venv ensurepip", libpython: bool = True) -> None:
    """A Python as the scripts see it: what it answers to their three questions."""
    lacks_modules = "" if modules else 'case "$2" in *ensurepip*) exit 1 ;; esac'
    major, minor = version.split(".")
    install(
        machine,
        name,
        f'[ "$1" = --version ] && echo "Python {version}.1" && exit\n'
        f'case "$2" in *version_info*) [ "$1" = -c ] && echo "{major}.{minor}" && exit ;; esac\n'
        f'{lacks_modules}\n[ "$1" = - ] && exit {0 if libpython else 1}\nexit 0',
    )


def run(machine: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": str(machine), "HOME": str(machine)}
    return subprocess.run(command, env=env, cwd="/", text=True, capture_output=True, timeout=60, check=False)


def find_python(machine: Path) -> subprocess.CompletedProcess[str]:
    script = f"set -euo pipefail; source {ROOT}/scripts/_common; find_python; echo $python $version"
    return run(machine, "bash", "-c", script)


def test_the_newest_usable_python_is_taken(machine: Path) -> None:
    python(machine, "python3", "3.11")
    assert find_python(machine).stdout == f"{machine}/python3 3.11\n"
    python(machine, "python3.11", "3.11")
    assert find_python(machine).stdout == f"{machine}/python3.11 3.11\n"
    python(machine, "python3.12", "3.12")
    assert find_python(machine).stdout == f"{machine}/python3.12 3.12\n"


def test_a_shim_that_runs_nothing_is_passed_over(machine: Path) -> None:
    install(machine, "python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")
    python(machine, "python3.11", "3.11")
    assert find_python(machine).stdout == f"{machine}/python3.11 3.11\n"


def test_an_incomplete_python_is_passed_over_for_a_complete_one(machine: Path) -> None:
    python(machine, "python3.12", "3.12", modules="")
    python(machine, "python3.11", "3.11")
    assert find_python(machine).stdout == f"{machine}/python3.11 3.11\n"


@pytest.mark.parametrize(
    ("modules", "libpython", "packages"),
    [
        ("", True, "python3.11-venv"),
        ("venv ensurepip", False, "libpython3.11"),
        ("", False, "python3.11-venv libpython3.11"),
    ],
)
def test_missing_parts_are_named_with_their_debian_packages(
    machine: Path, modules: str, libpython: bool, packages: str
) -> None:
    python(machine, "python3.11", "3.11", modules, libpython)
    python(machine, "python3", "3.11", modules, libpython)
    result = run(machine, str(ROOT / "scripts" / "serve"))
    assert result.returncode == 1
    assert f"Run: apt-get install {packages}\n" in result.stderr


@pytest.mark.parametrize("version", ["3.10", "3.13", "2.7"])
def test_another_python_is_an_error_that_says_what_to_install(machine: Path, version: str) -> None:
    python(machine, "python3", version)
    result = run(machine, str(ROOT / "scripts" / "serve"))
    assert result.returncode == 1
    assert f"no usable Python 3.11 or 3.12 on PATH (python3 is Python {version}.1)" in result.stderr
    assert "apt-get install python3.11 python3.11-venv libpython3.11" in result.stderr


def test_a_machine_without_python_says_so(machine: Path) -> None:
    result = run(machine, str(ROOT / "scripts" / "serve"))
    assert result.returncode == 1
    assert "no usable Python 3.11 or 3.12" in result.stderr and "apt-get install" in result.stderr


def test_libpython_is_not_needed_where_tritonserver_is_on_path(machine: Path) -> None:
    python(machine, "python3.12", "3.12", libpython=False)
    install(machine, "tritonserver", "exit 0")
    assert find_python(machine).stdout == f"{machine}/python3.12 3.12\n"


def test_a_toml_that_does_not_exist_is_an_error(machine: Path) -> None:
    result = run(machine, str(ROOT / "scripts" / "serve"), "none.toml")
    assert result.returncode == 1
    assert "none.toml is not a file" in result.stderr and "configs/tiny.toml" in result.stderr


def test_a_broken_toml_is_an_error_before_anything_is_installed(machine: Path, tmp_path: Path) -> None:
    (machine / "python3").symlink_to(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}")
    (tmp_path / "broken.toml").write_text('device = "${UNSET_HERE}"\n')
    result = run(machine, str(ROOT / "scripts" / "serve"), str(tmp_path / "broken.toml"))
    assert result.returncode == 1
    assert "UNSET_HERE is not set" in result.stderr and "Traceback" not in result.stderr


def test_a_model_that_is_not_there_is_an_error_before_anything_is_installed(machine: Path) -> None:
    (machine / "python3").symlink_to(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}")
    result = run(machine, str(ROOT / "scripts" / "serve"), str(ROOT / "configs" / "production.toml"))
    assert result.returncode == 1
    assert "cannot read /models/DeepSeek-V3/config.json" in result.stderr and "Traceback" not in result.stderr
    assert ".venv" not in result.stdout + result.stderr and "installing" not in result.stdout


def test_all_needs_the_programs_of_the_slow_tests(machine: Path) -> None:
    result = run(machine, str(ROOT / "scripts" / "test"), "--all")
    assert result.returncode == 1
    assert "Run: apt-get install curl git" in result.stderr


@pytest.mark.parametrize("answer", ["exit 127", "echo 'Client Version: v1.20.2'", "echo 'Kustomize Version: v4.5.7'"])
def test_all_needs_a_kubectl_that_renders_our_manifests(machine: Path, answer: str) -> None:
    for name in ("curl", "git", "chromium", "prometheus", "haproxy"):
        install(machine, name, "exit 0")
    install(machine, "kubectl", answer)
    result = run(machine, str(ROOT / "scripts" / "test"), "--all")
    assert result.returncode == 1
    assert "need kubectl 1.27 or newer" in result.stderr and "pkgs.k8s.io" in result.stderr


def test_ci_runs_what_a_person_runs() -> None:
    assert 'scripts/test" "$@"' in (ROOT / ".ci" / "run").read_text()
    for name in ("scripts/serve", "scripts/test", "scripts/_setup", ".ci/run"):
        assert os.access(ROOT / name, os.X_OK), f"{name} is not executable"
        subprocess.run(["bash", "-n", ROOT / name], check=True)


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / f"{name}.lock").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))  # type: ignore[misc]


def test_the_locks_agree_on_everything_but_torch_and_what_it_brings() -> None:
    cpu, gpu, test = pins("cpu"), pins("gpu"), pins("test")
    brought = {name for name in gpu if name.startswith(("nvidia-", "cuda-")) and name != "nvidia-pytriton"}
    differing = {name for name in cpu.keys() | gpu.keys() if cpu.get(name) != gpu.get(name)}
    assert differing == {"torch", "triton", "setuptools"} | brought
    assert (gpu["torch"], gpu["triton"], cpu["numpy"]) == ("2.11.0", "3.6.0", "1.26.4")
    assert not test.keys() & cpu.keys()
