"""The front end without processes and ports: the application over a scripted engine, and OpenAI's client before it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
from openai import AsyncOpenAI
from tokenizers import AddedToken, Tokenizer

from nmoe_backend.api.app import make_app, wrap
from nmoe_backend.api.metrics import ApiMetrics
from nmoe_backend.api.parsers.reasoning import THINK_END
from nmoe_backend.api.service import Service
from nmoe_backend.config import ServeConfig
from nmoe_backend.text import Text
from tests.api.fake_engine import FakeEngine
from tests.model_folder import write_model_folder, write_toml
from tests.texts import make_folder

MODEL = "deepseek"
V31 = 'chat_template = "deepseek_v31.jinja"'  # tools and reasoning


def make_service(path: Path, openai: str = V31) -> Service:
    """A service in a new folder; `openai`: lines of its [openai] table. Its engine has no script yet."""
    folder = make_folder(write_model_folder(path / "model"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(THINK_END, special=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    head = f'model_name = "{MODEL}"\nmax_seq_len = 4096'
    toml = write_toml(path / "config.toml", folder, head, f"[openai]\n{openai}")
    config = ServeConfig.from_toml(toml, environment={})
    return Service(config, Text(config.model_path, chat_template=config.openai.chat_template), FakeEngine())


def application(service: Service, engine: FakeEngine) -> Any:
    """The ASGI application as the server runs it, over this engine."""
    metrics = ApiMetrics()

    @asynccontextmanager
    async def running() -> AsyncIterator[Service]:
        yield service

    app = make_app(running, 0, metrics)
    service.engine = engine
    app.state.service = service  # what the lifespan does; a transport without a server has none
    return wrap(app, service.settings, metrics)


def client(app: Any) -> AsyncOpenAI:
    """OpenAI's client. A whole answer arrives at once: its transport waits for the end."""
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app))
    return AsyncOpenAI(base_url="http://front.end/v1", api_key="none", http_client=http, max_retries=0)
