"""The gate without a server: keys, declared sizes, ids, and what it does to answers that have begun."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import orjson
import pytest
from starlette.types import Message, Receive, Scope, Send

from nmoe_backend.api.errors import ApiError
from nmoe_backend.api.gate import Gate, Keys
from nmoe_backend.api.metrics import ApiMetrics
from nmoe_backend.openai_config import OpenAIConfig

SETTINGS = OpenAIConfig(api_keys=("alpha", "beta"), max_request_bytes=1024)


class Inner:
    """An application that remembers what reached it, and answers or fails as told."""

    def __init__(self, error: BaseException | None = None, begins: bool = True) -> None:
        self.scopes: list[Scope] = []
        self._error, self._begins = error, begins

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        if self._begins and scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"x-own", b"1")]})
        if self._error is not None:
            raise self._error
        await send({"type": "http.response.body", "body": b"ok"})


def ask(
    inner: Inner, path: str = "/v1/models", headers: dict[str, str] | None = None, metrics: ApiMetrics | None = None
) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of one GET through the gate."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in (headers or {}).items()]
    scope: dict[str, Any] = {"type": "http", "method": "GET", "path": path, "headers": raw}
    gate = Gate(inner, SETTINGS, metrics or ApiMetrics())
    asyncio.run(gate(scope, receive, send))
    answered = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], answered, b"".join(message.get("body", b"") for message in sent)


@pytest.mark.parametrize("header", ["Bearer alpha", "bearer beta", "BEARER  alpha "])
def test_any_key_is_admitted_whatever_the_case_of_bearer(header: str) -> None:
    inner = Inner()
    assert ask(inner, headers={"Authorization": header})[0] == 200 and len(inner.scopes) == 1


@pytest.mark.parametrize(
    "header",
    ["", "alpha", "Bearer", "Bearer ", "Bearer alph", "Bearer alphaa", "Basic alpha", "Bearer \xe4", "Bearer Alpha"],
)
def test_anything_else_is_401_and_reaches_nobody(header: str) -> None:
    inner = Inner()
    status, headers, body = ask(inner, headers={"Authorization": header} if header else {})
    assert status == 401 and headers["www-authenticate"] == "Bearer" and not inner.scopes
    assert orjson.loads(body)["error"]["code"] == "invalid_api_key"
    assert headers["content-length"] == str(len(body)) and headers["x-request-id"].startswith("req-")


def test_without_keys_everybody_is_admitted() -> None:
    assert Keys(()).admit(b"") and Keys(()).admit(b"Bearer x")


def test_open_paths_are_exact() -> None:
    assert ask(Inner(), "/health")[0] == 200
    for path in ("/health/", "/healthz", "/v1/../health", "//health"):
        assert ask(Inner(), path)[0] == 401, path


@pytest.mark.parametrize(("length", "status"), [("1024", 200), ("1025", 413), ("9" * 30, 413), ("x", 200)])
def test_a_declared_length_is_checked(length: str, status: int) -> None:
    assert ask(Inner(), headers={"Authorization": "Bearer alpha", "Content-Length": length})[0] == status


GOOD_IDS = ("a.B:c_d-9", "x" * 128)
BAD_IDS = ("x" * 129, "", "a b", "a\nb", "é")


@pytest.mark.parametrize("given", [*GOOD_IDS, *BAD_IDS])
def test_a_sound_request_id_is_kept(given: str) -> None:
    inner = Inner()
    _, headers, _ = ask(inner, "/health", {"X-Request-ID": given})
    assert (headers["x-request-id"] == given) is (given in GOOD_IDS)
    assert inner.scopes[0]["state"]["request_id"] == headers["x-request-id"]

    assert headers["x-own"] == "1"


@pytest.mark.parametrize("given", [*GOOD_IDS, "", "two words"])
def test_the_session_is_the_clients_or_a_new_one_and_stands_in_every_answer(given: str) -> None:
    for inner in (Inner(), Inner(ApiError(503, "not ready"), begins=False)):
        _, headers, _ = ask(inner, headers={"Authorization": "Bearer alpha", "X-Session-Id": given})
        assert (headers["x-session-id"] == given) is (given in GOOD_IDS)
        assert given in GOOD_IDS or headers["x-session-id"].startswith("ses-")


def test_an_api_error_before_the_answer_becomes_the_answer() -> None:
    inner = Inner(ApiError(503, "not now"), begins=False)
    status, headers, body = ask(inner, "/health")
    assert (status, headers["retry-after"]) == (503, "1")
    assert orjson.loads(body)["error"]["message"] == "not now"


def test_an_error_behind_the_beginning_is_passed_on_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    metrics = ApiMetrics()
    with caplog.at_level(logging.INFO, "nmoe_backend"), pytest.raises(ApiError, match="late"):
        ask(Inner(ApiError(503, "late")), "/health", metrics=metrics)
    text = metrics.text().decode()
    assert 'nmoe_api_requests_total{endpoint="other",status="200"} 1.0' in text
    assert "nmoe_api_requests_live 0.0" in text
    (end,) = caplog.records  # /health leaves no line where all is well
    assert (vars(end)["event"], vars(end)["fields"]["status"], end.levelname) == ("error", 200, "ERROR")


def test_what_the_drain_cancels_before_it_began_is_a_503() -> None:
    metrics = ApiMetrics()
    status, headers, body = ask(Inner(asyncio.CancelledError(), begins=False), "/health", metrics=metrics)
    assert status == 503 and headers["retry-after"] and headers["x-request-id"]
    assert orjson.loads(body)["error"]["type"] == "service_unavailable_error"
    assert 'status="503"} 1.0' in metrics.text().decode()


def test_what_is_no_http_passes_untouched() -> None:
    inner = Inner(begins=False)

    async def lifespan() -> None:
        async def send(_message: Message) -> None: ...

        await Gate(inner, SETTINGS, ApiMetrics())({"type": "lifespan"}, send, send)  # type: ignore[arg-type]

    asyncio.run(lifespan())
    assert inner.scopes == [{"type": "lifespan"}]


def test_a_request_is_two_lines_with_its_id_and_its_end(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "nmoe_backend"):
        ask(Inner(), headers={"X-Request-ID": "mine", "Authorization": "Bearer alpha"})
        ask(
            Inner(ApiError(429, "full"), begins=False),
            headers={"X-Request-ID": "mine", "Authorization": "Bearer alpha"},
        )
    lines = [vars(record) for record in caplog.records]
    assert [line["event"] for line in lines] == ["received", "finished", "received", "refused"]
    assert all(line["fields"]["request_id"] == "mine" for line in lines)
    assert [line["fields"].get("status") for line in lines] == [None, 200, None, 429]
