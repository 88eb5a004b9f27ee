"""The bodies of requests: read within a time and a size, parsed by orjson, checked by the endpoint's pydantic model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import orjson
from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from nmoe_backend.api.errors import bad_request, too_large
from nmoe_backend.api.http import ClientGone
from nmoe_backend.api.validation import check_depth, explain, no_object

BODY_S = 60.0  # a client that announces a body and does not send it holds a connection no longer than this
ModelT = TypeVar("ModelT", bound=BaseModel)


class JsonRoute(APIRoute):
    """A route that reads its body itself: endpoints with one are called as (body, request).

    FastAPI knows the model for the document. Its own way to it is long (a resolver of dependencies, a parser of mail
    headers, a second look at every error), and its JSON reader takes what orjson could not write again: lone
    surrogates, NaN.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of a request."""
        if self.body_field is None:
            return super().get_route_handler()
        model = self.body_field.field_info.annotation
        assert isinstance(model, type) and issubclass(model, BaseModel), f"the body of {self.path} is {model}"

        async def handle(request: Request) -> Response:
            limit = request.app.state.service.settings.max_request_bytes
            body = checked(model, await _read(request, limit), request.headers.get("content-type", ""))
            answer: Response = await self.endpoint(body, request)
            return answer

        return handle


def checked(model: type[ModelT], raw: bytes, content_type: str) -> ModelT:
    """What a body says. ApiError 400."""
    if not raw or not _is_json(content_type):
        raise no_object()
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise bad_request(f"the body is not valid JSON: {error.msg}. Correct it.") from error
    check_depth(value)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        known = [field.alias or name for name, field in model.model_fields.items()]
        raise explain(error.errors(include_url=False), known) from error


async def _read(request: Request, limit: int) -> bytes:
    """All of it. ApiError 413, HTTPException 408, ClientGone."""
    pieces, size = [], 0
    try:
        async with asyncio.timeout(BODY_S):
            async for piece in request.stream():
                size += len(piece)
                if size > limit:  # the gate has compared the announced length, where there is one
                    raise too_large(limit)
                pieces.append(piece)
    except TimeoutError as error:
        text = f"the body did not arrive within {BODY_S:g} s"
        raise HTTPException(408, text, {"Connection": "close"}) from error
    except ClientDisconnect as error:
        raise ClientGone from error
    return b"".join(pieces)


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
