"""Live front ends for tests: `nmoe api` as a process of its own in front of a Triton, both started as users start them.

A pytest plugin (tests/conftest.py names it), so that the fixtures of one session are shared by all folders: one Triton
over the tiny checkpoint, and two front ends before it with different settings.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.front_end import FrontEnd
from tests.triton_server import TritonServer, write_config

if TYPE_CHECKING:  # the plugin is loaded for torch-free test runs too
    from openai import AsyncOpenAI, OpenAI

    from tests.api.reference import Reference

MODEL = "tiny"


def get_json(api: FrontEnd, path: str) -> Any:
    """The body of a 200."""
    with urllib.request.urlopen(f"{api.url}{path}", timeout=30) as answer:
        return json.load(answer)


def post_json(api: FrontEnd, path: str, body: object) -> tuple[int, Any]:
    """(status, body) of a POST of JSON, or of bytes as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{api.url}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def write_api_config(path: Path, model_path: Path, openai: str, **values: object) -> Path:
    """A TOML for the CPU whose [openai] table holds the lines `openai`."""
    write_config(path, model_path, **values)
    path.write_text(f"{path.read_text()}[openai]\n{openai}\n")
    return path


@pytest.fixture(scope="session")
def api_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random checkpoint, fp32. Not to be changed."""
    from scripts.make_tiny_checkpoint import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("api") / "tiny", dtype="float32")


@pytest.fixture(scope="session")
def api_triton(api_checkpoint: Path) -> Iterator[TritonServer]:
    """The product over that checkpoint: two ranks, which is quicker on a small machine than eight."""
    config = write_api_config(api_checkpoint.parent / "api.toml", api_checkpoint, MAIN, gpus=[0, 1], max_batch_size=64)
    with TritonServer(config) as server:
        yield server
        assert server.process.exit_code() is None, "the server died:\n" + "\n".join(server.lines[-40:])


MAIN = "embeddings = true"


@pytest.fixture(scope="session")
def api(api_triton: TritonServer, api_checkpoint: Path) -> Iterator[FrontEnd]:
    """The front end of most tests: one process, no keys, embeddings on."""
    with FrontEnd(api_checkpoint.parent / "api.toml", api_triton.grpc) as server:
        yield server
        assert server.process.exit_code() is None, "the front end died:\n" + "\n".join(server.lines[-40:])


@pytest.fixture(scope="session")
def reference_model(api_checkpoint: Path) -> Reference:
    """transformers over the same checkpoint."""
    from tests.api.reference import Reference

    return Reference(api_checkpoint)


@pytest.fixture(scope="session")
def client(api: FrontEnd) -> Iterator[OpenAI]:
    """The official SDK; it does not repeat what failed, so that tests see it."""
    from openai import OpenAI

    with OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0, timeout=60.0) as one:
        yield one


def async_client(api: FrontEnd, **options: object) -> AsyncOpenAI:
    """The same for the event loop that runs. A context manager."""
    from openai import AsyncOpenAI

    values = {"api_key": "none", "max_retries": 0, "timeout": 60.0, **options}
    return AsyncOpenAI(base_url=f"{api.url}/v1", **values)  # type: ignore[arg-type]


KEYS = ("key-of-the-environment", "second-key", "key-of-the-file")


@pytest.fixture(scope="session")
def guarded_api(api_triton: TritonServer, api_checkpoint: Path) -> Iterator[FrontEnd]:
    """The same engine behind two worker processes with keys, one foreign page allowed, small bodies, no embeddings."""
    folder = api_checkpoint.parent
    (folder / "keys.txt").write_text(f"# a comment\n\n{KEYS[2]}\n")
    table = 'workers = 2\napi_keys_file = "keys.txt"\ncors_origins = ["http://page.example"]\nmax_request_bytes = 4096'
    config = write_api_config(folder / "guarded.toml", api_checkpoint, table, gpus=[0, 1])
    with FrontEnd(config, api_triton.grpc, {"NMOE_API_KEYS": ", ".join(KEYS[:2])}) as server:
        yield server
