"""What happens to every HTTP request before and after its endpoint: id, key, size, log line, metrics. Plain ASGI.

Not Starlette's BaseHTTPMiddleware: that copies every event of a stream through a queue and hides disconnects.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import sys
import time
import uuid
from collections.abc import Iterable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nmoe_backend.api.engine_client import TRACEPARENT
from nmoe_backend.api.errors import ApiError, shutting_down, too_large
from nmoe_backend.api.http import CUT_SHORT
from nmoe_backend.api.metrics import ApiMetrics
from nmoe_backend.event_log import log_event
from nmoe_backend.openai_config import OpenAIConfig

_LOG = logging.getLogger(__name__)
_OPEN_PATHS = ("/", "/health", "/ready", "/metrics", "/docs", "/openapi.json", "/favicon.ico")
_TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


class Gate:
    """Wraps the application. Immutable; any number of requests at a time."""

    def __init__(self, app: ASGIApp, settings: OpenAIConfig, metrics: ApiMetrics) -> None:
        self._app, self._metrics, self._max_bytes = app, metrics, settings.max_request_bytes
        self._keys = Keys(settings.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        request_id = _own_or_new(headers, b"x-request-id", "req")
        scope.setdefault("state", {})["request_id"] = request_id
        traceparent = headers.get(b"traceparent", b"").decode("latin-1")
        TRACEPARENT.set(traceparent if _TRACEPARENT.fullmatch(traceparent) else "")
        session_id = _own_or_new(headers, b"x-session-id", "ses")  # gateways route by it: docs/deploy.md
        answer = _Answer(send, {"x-request-id": request_id, "x-session-id": session_id})
        begun_s = time.perf_counter()
        level = logging.DEBUG if scope["path"] in _OPEN_PATHS else logging.INFO  # probes and scrapes are no news
        who = {"request_id": request_id, "method": scope["method"], "path": scope["path"]}
        log_event(_LOG, "received", who, level)
        self._metrics.begun()
        try:
            self._check(scope, headers)
            await self._app(scope, receive, answer.send)
        except ApiError as error:
            if answer.status:
                raise
            await answer.refuse(error)
        except asyncio.CancelledError:  # by uvicorn, drain_s behind SIGTERM
            if answer.status:
                raise
            await answer.refuse(shutting_down())
        except Exception:
            if not answer.is_whole:  # else it was logged and answered; raised again it would reset the connection
                raise
        finally:
            took_s = time.perf_counter() - begun_s
            route = scope.get("route")
            path = getattr(route, "path", "other")  # a template: labels stay few
            is_cut = not answer.status or scope["state"].get(CUT_SHORT, False)
            status = 499 if is_cut else answer.status
            self._metrics.ended(path, status, took_s)
            first_byte_s = None if answer.begun_s is None else round(answer.begun_s - begun_s, 6)
            took = {"status": status, "first_byte_s": first_byte_s, "latency_s": round(took_s, 6)}
            ending = _ending(status, sys.exception())
            log_event(_LOG, ending, who | took, logging.ERROR if ending == "error" else level)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        needs_key = scope["path"] not in _OPEN_PATHS
        if needs_key and not self._keys.admit(headers.get(b"authorization", b"")):
            raise ApiError(
                401, "the API key is missing or wrong. Send it as `Authorization: Bearer KEY`.", code="invalid_api_key"
            )
        # A body without a length is counted while it is read.
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_bytes:
            raise too_large(self._max_bytes)


class Keys:
    """Compares digests of equal length, all of them, so that the time says nothing about which or how much matched."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def admit(self, authorization: bytes) -> bool:
        """Whether the header holds one of the keys; always, where there are none."""
        if not self._digests:
            return True
        scheme, _, key = authorization.partition(b" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == b"bearer" and any(matches)


class _Answer:
    """The way out: adds the ids, remembers the status."""

    def __init__(self, send: Send, ids: dict[str, str]) -> None:
        self._send = send
        self._ids = [(name.encode(), value.encode()) for name, value in ids.items()]
        self.status = 0
        self.begun_s: float | None = None  # when its first byte was there
        self.is_whole = False

    async def send(self, message: Message) -> None:
        """Pass a message on."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.begun_s = time.perf_counter()
            message = {**message, "headers": [*message.get("headers", ()), *self._ids]}
        await self._send(message)
        self.is_whole = message["type"] == "http.response.body" and not message.get("more_body", False)

    async def refuse(self, error: ApiError) -> None:
        """The whole answer."""
        body = error.body()
        headers: list[Any] = [(name.lower().encode(), value.encode()) for name, value in error.headers().items()]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def _ending(status: int, raised: BaseException | None) -> str:
    """How a request ended, in the words of the engine's log."""
    if isinstance(raised, Exception) or (status >= 500 and status != 503):
        return "error"
    return "cancelled" if status == 499 else "finished" if status < 400 else "refused"


def _own_or_new(headers: dict[bytes, bytes], name: bytes, prefix: str) -> str:
    """The client's id where it sent one that may stand in a log, or a new one."""
    given = headers.get(name, b"").decode("latin-1")
    return given if _ID.fullmatch(given) else f"{prefix}-{uuid.uuid4().hex}"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
