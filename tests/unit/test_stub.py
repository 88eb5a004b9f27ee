"""stub.py: NumPy of the stub, and where the TOML comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nmoe_backend.stub import check_numpy, load_config
from nmoe_backend.types import ConfigError

TINY = Path(__file__).parents[2] / "configs" / "tiny.toml"


def arguments(folder: Path, parameter: str | None) -> dict[str, str]:
    """What Triton hands to `initialize`."""
    parameters = {} if parameter is None else {"nmoe_config": {"string_value": parameter}}
    config = json.dumps({"parameters": parameters})
    return {"model_config": config, "model_repository": str(folder), "model_name": "deepseek_v3"}


def test_numpy_2_is_refused_with_the_remedy() -> None:
    check_numpy("1.26.4")
    with pytest.raises(ConfigError, match=r"NumPy 2\.1\.0, needs NumPy 1.*pip install 'numpy<2'"):
        check_numpy("2.1.0")


def test_without_a_toml_the_error_names_both_ways(tmp_path: Path) -> None:
    for parameter in (None, "", "missing.toml"):
        with pytest.raises(ConfigError, match="NMOE_CONFIG is not set and parameter nmoe_config.*Set one of them"):
            load_config(arguments(tmp_path, parameter), environment={})


def test_the_environment_goes_before_the_parameter(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / f"{name}.toml").write_text(f'{name} = "unknown"\n')
    with pytest.raises(ConfigError, match="second"):
        load_config(arguments(tmp_path, "second.toml"), environment={})
    with pytest.raises(ConfigError, match="first"):
        load_config(arguments(tmp_path, "second.toml"), environment={"NMOE_CONFIG": str(tmp_path / "first.toml")})


@pytest.mark.parametrize("model", ["deepseek_v3", "preprocessing", "postprocessing"])
def test_the_shipped_parameter_names_the_tiny_config(model: str) -> None:
    folder = TINY.parents[1] / "model_repository" / model
    value = (folder / "config.pbtxt").read_text().partition('string_value: "')[2].partition('"')[0]
    assert (folder / value).resolve() == TINY
