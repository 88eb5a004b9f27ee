"""min_response_interval_ms: chunks grow, nothing is lost, and neither the first nor the last response waits."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings, strategies as st

from nmoe_backend.contract_outputs import Chunk
from nmoe_backend.responder import Stream
from nmoe_backend.text import Text
from nmoe_backend.types import ErrorKind
from tests.responding import WAIT_S, Desk, FakeChannel, put_text


class PacedDesk(Desk):
    """A clock that stands still unless it is set; senders and pacer run in the test's thread."""

    def __init__(self, text: Text) -> None:
        self.now_s = 100.0
        super().__init__(text, clock=lambda: self.now_s)

    def run(self) -> None:
        """All that there is to do at this time."""
        self.responder._pacer.tick()
        while len(self.responder._ready):
            stream = self.responder._ready.get()
            assert stream is not None
            self.responder.serve(stream)


class TimedChannel(FakeChannel):
    """Notes when each response left. `before_return` is called inside a send."""

    def __init__(self, desk: PacedDesk) -> None:
        super().__init__()
        self.times: list[float] = []
        self.before_return = lambda: None
        self._desk = desk

    def send(self, chunk: Chunk, outputs: Sequence[str], final: bool) -> None:
        super().send(chunk, outputs, final)
        self.times.append(self._desk.now_s)
        self.before_return()


@pytest.fixture
def desk(text: Text) -> PacedDesk:
    return PacedDesk(text)


def test_what_comes_within_the_interval_leaves_at_its_end_as_one_chunk(desk: PacedDesk) -> None:
    channel = TimedChannel(desk)
    stream = desk.open(channel, min_interval_s=0.1)
    for step in range(25):
        desk.now_s = 100.0 + step / 100
        stream.put(3 + step)
        desk.run()
    assert channel.times == [100.0, 100.1, 100.2]
    assert [len(chunk.token_ids) for chunk in channel.chunks] == [1, 10, 10]


def test_a_token_that_comes_behind_the_interval_leaves_at_once(desk: PacedDesk) -> None:
    channel = TimedChannel(desk)
    stream = desk.open(channel, min_interval_s=0.1)
    for now_s in (100.0, 100.5, 101.0):
        desk.now_s = now_s
        desk.run()
        stream.put(3)
        desk.run()
    assert channel.times == [100.0, 100.5, 101.0]


def test_nothing_follows_a_final_response_that_the_engine_did_not_send_itself(desk: PacedDesk, text: Text) -> None:
    """A stop string ends a stream before the engine does, and so does a client that is gone."""

    def by_close(stream: Stream) -> None:
        stream.close("stop")

    def by_token(stream: Stream) -> None:
        stream.put(5, None, "length")

    for end in (by_close, by_token):
        channel = TimedChannel(desk)
        stream = desk.open(channel, min_interval_s=10.0, stop=("b",))
        put_text(text, stream, "b", None)
        desk.run()
        assert [chunk.finish_reason for chunk in channel.chunks] == ["stop"]
        end(stream)
        desk.run()
        assert len(channel.chunks) == 1 and channel.error is None


def test_the_final_response_does_not_wait(desk: PacedDesk) -> None:
    def by_token(stream: Stream) -> None:
        stream.put(4, None, "length")

    def by_error(stream: Stream) -> None:
        stream.close("error")

    for end in (by_token, by_error):
        channel = TimedChannel(desk)
        stream = desk.open(channel, min_interval_s=10.0)
        stream.put(3)
        desk.run()
        stream.put(5)
        desk.run()
        assert not channel.ended.is_set()
        end(stream)
        desk.run()
        assert channel.ended.is_set()
        desk.now_s += 20.0
        desk.run()  # what still stands in the pacer's list wakes nobody
    assert desk.observer.ends == [None, ErrorKind.ENGINE]


def test_an_end_that_comes_while_a_response_is_sent_does_not_wait_either(desk: PacedDesk) -> None:
    channel = TimedChannel(desk)
    stream = desk.open(channel, min_interval_s=10.0)

    def end() -> None:
        channel.before_return = lambda: None
        stream.put(4, None, "length")

    channel.before_return = end
    stream.put(3)
    desk.run()
    assert channel.ended.is_set()
    assert channel.ids() == [3, 4]


def test_without_an_interval_nobody_rests(desk: PacedDesk) -> None:
    stream = desk.open(TimedChannel(desk))
    stream.put(3)
    desk.run()
    stream.put(4)
    assert len(desk.responder._ready) == 1
    assert not desk.responder._pacer._heap and desk.responder._pacer._arrivals.empty()


@settings(max_examples=200, deadline=None)
@given(
    interval=st.integers(1, 30),
    streams=st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=20), min_size=1, max_size=4),
)
def test_no_response_is_early_and_none_late_whatever_the_arrivals(
    text: Text, interval: int, streams: list[list[int]]
) -> None:
    """Milliseconds; a stream is the times of its tokens, the last of which ends it."""
    desk = PacedDesk(text)
    channels = [TimedChannel(desk) for _ in streams]
    opened = [desk.open(channel, min_interval_s=interval) for channel in channels]
    for now in range(62):
        desk.now_s = float(now)
        for stream, times in zip(opened, map(sorted, streams), strict=True):
            for index, time in enumerate(times):
                if time == now:
                    stream.put(index, None, "length" if index == len(times) - 1 else None)
        desk.run()
    for channel, times in zip(channels, map(sorted, streams), strict=True):
        assert channel.ids() == list(range(len(times)))
        assert channel.times == response_times(times, interval)


def response_times(times: list[int], interval: int) -> list[int]:
    """When responses leave, by the rule in its plainest words."""
    sent: list[int] = []
    for now in range(62):
        waits = any(time <= now and (not sent or time > sent[-1]) for time in times)
        if waits and (not sent or now >= sent[-1] + interval or times[-1] <= now):
            sent.append(now)
    return sent


def test_with_threads_every_token_arrives_once_and_in_order(running: object, text: Text) -> None:
    desk = running()  # type: ignore[operator]
    rng = random.Random(5)
    channels = [FakeChannel() for _ in range(30)]
    streams = [desk.open(channel, min_interval_s=rng.choice((0.0, 0.001, 0.02))) for channel in channels]
    for step in range(200):
        for stream in streams:
            stream.put(step, None, "length" if step == 199 else None)
    for channel in channels:
        assert channel.ended.wait(WAIT_S)
        assert channel.ids() == list(range(200))
    assert desk.responder.num_live() == 0
