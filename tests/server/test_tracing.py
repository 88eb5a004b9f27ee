"""Traces of a live server, as a collector gets them: the caller's, Triton's and the engine's spans are one trace."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import aclosing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nmoe_backend.api.engine_client import TEXT_OUTPUTS, TRACEPARENT, EngineClient
from tests.server.scripted_streams import scripted
from tests.triton_server import TritonServer

LIMIT_S = 20.0
SPAN = "b7ad6b7169203331"


class Collector:
    """Takes OTLP in JSON, as Triton and the SDK send it."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                for resource in body["resourceSpans"]:
                    for scope in resource["scopeSpans"]:
                        collector.spans += scope["spans"]
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/traces"

    def trace(self, trace_id: str) -> dict[str, dict[str, Any]]:
        """Name -> span."""
        return {span["name"]: span for span in self.spans if span["traceId"] == trace_id}

    def wait_for(self, trace_id: str, names: set[str]) -> dict[str, dict[str, Any]]:
        limit = time.monotonic() + LIMIT_S
        while not names <= {*(found := self.trace(trace_id))}:
            assert time.monotonic() < limit, str([one["name"] + one["traceId"][:2] for one in self.spans])
            time.sleep(0.05)
        return found


@pytest.fixture
def collector() -> Iterator[Collector]:
    one = Collector()
    thread = threading.Thread(target=one.server.serve_forever)
    thread.start()
    yield one
    one.server.shutdown()
    one.server.server_close()
    thread.join()


def assert_one_trace(spans: dict[str, dict[str, Any]]) -> None:
    """caller -> InferRequest -> deepseek_v3 (both Triton's) -> request -> its phases."""
    assert spans["InferRequest"]["parentSpanId"] == SPAN
    assert spans["deepseek_v3"]["parentSpanId"] == spans["InferRequest"]["spanId"]
    assert spans["request"]["parentSpanId"] == spans["deepseek_v3"]["spanId"]
    phases = [spans[name] for name in ("queue", "prefill", "decode", "prefill and decode") if name in spans]
    assert len(phases) >= 2 and all(span["parentSpanId"] == spans["request"]["spanId"] for span in phases)
    begin, end = (int(spans["request"][f"{side}TimeUnixNano"]) for side in ("start", "end"))
    assert int(phases[0]["startTimeUnixNano"]) == begin and int(phases[-1]["endTimeUnixNano"]) == end
    assert abs(begin - int(spans["deepseek_v3"]["startTimeUnixNano"])) < 1e9  # the same clock


def test_a_request_is_one_trace_from_the_caller_to_the_last_token(
    model_path: Path, tmp_path: Path, collector: Collector
) -> None:
    config, repository = scripted(model_path, tmp_path, step_ms=5)
    config.write_text(f'trace_endpoint = "{collector.url}"\n' + config.read_text())
    by_http, by_grpc = (digit * 32 for digit in "ab")

    async def generate(address: str) -> None:
        TRACEPARENT.set(f"00-{by_grpc}-{SPAN}-01")
        client = EngineClient(address)
        inputs = {"text_input": "hello", "max_tokens": 5, "stream": True, "ignore_eos": True}
        async with aclosing(client.generate(inputs, TEXT_OUTPUTS, "req-1", LIMIT_S)) as deltas:
            assert [delta async for delta in deltas][-1].finish_reason == "length"
        await client.close()

    with TritonServer(config, repository) as server:
        asyncio.run(generate(server.grpc))
        url = f"http://{server.http}/v2/models/deepseek_v3/generate"
        headers = {"traceparent": f"00-{by_http}-{SPAN}-01"}
        request = urllib.request.Request(url, b'{"text_input": "hello", "max_tokens": 5}', headers)
        with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
            assert answer.status == 200
        names = {"InferRequest", "deepseek_v3", "request", "queue"}
        found = [
            collector.wait_for(by_grpc, names | {"prefill", "decode"}),
            collector.wait_for(by_http, names | {"prefill and decode"}),
        ]
    for spans in found:
        assert_one_trace(spans)
    attributes = {one["key"]: one["value"] for one in found[0]["request"]["attributes"]}
    assert attributes["nmoe.request_id"] == {"stringValue": "req-1"}
    assert int(attributes["gen_ai.usage.output_tokens"]["intValue"]) == 5
