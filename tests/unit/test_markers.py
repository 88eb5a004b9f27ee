"""GPU tests run only when asked for; asking without a GPU is an error and not a skip."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import conftest

ROOT = Path(__file__).parents[2]
SAMPLE = """
import pytest

@pytest.mark.gpu
def test_on_a_gpu():
    pass

@pytest.mark.gpu
@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.gpu2)])
def test_on_either(devices):
    pass

def test_anywhere():
    pass
"""


@pytest.mark.parametrize(
    ("markexpr", "option", "wanted"),
    [
        ("", False, []),
        ("", True, ["gpu"]),
        ("gpu", False, ["gpu"]),
        ("gpu2", False, ["gpu2"]),
        ("gpu or gpu2", False, ["gpu", "gpu2"]),
        ("not gpu", False, []),
        ("not slow and not gpu", False, []),
        ("gpu and not slow", False, ["gpu"]),
        ("not slow", False, []),
    ],
)
def test_when_gpu_tests_are_wanted(markexpr: str, option: bool, wanted: list[str]) -> None:
    assert [name for name in conftest.GPUS if conftest.is_wanted(name, markexpr, option)] == wanted


def run_sample(tmp_path: Path, *arguments: str, gpus: int) -> subprocess.CompletedProcess[str]:
    """pytest on a folder with our conftest, on a machine that has so many GPUs."""
    answer = f"\n\ndef num_gpus() -> int:\n    return {gpus}\n"
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text() + answer)
    (tmp_path / "test_sample.py").write_text(SAMPLE)
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path)]
    return subprocess.run([*command, *arguments, str(tmp_path)], capture_output=True, text=True, check=False)


def test_the_default_run_leaves_gpu_tests_out(tmp_path: Path) -> None:
    result = run_sample(tmp_path, gpus=0)
    assert result.returncode == 0 and "1 passed, 3 deselected" in result.stdout


@pytest.mark.parametrize("arguments", [("-m", "gpu"), ("--gpu",)])
def test_asking_for_gpu_tests_without_a_gpu_is_a_usage_error(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    result = run_sample(tmp_path, *arguments, gpus=0)
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "torch sees 0 of the 1 CUDA devices" in result.stderr + result.stdout


def test_asking_for_two_gpus_where_there_is_one_is_a_usage_error(tmp_path: Path) -> None:
    result = run_sample(tmp_path, "-m", "gpu2", gpus=1)
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "torch sees 1 of the 2 CUDA devices" in result.stderr + result.stdout


@pytest.mark.parametrize(
    ("arguments", "count"), [(("-m", "gpu"), 2), (("--gpu",), 3), (("-m", "gpu2"), 1), (("-m", "gpu or gpu2"), 3)]
)
def test_with_gpus_they_run(tmp_path: Path, arguments: tuple[str, ...], count: int) -> None:
    result = run_sample(tmp_path, *arguments, gpus=2 if "gpu2" in arguments[-1] else 1)
    assert result.returncode == 0 and f"{count} passed" in result.stdout
