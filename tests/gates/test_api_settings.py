"""Gate: what the [openai] table sets, on a live front end of two worker processes: keys, sizes, pages, ids, metrics."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from openai import AuthenticationError, NotFoundError, OpenAI

from nmoe_backend.server_process import group_members
from tests.api.live import KEYS, MODEL
from tests.front_end import FrontEnd
from tests.waiting import wait_until

PAGE = "http://page.example"
PATH = "/v1/completions"
BODY = {"model": MODEL, "prompt": "x", "max_tokens": 2}
BEARER = {"Authorization": f"Bearer {KEYS[0]}"}


@pytest.fixture
def http(guarded_api: FrontEnd) -> Iterator[httpx.Client]:
    """A connection for each test, so that tests meet both workers."""
    with httpx.Client(base_url=guarded_api.url, trust_env=False, timeout=30.0) as client:
        yield client


def test_every_key_opens_and_no_other_does(guarded_api: FrontEnd) -> None:
    def models(key: str) -> Any:
        with OpenAI(base_url=f"{guarded_api.url}/v1", api_key=key, max_retries=0) as client:
            return client.models.list().data

    for key in KEYS:
        assert models(key)[0].id == MODEL
    for key in ("", "x", KEYS[0][:-1], KEYS[0] + "x", ", ".join(KEYS[:2]), "# a comment"):
        with pytest.raises((AuthenticationError, httpx.LocalProtocolError)) as caught:
            models(key or "none")
        if isinstance(caught.value, AuthenticationError):
            assert caught.value.code == "invalid_api_key"


@pytest.mark.parametrize("header", [{}, {"Authorization": KEYS[0]}, {"Authorization": f"Basic {KEYS[0]}"}], ids=str)
def test_a_missing_key_is_401_before_the_body_is_read(http: httpx.Client, header: dict[str, str]) -> None:
    answer = http.post(PATH, json=BODY, headers=header)
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["type"] == "authentication_error"
    assert http.post("/v1/nothing", headers=header).status_code == 401, "who has no key learns no paths"


def test_what_watches_a_server_needs_no_key(http: httpx.Client) -> None:
    for path in ("/health", "/ready", "/metrics", "/openapi.json", "/docs", "/"):
        assert http.get(path).status_code == 200, path


def test_bodies_above_the_limit_are_413_with_and_without_a_length(http: httpx.Client) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(8):
            yield b" " * 1024

    headers = {**BEARER, "Content-Type": "application/json"}
    for content in (b" " * 5000, pieces()):
        answer = http.post(PATH, content=content, headers=headers)
        assert answer.status_code == 413
        assert "at most 4096 bytes" in answer.json()["error"]["message"]
    fits = json.dumps(BODY).encode().ljust(4096)
    assert http.post(PATH, content=fits, headers=headers).status_code == 200


def test_pages_of_one_origin_may_call_and_read_errors(http: httpx.Client) -> None:
    preflight = {
        "Origin": PAGE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    answer = http.options(PATH, headers=preflight)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()
    for key, status in ((BEARER, 200), ({}, 401)):
        answer = http.post(PATH, json=BODY, headers={**key, "Origin": PAGE})
        assert answer.status_code == status and answer.headers["access-control-allow-origin"] == PAGE
        assert "x-request-id" in answer.headers["access-control-expose-headers"].lower()
    other = http.post(PATH, json=BODY, headers={**BEARER, "Origin": "http://else.example"})
    assert "access-control-allow-origin" not in other.headers


def test_request_ids_come_back_and_stand_in_the_log(guarded_api: FrontEnd, http: httpx.Client) -> None:
    cases = (("mine-42.a", 200, BODY), ("mine-43", 400, {**BODY, "n": 0}), ("mine-44", 404, {**BODY, "model": "no"}))
    for given, status, body in cases:
        answer = http.post(PATH, json=body, headers={**BEARER, "X-Request-ID": given})
        assert (answer.status_code, answer.headers["x-request-id"]) == (status, given)
        line = re.compile(rf'"request_id": "{re.escape(given)}".*"path": "{PATH}", "status": {status}, ')
        wait_until(lambda line=line: any(map(line.search, guarded_api.lines)), f"a log line of {given}", 5)  # type: ignore[misc]
    drawn = http.get("/health", headers={"X-Request-ID": "has spaces in it"}).headers["x-request-id"]
    assert re.fullmatch(r"req-[0-9a-f]{32}", drawn)
    assert not any(key in line for line in guarded_api.lines for key in KEYS), "keys do not stand in the log"


def test_embeddings_are_off_unless_configured(guarded_api: FrontEnd) -> None:
    with OpenAI(base_url=f"{guarded_api.url}/v1", api_key=KEYS[2], max_retries=0) as client:
        with pytest.raises(NotFoundError) as caught:
            client.embeddings.create(model=MODEL, input="x")
    assert "embeddings = true" in caught.value.message


def _count(url: str) -> float:
    """Answered completions, as a worker's /metrics tells it."""
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    rows = re.findall(rf'nmoe_api_requests_total{{endpoint="{PATH}",status="200"}} (\S+)', text)
    return float(rows[0]) if rows else 0.0


def test_the_metrics_of_either_worker_are_the_sum_of_both(guarded_api: FrontEnd) -> None:
    before = _count(guarded_api.url)
    for _ in range(12):
        answer = httpx.post(f"{guarded_api.url}{PATH}", json=BODY, headers=BEARER, trust_env=False)
        assert answer.status_code == 200
    wait_until(lambda: _count(guarded_api.url) == before + 12, "twelve more completions", 5)
    assert {_count(guarded_api.url) for _ in range(8)} == {before + 12}, "whichever worker is asked"
    text = httpx.get(f"{guarded_api.url}/metrics", trust_env=False).text
    assert re.search(r'nmoe_api_request_seconds_count\{endpoint="/v1/completions"\} \d', text)


def _live(url: str) -> float:
    """Requests that are being answered, but for the one that asks."""
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    return float(re.findall(r"^nmoe_api_requests_live (\S+)$", text, re.MULTILINE)[0]) - 1


def test_the_metric_of_live_requests_follows_them(guarded_api: FrontEnd) -> None:
    wait_until(lambda: _live(guarded_api.url) == 0, "no live requests", 10)
    body = {**BODY, "max_tokens": 1000, "ignore_eos": True, "stream": True}
    readers = []
    with ExitStack() as stack:
        for count in (1, 2, 3):
            one = stack.enter_context(httpx.Client(base_url=guarded_api.url, trust_env=False, timeout=30.0))
            answer = stack.enter_context(one.stream("POST", PATH, json=body, headers=BEARER))
            readers.append(answer.iter_lines())  # one that is let go closes its connection
            assert next(readers[-1]).startswith("data: ")
            assert _live(guarded_api.url) == count
    wait_until(lambda: _live(guarded_api.url) == 0, "no live requests", 10)


def test_a_worker_that_dies_is_replaced(guarded_api: FrontEnd) -> None:
    def workers() -> set[int]:
        """Children that serve; Python's resource tracker is one too, and holds no socket."""
        return {
            pid for pid in group_members(guarded_api.process.pid) if pid != guarded_api.process.pid and _serves(pid)
        }

    wait_until(lambda: len(workers()) == 2, "two workers", 20)
    first = min(workers())
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: len(workers() - {first}) == 2, "another worker in place of the dead one", 30)
    for _ in range(6):
        answer = httpx.post(f"{guarded_api.url}{PATH}", json=BODY, headers=BEARER, trust_env=False, timeout=30.0)
        assert answer.status_code == 200


def _serves(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"spawn_main" in file.read()
    except OSError:
        return False
