"""What each Python-backend model does first: finds its TOML, refuses NumPy 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nmoe_backend import stub
from nmoe_backend.types import ConfigError
from tests.model_folder import write_model_folder, write_toml


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    (tmp_path / "repository" / "deepseek_v3").mkdir(parents=True)
    return write_toml(tmp_path / "c.toml", write_model_folder(tmp_path / "model"))


def arguments(tmp_path: Path, parameter: str | None) -> dict[str, str]:
    """What Triton hands to `initialize`; `model_repository` is the model's own folder there."""
    parameters = {} if parameter is None else {stub.CONFIG_PARAMETER: {"string_value": parameter}}
    return {
        "model_name": "deepseek_v3",
        "model_repository": str(tmp_path / "repository" / "deepseek_v3"),
        "model_config": json.dumps({"parameters": parameters}),
    }


@pytest.mark.parametrize("parameter", ["../../c.toml", "{absolute}"])
def test_the_parameter_of_config_pbtxt_names_the_toml(toml: Path, tmp_path: Path, parameter: str) -> None:
    config = stub.load_config(arguments(tmp_path, parameter.format(absolute=toml)), {})
    assert config.config_path == toml


def test_nmoe_config_wins_over_the_parameter(toml: Path, tmp_path: Path) -> None:
    args = arguments(tmp_path, "../../absent.toml")
    assert stub.load_config(args, {"NMOE_CONFIG": str(toml)}).config_path == toml


@pytest.mark.parametrize("parameter", [None, "", "../../absent.toml"])
def test_without_a_toml_the_error_names_both_ways_and_where_it_looked(
    toml: Path, tmp_path: Path, parameter: str | None
) -> None:
    with pytest.raises(ConfigError, match="NMOE_CONFIG is not set and parameter nmoe_config") as error:
        stub.load_config(arguments(tmp_path, parameter), {})
    assert str(tmp_path) in str(error.value)


def test_numpy_2_is_refused_with_the_command_that_helps() -> None:
    stub.check_numpy("1.26.4")
    with pytest.raises(ConfigError, match=r"has NumPy 2\.1\.0, needs NumPy 1 .* pip install 'numpy<2'"):
        stub.check_numpy("2.1.0")
