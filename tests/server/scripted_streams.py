"""A server whose steps take a set time, and streams that run on it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from perf.scripted import benchmark_table, write_repository
from tests.server.client import Answer, Stream
from tests.triton_server import TritonServer, write_config
from tests.waiting import wait_until

LONG: dict[str, object] = {"text_input": "hello", "ignore_eos": True, "stream": True}


def scripted(model_path: Path, folder: Path, step_ms: float) -> tuple[Path, Path]:
    """A config and a repository whose steps take step_ms, on two ranks."""
    config = write_config(folder / "scripted.toml", model_path, gpus=[0, 1], max_seq_len=4096)
    config.write_text(config.read_text() + benchmark_table({"step_ms": step_ms}))
    return config, write_repository(folder)


@contextmanager
def running_streams(server: TritonServer, count: int, max_tokens: int) -> Iterator[list[Future[Answer]]]:
    """Streams that have got their first token; a broken connection counts as an error."""

    def ask(index: int) -> Answer:
        with Stream(server.grpc) as stream:
            stream.send({**LONG, "max_tokens": max_tokens}, ("deepseek_v3", "ensemble")[index % 2])
            first = stream.read()
            started.append(first)
            answer = stream.read_all()
            if not isinstance(first, str):
                answer.responses.insert(0, first)
            return answer

    started: list[object] = []
    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(ask, index) for index in range(count)]
        wait_until(lambda: len(started) == count, "all streams have started")
        yield futures
