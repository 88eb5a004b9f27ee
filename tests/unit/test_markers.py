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

def test_anywhere():
    pass
"""


@pytest.mark.parametrize(
    ("markexpr", "option", "wanted"),
    [
        ("", False, False),
        ("", True, True),
        ("gpu", False, True),
        ("not gpu", False, False),
        ("not slow and not gpu", False, False),
        ("gpu and not slow", False, True),
        ("not slow", False, False),
    ],
)
def test_when_gpu_tests_are_wanted(markexpr: str, option: bool, wanted: bool) -> None:
    assert conftest.gpu_tests_are_wanted(markexpr, option) is wanted


def run_sample(tmp_path: Path, *arguments: str, has_gpu: bool) -> subprocess.CompletedProcess[str]:
    """pytest on a folder with our conftest, on a machine that has a GPU or not."""
    answer = f"\n\ndef gpu_is_present() -> bool:\n    return {has_gpu}\n"
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text() + answer)
    (tmp_path / "test_sample.py").write_text(SAMPLE)
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path)]
    return subprocess.run([*command, *arguments, str(tmp_path)], capture_output=True, text=True, check=False)


def test_the_default_run_leaves_gpu_tests_out(tmp_path: Path) -> None:
    result = run_sample(tmp_path, has_gpu=False)
    assert result.returncode == 0 and "1 passed, 1 deselected" in result.stdout


@pytest.mark.parametrize("arguments", [("-m", "gpu"), ("--gpu",)])
def test_asking_for_gpu_tests_without_a_gpu_is_a_usage_error(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    result = run_sample(tmp_path, *arguments, has_gpu=False)
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "torch sees no CUDA device" in result.stderr + result.stdout


@pytest.mark.parametrize(("arguments", "count"), [(("-m", "gpu"), 1), (("--gpu",), 2)])
def test_with_a_gpu_they_run(tmp_path: Path, arguments: tuple[str, ...], count: int) -> None:
    result = run_sample(tmp_path, *arguments, has_gpu=True)
    assert result.returncode == 0 and f"{count} passed" in result.stdout
