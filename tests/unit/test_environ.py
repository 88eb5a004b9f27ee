"""Debug switches are typed; a value or a name that we do not know is an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from nmoe_backend import environ
from nmoe_backend.types import ConfigError


def test_switches_are_off_by_default() -> None:
    assert environ.debug_switches({}) == environ.DebugSwitches(debug_sync=False, debug_finite=False, log_level="info")


def test_switches_parse() -> None:
    env = {"NMOE_DEBUG_SYNC": "1", "NMOE_DEBUG_FINITE": "true", "NMOE_LOG_LEVEL": "DEBUG"}
    assert environ.debug_switches(env) == environ.DebugSwitches(debug_sync=True, debug_finite=True, log_level="debug")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("NMOE_DEBUG_SYNC", "maybe", "NMOE_DEBUG_SYNC='maybe' is neither on nor off"),
        ("NMOE_LOG_LEVEL", "loud", "NMOE_LOG_LEVEL='loud' is not a level"),
        ("NMOE_DEBUG_SINC", "1", "NMOE_DEBUG_SINC is not known. Did you mean NMOE_DEBUG_SYNC"),
    ],
)
def test_a_bad_switch_is_an_error(name: str, value: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        environ.debug_switches({name: value})


def test_nmoe_config_must_name_a_file(tmp_path: Path) -> None:
    assert environ.config_path({}) is None
    path = tmp_path / "a.toml"
    with pytest.raises(ConfigError, match=r"NMOE_CONFIG=.*a\.toml' is not a file"):
        environ.config_path({"NMOE_CONFIG": str(path)})
    with pytest.raises(ConfigError, match="NMOE_CONFIG='' is not a file"):
        environ.config_path({"NMOE_CONFIG": ""})
    path.touch()
    assert environ.config_path({"NMOE_CONFIG": str(path)}) == path


def test_cuda_settings_of_the_user_that_hang_ranks_are_refused() -> None:
    assert environ.cuda_settings({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}) == {
        "CUDA_MODULE_LOADING": "EAGER"
    }
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        with pytest.raises(ConfigError, match=f"{name}=.*Take expandable_segments:True out of it"):
            environ.cuda_settings({name: "backend:native, expandable_segments: True"})
    with pytest.raises(ConfigError, match="CUDA_MODULE_LOADING='LAZY'.*Set it to EAGER"):
        environ.cuda_settings({"CUDA_MODULE_LOADING": "LAZY"})


def test_kernels_are_kept_beside_the_prepared_server_unless_the_user_says_where() -> None:
    assert environ.kernel_cache(Path("/c/nmoe"), {}) == {"TRITON_CACHE_DIR": "/c/nmoe/kernels"}
    assert environ.kernel_cache(Path("/c/nmoe"), {"TRITON_CACHE_DIR": "/elsewhere"}) == {}


def test_a_childs_paths_are_put_in_front() -> None:
    child = environ.child_environment({"A": "1"}, {"PATH": "/x", "LD_LIBRARY_PATH": "/y"}, {"PATH": "/bin", "B": "2"})
    assert child == {"A": "1", "B": "2", "PATH": "/x:/bin", "LD_LIBRARY_PATH": "/y"}


def test_home_decides_the_cache_of_the_given_environment() -> None:
    assert environ.cache_dir({"HOME": "/h"}) == Path("/h/.cache/nmoe")
