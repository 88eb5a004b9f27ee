"""Priority and the queue limit, seen by clients of a live server with few slots and scripted steps."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx

from perf.scripted import benchmark_table, write_repository
from tests.front_end import FrontEnd
from tests.server.client import Stream
from tests.server.metrics import settled
from tests.triton_server import TritonServer, write_config

GREEDY: dict[str, object] = {"text_input": "hello", "ignore_eos": True, "stream": True}


def test_a_higher_priority_goes_first_and_a_full_queue_refuses(model_path: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.toml", model_path, gpus=[0, 1], max_batch_size=1, max_queue_size=4)
    config.write_text(config.read_text() + benchmark_table({"step_ms": 20}))
    with TritonServer(config, write_repository(tmp_path)) as server, ExitStack() as stack:
        streams = [stack.enter_context(Stream(server.grpc)) for _ in range(7)]
        running, waiting, refused = streams[:2], streams[2:6], streams[6]
        for stream in running:
            stream.send({**GREEDY, "max_tokens": 100})
            stream.read()
        for priority, stream in enumerate(waiting):
            stream.send({**GREEDY, "max_tokens": 30, "priority": priority})
        settled(server, {"nmoe_requests_waiting": 4.0})
        assert "max_queue_size=4" in refused.ask({**GREEDY, "max_tokens": 1}).error
        answers = [stream.read_all() for stream in waiting]
        assert [answer.error for answer in answers] == [""] * 4
        started_s = [answer.responses[0].at_s for answer in answers]
        assert max(started_s[2:]) < min(started_s[:2])  # two slots: the two highest, then the others
        assert refused.ask({**GREEDY, "max_tokens": 1}).error == ""
        for stream in running:
            assert stream.read_all().error == ""


def test_refusals_through_the_front_end_leave_the_server_whole(model_path: Path, tmp_path: Path) -> None:
    """This server once died of an error in some hundreds, and of each it complained."""
    config = write_config(tmp_path / "c.toml", model_path, gpus=[0, 1], max_batch_size=1, max_queue_size=1)
    config.write_text(config.read_text() + benchmark_table({"step_ms": 50}))
    with TritonServer(config, write_repository(tmp_path)) as server, FrontEnd(config, server.grpc) as front:
        with ExitStack() as stack, httpx.Client(timeout=60.0) as client:
            streams = [stack.enter_context(Stream(server.grpc)) for _ in range(3)]
            for stream in streams:  # two slots, and the queue
                stream.send({**GREEDY, "max_tokens": 1000})
                if stream is not streams[-1]:
                    stream.read()
            settled(server, {"nmoe_requests_waiting": 1.0})

            def ask(_: int) -> int:
                body = {"model": "tiny", "prompt": "hello", "max_tokens": 1}
                return client.post(f"{front.url}/v1/completions", json=body).status_code

            with ThreadPoolExecutor(8) as pool:
                assert Counter(pool.map(ask, range(50))) == {429: 50}
            for stream in streams:
                stream.disconnect()
        assert not [line for line in server.lines if "HandleCancellation" in line]
        assert server.process.exit_code() is None
