"""The log of a live server: a line for each event, the request's id in each, and no word of a prompt."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from perf.scripted import ROOT
from tests.server.client import Stream
from tests.server.scripted_streams import scripted
from tests.triton_server import TritonServer

LIMIT_S = 10.0
SECRET = "quince marmalade"


def events(server: TritonServer, **wanted: object) -> list[dict[str, Any]]:
    """Our lines that have these fields."""
    lines = [json.loads(line) for line in server.lines if line.startswith('{"time"')]
    return [line for line in lines if all(line.get(name) == value for name, value in wanted.items())]


def wait_for(server: TritonServer, **wanted: object) -> dict[str, Any]:
    limit = time.monotonic() + LIMIT_S
    while not (found := events(server, **wanted)):
        ours = [line for line in server.lines if '"time"' in line]  # one that begins inside of another's is among them
        assert time.monotonic() < limit, (wanted, ours)
        time.sleep(0.02)
    return found[0]


@pytest.mark.parametrize("log_prompts", [False, True])
def test_each_event_is_a_line_and_prompts_only_where_asked_for(
    model_path: Path, tmp_path: Path, log_prompts: bool
) -> None:
    config, repository = scripted(model_path, tmp_path, step_ms=5)
    config.write_text(f"log_prompts = {json.dumps(log_prompts)}\n" + config.read_text())
    with TritonServer(config, repository) as server:
        assert wait_for(server, event="engine_started")["ranks"] == 2
        with Stream(server.grpc) as stream:
            values = {"text_input": SECRET, "stream": True, "ignore_eos": True}
            answer = stream.ask({**values, "max_tokens": 3}, request_id="one")
            stream.ask({**values, "max_tokens": 10**6}, request_id="two")
            stream.ask({**values, "max_tokens": 4000, "deadline_ms": 50}, request_id="three")
        finished = wait_for(server, event="finished", request_id="one")
        assert (finished["tokens"], finished["responses"], finished["finish_reason"]) == (
            3,
            len(answer.responses),
            "length",
        )
        assert [line["event"] for line in events(server, request_id="one")] == ["received", "first_token", "finished"]
        assert wait_for(server, event="refused", request_id="two")["kind"] == "invalid"
        assert wait_for(server, event="error", request_id="three")["kind"] == "deadline"
        received = wait_for(server, event="received", request_id="one")
        assert received["max_tokens"] == 3 and received["prompt_tokens"] > 0
        assert SECRET in received.get("prompt", "") if log_prompts else "prompt" not in received
    assert (SECRET in "".join(server.lines)) is log_prompts
    draining, stopped = (wait_for(server, event=name) for name in ("engine_draining", "engine_stopped"))
    assert draining["live_requests"] == 0 and stopped["drained"] is True


def test_a_failure_of_the_engine_is_a_line_with_its_cause(model_path: Path, tmp_path: Path) -> None:
    config, repository = scripted(model_path, tmp_path, step_ms=5)
    (repository / "deepseek_v3" / "1" / "model.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from perf.scripted import scripted_model\nfrom tests.server.failing_engine import start_failing\n"
        "TritonPythonModel = scripted_model(start_failing)\n"
    )
    with TritonServer(config, repository) as server:
        body = {"text_input": "hello", "max_tokens": 200, "ignore_eos": True, "id": "mine"}
        assert server.post("v2/models/deepseek_v3/generate", body)[0] >= 400
        failed = wait_for(server, event="engine_failed")
        assert failed["level"] == "critical" and "fell off the bus" in failed["cause"] and failed["exception"]
        assert wait_for(server, event="error", request_id="mine")["kind"] == "engine"
