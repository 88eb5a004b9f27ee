"""Engine and responder together, every kind of end at once, with preemptions and a step of overlap: each stream gets
exactly one final response and a beginning of its tokens, and nothing stays behind."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from nmoe_backend.contract import ParsedRequest, ResponseOptions
from nmoe_backend.contract_outputs import Chunk
from nmoe_backend.engine import Engine
from nmoe_backend.lifecycle import RequestRecord
from nmoe_backend.responder import ChannelError, Responder
from nmoe_backend.text import Text
from nmoe_backend.types import EngineLimits, ErrorKind, Request
from tests.fakes import FakeRank, VirtualClock, expected_tokens, make_limits, make_request
from tests.responding import FakeChannel, FakeObserver
from tests.texts import make_folder

NUM_REQUESTS = 300
STEP_S = 0.01
ENDS = ("by itself", "stop string", "cancel", "finish", "leaves", "unreachable", "deadline", "embed")


class Client(FakeChannel):
    """Does what its case says once `after` tokens have come. Without `stream` that is never, but for "leaves"."""

    def __init__(self, case: Case, engine: Engine) -> None:
        super().__init__()
        self._case, self._engine = case, engine
        self.gone = case.ends == "leaves" and case.after == 0

    def send(self, chunk: Chunk, outputs: Sequence[str], final: bool) -> None:
        if len(self.ids()) >= self._case.after:
            if self._case.ends == "unreachable":
                raise ChannelError("broken pipe")
            if self._case.ends == "cancel":
                self._engine.cancel(self._case.request.request_id)
            if self._case.ends == "finish":
                self._engine.finish(self._case.request.request_id)
            self.gone = self._case.ends == "leaves"
        super().send(chunk, outputs, final)

    def is_cancelled(self) -> bool:
        assert not self.ended.is_set(), "asked behind the final response"
        return super().is_cancelled()


@dataclass
class Case:
    request: Request
    expected: list[int]
    ends: str
    after: int
    stream: bool


def draw_case(rng: random.Random, request_id: int, limits: EngineLimits, text: Text) -> Case:
    ends = rng.choice(ENDS)
    max_tokens = rng.choice([0, 1, 2, 5, 20, 34])
    request = make_request(
        request_id,
        [rng.randrange(limits.vocab_size) for _ in range(rng.randint(1, 30))],
        max_tokens,
        min_tokens=rng.choice([0, 3]) if max_tokens > 3 else 0,
        num_logprobs=rng.choice([None, None, 1]),
        num_prompt_logprobs=rng.choice([None, None, 0]),
        priority=rng.choice([0, 0, 1]),
        deadline_s=rng.uniform(0.0, 200 * STEP_S) if ends == "deadline" else None,
        embed=ends == "embed",
    )
    expected = expected_tokens(request, limits)
    if ends == "stop string" and len(whole := text.decode(expected)) > 3:
        at = rng.randrange(len(whole) - 2)
        request = replace(request, sampling=replace(request.sampling, stop=(whole[at : at + 2], "never")))
    return Case(request, expected, ends, rng.randrange(6), rng.random() < 0.7)


def check(case: Case, client: Client, text: Text) -> None:
    ids = client.ids()
    assert ids == case.expected[: len(ids)]
    if case.ends in ("by itself", "finish", "stop string", "embed"):
        assert client.error is None
    if case.ends == "by itself":
        assert ids == case.expected
        by_id = client.chunks[-1].finish_reason == "stop"
        assert client.text() == text.decode(ids[:-1] if by_id else ids)
    if case.ends == "embed":
        assert client.chunks[-1].embedding == [float(sum(case.request.prompt_ids))]
    if client.error is not None:
        kind = ErrorKind.DEADLINE if case.ends == "deadline" else ErrorKind.CANCELLED
        assert client.error.kind is kind


@pytest.mark.parametrize("seed", range(3))
def test_every_stream_ends_once_with_a_beginning_of_its_tokens(seed: int, tmp_path: Path) -> None:
    rng, text, clock = random.Random(seed), Text(make_folder(tmp_path)), VirtualClock()
    limits = make_limits(
        num_pages=24, max_batch_size=5, max_queue_size=NUM_REQUESTS, vocab_size=text.vocab_size, eos_token_ids=(7,)
    )
    ranks = [FakeRank(limits, idx, step_s=lambda plan: STEP_S, clock=clock) for idx in range(limits.num_ranks)]
    engine = Engine(ranks, limits, clock=clock)
    engine.start()
    responder = Responder(text, engine, FakeObserver())
    responder.start()
    cases = [draw_case(rng, request_id, limits, text) for request_id in range(NUM_REQUESTS)]
    clients = [Client(case, engine) for case in cases]
    for case, client in zip(cases, clients, strict=True):
        options = ResponseOptions(stream=case.stream, outputs=("text_output",))
        record = RequestRecord(request_id=case.request.request_id, client_id="", arrival_s=case.request.arrival_s)
        stream = responder.open(ParsedRequest(request=case.request, response=options), client, record)
        engine.submit(stream.request, stream)
    for case, client in zip(cases, clients, strict=True):
        assert client.ended.wait(30), f"{case} has no end"
        check(case, client, text)
    assert engine.drain(10)
    stats = engine.stats()
    assert (stats.pages_used, stats.num_running, stats.num_waiting, responder.num_live()) == (0, 0, 0, 0)
    assert stats.preemptions_total > 0
    assert engine.is_alive() and responder.is_alive()
    engine.close()
    responder.close(timeout_s=10)
