"""The application of one worker process: which path is which endpoint, and how errors become answers."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

from nmoe_backend import __version__
from nmoe_backend.api import chat, completions, responses, text_endpoints
from nmoe_backend.api.bodies import JsonRoute
from nmoe_backend.api.errors import ApiError
from nmoe_backend.api.gate import Gate
from nmoe_backend.api.generation import MAX_BATCH
from nmoe_backend.api.http import ClientGone, Json
from nmoe_backend.api.metrics import ApiMetrics
from nmoe_backend.api.openapi import (
    GENERATES,
    READS_TEXT,
    ChatAnswer,
    CompletionAnswer,
    EmbeddingsAnswer,
    LimitsAnswer,
    ModelAnswer,
    ModelsAnswer,
    ResponseAnswer,
    StatusAnswer,
    TextAnswer,
    TokensAnswer,
    answers,
    describe,
    operation_id,
)
from nmoe_backend.api.responses_schemas import ResponsesRequest
from nmoe_backend.api.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from nmoe_backend.api.service import Caller, Service
from nmoe_backend.contract_inputs import MAX_STOP_WORDS
from nmoe_backend.openai_config import OpenAIConfig
from nmoe_backend.types import MAX_TOP_LOGPROBS

_LOG = logging.getLogger(__name__)
RunningService = Callable[[], AbstractAsyncContextManager[Service]]
_PAGE = Path(__file__).parent / "static" / "chat.html"


def make_app(running: RunningService, created: int, metrics: ApiMetrics) -> FastAPI:
    """`running` is entered in the event loop that serves; `created`: when the model was started, seconds since 1970."""
    app = FastAPI(
        title="nmoe", version=__version__, summary="DeepSeek-V3 behind OpenAI's API", lifespan=_lifespan(running),
        redoc_url=None, generate_unique_id_function=operation_id,
    )  # fmt: skip
    app.router.route_class = JsonRoute
    _add_generation(app)
    _add_models(app, created)
    _add_health(app, metrics)
    _add_errors(app)
    describe(app)
    return app


def wrap(app: FastAPI, settings: OpenAIConfig, metrics: ApiMetrics) -> ASGIApp:
    """The application as the server runs it."""
    gate = Gate(app, settings, metrics)
    if not settings.cors_origins:
        return gate
    return CORSMiddleware(
        gate, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"],
        expose_headers=["x-request-id", "x-session-id", "retry-after"],
    )  # fmt: skip


def _lifespan(running: RunningService) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with running() as app.state.service:
            yield

    return lifespan


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _caller(request: Request) -> Caller:
    return Caller(request=request, request_id=request.state.request_id)


def _add_generation(app: FastAPI) -> None:
    @app.post("/v1/chat/completions", responses=answers(ChatAnswer, GENERATES, streams=True))
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        return await chat.create(_service(request), _caller(request), body)

    @app.post("/v1/completions", responses=answers(CompletionAnswer, GENERATES, streams=True))
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        return await completions.create(_service(request), _caller(request), body)

    @app.post("/v1/responses", responses=answers(ResponseAnswer, GENERATES, streams=True))
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        return await responses.create(_service(request), _caller(request), body)

    @app.api_route("/v1/responses/{response_id:path}", methods=["GET", "DELETE"], include_in_schema=False)
    async def stored_response(response_id: str) -> Response:
        raise responses.not_stored(response_id)

    @app.post("/v1/embeddings", responses=answers(EmbeddingsAnswer, GENERATES))
    async def create_embeddings(body: EmbeddingRequest, request: Request) -> Response:
        return await text_endpoints.embeddings(_service(request), _caller(request), body)

    @app.post("/tokenize", responses=answers(TokensAnswer, READS_TEXT))
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        return await text_endpoints.tokenize(_service(request), body)

    @app.post("/detokenize", responses=answers(TextAnswer, READS_TEXT))
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        return await text_endpoints.detokenize(_service(request), body)


def _add_models(app: FastAPI, created: int) -> None:
    def model(service: Service) -> dict[str, Any]:
        name, length = service.config.model_name, service.config.max_seq_len
        return {"id": name, "object": "model", "created": created, "owned_by": "nmoe", "max_model_len": length}

    @app.get("/v1/models", responses=answers(ModelsAnswer, (401,)))
    async def list_models(request: Request) -> Response:
        return Json({"object": "list", "data": [model(_service(request))]})

    @app.get("/v1/models/{name:path}", responses=answers(ModelAnswer, (401, 404)))
    async def retrieve_model(name: str, request: Request) -> Response:
        service = _service(request)
        if name != service.config.model_name:
            raise service.unknown_model(name)
        return Json(model(service))

    @app.get("/v1/limits", responses=answers(LimitsAnswer, (401,)))
    async def limits(request: Request) -> Response:
        return Json(_limits(_service(request)))


def _limits(service: Service) -> dict[str, Any]:
    config, settings = service.config, service.settings
    num_ranks = sum(replica.world_size for replica in config.replicas)
    return {
        "model": config.model_name,
        "max_model_len": config.max_seq_len,
        "max_running_requests": config.max_batch_size * num_ranks,
        "max_queue_size": config.max_queue_size,
        "max_choices": settings.max_choices,
        "max_inputs": MAX_BATCH,
        "max_stop_strings": MAX_STOP_WORDS,
        "max_top_logprobs": MAX_TOP_LOGPROBS,
        "max_request_bytes": settings.max_request_bytes,
        "request_timeout_s": settings.request_timeout_s,
    }


def _add_health(app: FastAPI, metrics: ApiMetrics) -> None:
    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses=answers(StatusAnswer))
    async def health() -> Response:
        """This process answers."""
        return Json({"status": "ok"})

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", responses=answers(StatusAnswer, (503,)))
    async def ready(request: Request) -> Response:
        """The model behind it answers too."""
        if not await _service(request).engine.is_ready():
            raise ApiError(503, "the model is not ready. Try again.")
        return Json({"status": "ready"})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def read_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(_PAGE, media_type="text/html")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_request: Request, error: ApiError) -> Response:
        return Response(error.body(), error.status, error.headers(), "application/json")

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        text = f"{request.method} {request.url.path}: {error.detail}. GET /docs lists what there is."
        answer = await api_error(request, ApiError(error.status_code, text))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(ClientGone)
    async def gone(_request: Request, _error: ClientGone) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        _LOG.error("%s: a bug of ours", request.state.request_id, exc_info=error)
        return await api_error(request, ApiError(500, "the server failed. Its log says why."))
