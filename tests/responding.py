"""A responder between a pretended engine and pretended channels, worked by hand in the test's thread."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence

from nmoe_backend.contract import ParsedRequest, ResponseOptions
from nmoe_backend.contract_outputs import Chunk
from nmoe_backend.lifecycle import RequestRecord
from nmoe_backend.responder import ChannelError, Responder
from nmoe_backend.text import Text
from nmoe_backend.types import ErrorKind, FinishReason, Request, RequestError, SamplingParams

ALL = ("text_output", "output_ids", "finish_reason")
WAIT_S = 10.0


class FakeChannel:
    """Keeps what it is given. `ended` is set by the final response; `fails` counts sends that go wrong first."""

    def __init__(self, fails: int = 0) -> None:
        self.chunks: list[Chunk] = []
        self.error: RequestError | None = None
        self.ended = threading.Event()
        self.gone = False
        self.polls = 0
        self._fails = fails

    def send(self, chunk: Chunk, outputs: Sequence[str], final: bool) -> None:
        if self._fails:
            self._fails -= 1
            raise ChannelError("broken pipe")
        assert not self.ended.is_set(), "a response behind the final one"
        self.chunks.append(chunk)
        if final:
            self.ended.set()

    def fail(self, error: RequestError) -> None:
        assert not self.ended.is_set(), "a response behind the final one"
        self.error = error
        self.ended.set()

    def is_cancelled(self) -> bool:
        self.polls += 1
        return self.gone

    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    def ids(self) -> list[int]:
        return [token_id for chunk in self.chunks for token_id in chunk.token_ids]


class FakeEngine:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.cancelled: list[int] = []
        self.finished: list[tuple[int, str]] = []

    def cancel(self, request_id: int) -> None:
        self.cancelled.append(request_id)

    def finish(self, request_id: int, reason: FinishReason = "stop") -> None:
        self.finished.append((request_id, reason))


class FakeObserver:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.more: list[tuple[float, int]] = []
        self.ends: list[ErrorKind | None] = []

    def received(self, record: RequestRecord) -> None:
        raise AssertionError("the face says so")

    def refused(self, record: RequestRecord) -> None:
        raise AssertionError("the face says so")

    def first_tokens(self, record: RequestRecord, num_tokens: int) -> None:
        assert record.first_token_s is not None and record.num_tokens == num_tokens
        self.first.append(record.first_token_s - record.arrival_s)

    def more_tokens(self, gap_s: float, num_tokens: int) -> None:
        self.more.append((gap_s, num_tokens))

    def ended(self, record: RequestRecord) -> None:
        assert record.ended_s is not None and record.finish_reason is not None
        self.ends.append(None if record.error is None else record.error.kind)


class Desk:
    """A responder with fakes around it. `serve` runs its senders' work in the test's thread."""

    def __init__(self, text: Text, **options: object) -> None:
        self.engine, self.observer = FakeEngine(), FakeObserver()
        self.responder = Responder(text, self.engine, self.observer, **options)  # type: ignore[arg-type]
        self._ids = itertools.count(1)

    def open(
        self,
        channel: FakeChannel,
        *,
        stream: bool = True,
        echo: str = "",
        outputs: tuple[str, ...] = ALL,
        min_interval_s: float = 0.0,
        **sampling: object,
    ):  # type: ignore[no-untyped-def]
        request = Request(
            request_id=next(self._ids),
            prompt_ids=(1, 2),
            sampling=SamplingParams(**sampling),  # type: ignore[arg-type]
            arrival_s=0.0,
        )
        options = ResponseOptions(stream=stream, outputs=outputs, echo=echo, min_interval_s=min_interval_s)
        record = RequestRecord(request_id=request.request_id, client_id="", arrival_s=request.arrival_s)
        return self.responder.open(ParsedRequest(request=request, response=options), channel, record)


def put_text(text: Text, stream: object, string: str, finish: FinishReason | None = "length") -> list[int]:
    ids = text.encode_plain(string)
    for index, token_id in enumerate(ids):
        stream.put(token_id, None, finish if index == len(ids) - 1 else None)  # type: ignore[attr-defined]
    return ids
