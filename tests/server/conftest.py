"""One live server for all tests of this folder that do not end or reload it: the product, eight ranks, tiny weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from scripts.make_tiny_checkpoint import make_checkpoint
from tests.triton_server import TritonServer, write_config

if TYPE_CHECKING:
    from tests.server.reference import Reference


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), dtype="float32")


@pytest.fixture(scope="session")
def reference(model_path: Path) -> Reference:
    from tests.server.reference import Reference  # transformers: seconds, and few tests need it

    return Reference(model_path)


@pytest.fixture(scope="session")
def config_path(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "server.toml"
    return write_config(path, model_path, allow_stop_by_id=True)


@pytest.fixture(scope="session")
def triton(config_path: Path) -> Iterator[TritonServer]:
    with TritonServer(config_path) as server:
        yield server
        assert server.process.exit_code() is None, "the server died:\n" + "\n".join(server.lines[-40:])
