"""responder.py: order, completeness, stop strings, endings and cancellation, without Triton and without an engine."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings, strategies as st

from nmoe_backend.contract_outputs import Chunk
from nmoe_backend.responder import ChannelError
from nmoe_backend.text import Text
from nmoe_backend.types import ErrorKind, FinishReason, RequestError, TokenLogprobs
from tests.responding import WAIT_S, Desk, FakeChannel, put_text
from tests.texts import stop_reference


@pytest.fixture
def desk(text: Text) -> Desk:
    return Desk(text)


def test_tokens_that_wait_leave_as_one_chunk_and_the_last_one_is_final(desk: Desk, text: Text) -> None:
    channel = FakeChannel()
    stream = desk.open(channel)
    first = put_text(text, stream, "hello ", None)
    desk.responder.serve(stream)
    second = put_text(text, stream, "world")
    desk.responder.serve(stream)
    assert [chunk.token_ids for chunk in channel.chunks] == [first, second]
    assert [chunk.finish_reason for chunk in channel.chunks] == [None, "length"]
    assert channel.text() == "hello world"
    assert desk.responder.num_live() == 0


def test_a_token_is_sent_at_once_even_when_its_character_is_not_whole(desk: Desk, text: Text) -> None:
    channel = FakeChannel()
    stream = desk.open(channel)
    ids = text.encode_plain("\U0001f600")
    for index, token_id in enumerate(ids):
        stream.put(token_id, None, "length" if index == len(ids) - 1 else None)
        desk.responder.serve(stream)
    assert [chunk.text for chunk in channel.chunks] == [""] * (len(ids) - 1) + ["\U0001f600"]
    assert channel.ids() == ids


def test_half_a_character_at_the_end_becomes_u_fffd(desk: Desk, text: Text) -> None:
    channel = FakeChannel()
    stream = desk.open(channel)
    stream.put(text.encode_plain("\U0001f600")[0], None, "length")
    desk.responder.serve(stream)
    assert channel.text() == "\ufffd"


def test_without_stream_one_response_holds_everything(desk: Desk, text: Text) -> None:
    for sampling in ({}, {"stop": ("XYZ",)}):
        channel = FakeChannel()
        stream = desk.open(channel, stream=False, echo="P:", **sampling)
        ids = put_text(text, stream, "hello world", None)
        desk.responder.serve(stream)
        assert channel.chunks == []
        ids += put_text(text, stream, " and more")
        desk.responder.serve(stream)
        assert len(channel.chunks) == 1
        assert (channel.text(), channel.ids()) == ("P:hello world and more", ids)


def test_the_token_that_ends_a_sequence_is_listed_and_has_no_text(desk: Desk, text: Text) -> None:
    channel = FakeChannel()
    stream = desk.open(channel)
    ids = put_text(text, stream, "hello w", "stop")
    desk.responder.serve(stream)
    assert channel.ids() == ids
    assert channel.text() == text.decode(ids[:-1])
    assert desk.engine.finished == []


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_stop_string_cuts_text_and_ids_at_the_same_token_in_any_cut(text: Text, data: st.DataObject) -> None:
    string = data.draw(st.text("hel wo\né", min_size=1, max_size=30))
    stop = tuple(data.draw(st.lists(st.text("hel wo\né", min_size=1, max_size=4), min_size=1, max_size=3)))
    ids = text.encode_plain(string)
    cuts = data.draw(st.sets(st.integers(1, len(ids))))
    desk, channel = Desk(text), FakeChannel()
    stream = desk.open(channel, stop=stop, stream=data.draw(st.booleans()))
    for index, token_id in enumerate(ids, start=1):
        stream.put(token_id, None, "length" if index == len(ids) else None)
        if (index in cuts or index == len(ids)) and not channel.ended.is_set():
            desk.responder.serve(stream)
    expected, found = stop_reference(list(stop), string)
    assert channel.text() == expected
    assert channel.chunks[-1].finish_reason == ("stop" if found else "length")
    # the ids end with the first one whose text completes a stop string
    last = next((n for n in range(1, len(ids) + 1) if stop_reference(list(stop), whole(text, ids[:n]))[1]), len(ids))
    assert channel.ids() == ids[:last]


def whole(text: Text, ids: list[int]) -> str:
    """Decoded, without a character that is not complete."""
    return text.decode(ids).rstrip("\ufffd")


def test_a_stop_string_ends_the_request_in_the_engine_and_what_comes_later_is_ignored(desk: Desk, text: Text) -> None:
    channel = FakeChannel()
    stream = desk.open(channel, stop=("wo",))
    put_text(text, stream, "hello world", None)
    desk.responder.serve(stream)
    assert (channel.text(), channel.chunks[-1].finish_reason) == ("hello ", "stop")
    assert desk.engine.finished == [(stream.request_id, "stop")]
    put_text(text, stream, "more", None)
    stream.close("stop")
    assert len(desk.responder._ready) == 1  # only the first put scheduled it
    assert len(channel.chunks) == 1


def test_stop_strings_inside_the_first_min_tokens_do_not_count(desk: Desk, text: Text) -> None:
    channel = FakeChannel()
    ids = text.encode_plain("h\nh\nh")
    stream = desk.open(channel, stop=("\n",), min_tokens=3)
    for index, token_id in enumerate(ids):
        stream.put(token_id, None, "length" if index == len(ids) - 1 else None)
    desk.responder.serve(stream)
    assert (channel.text(), channel.ids()) == ("h\nh", ids[:4])


def test_logprobs_are_cut_with_the_ids_and_summed(desk: Desk, text: Text) -> None:
    channel = FakeChannel()
    stream = desk.open(channel, stop=("w",), num_logprobs=0)
    stream.put_prompt_logprobs([TokenLogprobs(9, -3.0)])
    ids = text.encode_plain("hewhe")
    for token_id in ids:
        stream.put(token_id, TokenLogprobs(token_id, -0.5))
    desk.responder.serve(stream)
    (chunk,) = channel.chunks
    assert [entry.token_id for entry in chunk.logprobs] == channel.ids() == ids[:2]
    assert chunk.cum_logprob == -1.0
    assert chunk.prompt_logprobs == [TokenLogprobs(9, -3.0)]


def test_streams_take_turns_also_where_one_says_nothing_until_its_end(text: Text) -> None:
    """Each has a token a step, and the sender is behind: one turn a step. The second is looked at for its stop string
    and sends nothing; it must not come before the others every time."""
    now = itertools.count(1)
    desk = Desk(text, clock=lambda: float(next(now)))
    silent = {"stream": False, "stop": ("XYZ",)}
    streams = [desk.open(FakeChannel()), desk.open(FakeChannel(), **silent), desk.open(FakeChannel())]  # type: ignore[arg-type]
    for stream in streams:
        assert stream.request.on_start is not None
        stream.request.on_start()
    turns = []
    for _ in range(6):
        for stream in reversed(streams):
            stream.put(3)
        served = desk.responder._ready.get()
        assert served is not None
        turns.append(served.request_id)
        desk.responder.serve(served)
    assert turns == [1, 2, 3, 1, 2, 3]


def test_an_embedding_and_a_request_for_no_token_end_with_one_response(desk: Desk) -> None:
    channel = FakeChannel()
    stream = desk.open(channel, outputs=("embedding",))
    stream.put_embedding([0.5, 1.0])
    stream.close("stop")
    desk.responder.serve(stream)
    assert (channel.chunks[0].embedding, channel.ended.is_set()) == ([0.5, 1.0], True)
    channel = FakeChannel()
    stream = desk.open(channel, max_tokens=0)
    stream.close("length")
    desk.responder.serve(stream)
    assert (channel.text(), channel.chunks[0].finish_reason) == ("", "length")
    assert (desk.observer.first, desk.observer.ends) == ([], [None, None]), "no token, no time to the first one"


@pytest.mark.parametrize(
    ("reason", "error", "kind"),
    [
        ("cancelled", None, ErrorKind.CANCELLED),
        ("error", None, ErrorKind.ENGINE),
        ("error", RequestError("too late", ErrorKind.DEADLINE), ErrorKind.DEADLINE),
    ],
)
def test_errors_are_the_final_response(
    desk: Desk, reason: FinishReason, error: RequestError | None, kind: ErrorKind
) -> None:
    channel = FakeChannel()
    stream = desk.open(channel)
    stream.put(3)
    stream.close(reason, error)
    desk.responder.serve(stream)
    assert channel.error is not None and channel.error.kind is kind
    assert desk.observer.ends == [kind]
    assert desk.responder.num_live() == 0


def test_a_client_that_cannot_be_reached_is_cancelled_once_and_still_gets_a_final(desk: Desk) -> None:
    channel = FakeChannel(fails=1)
    stream = desk.open(channel)
    stream.put(3)
    desk.responder.serve(stream)
    assert desk.engine.cancelled == [stream.request_id]
    assert channel.error is not None and channel.error.kind is ErrorKind.CANCELLED
    stream.put(4)
    stream.close("cancelled")
    assert desk.responder.num_live() == 0


@pytest.mark.parametrize(("num_live", "ticks"), [(1, 10), (5, 10), (64, 10), (576, 10), (2048, 32)])
def test_every_live_stream_is_polled_on_a_fixed_budget(text: Text, num_live: int, ticks: int) -> None:
    """Ticks of 0.1 s: within a second, and where that would be more than 640 polls, as soon as these go round."""
    desk = Desk(text)
    channels = [FakeChannel() for _ in range(num_live)]
    streams = [desk.open(channel) for channel in channels]
    most = 0
    for _ in range(ticks):
        before = sum(channel.polls for channel in channels)
        desk.responder.poll()
        most = max(most, sum(channel.polls for channel in channels) - before)
    assert min(channel.polls for channel in channels) >= 1
    assert most <= min(max(16, num_live // 9 + 1), 64)
    channels[-1].gone = True
    for _ in range(ticks):
        desk.responder.poll()
    assert set(desk.engine.cancelled) == {streams[-1].request_id}


def test_the_final_response_waits_for_a_poll_that_is_under_way(text: Text) -> None:
    asked, answer = threading.Event(), threading.Event()

    class AskedChannel(FakeChannel):
        def is_cancelled(self) -> bool:
            asked.set()
            assert answer.wait(WAIT_S)
            assert not self.ended.is_set(), "asked behind the final response"
            return False

    desk, channel = Desk(text), AskedChannel()
    stream = desk.open(channel)
    stream.put(3, None, "length")
    poll, sender = (
        threading.Thread(target=desk.responder.poll),
        threading.Thread(target=desk.responder.serve, args=[stream]),
    )
    poll.start()
    assert asked.wait(WAIT_S)
    sender.start()
    assert not channel.ended.wait(0.05)
    answer.set()
    assert channel.ended.wait(WAIT_S)
    poll.join()
    sender.join()


def test_a_server_that_cannot_tell_whether_a_client_is_gone_is_asked_again(desk: Desk) -> None:
    class SilentChannel(FakeChannel):
        def is_cancelled(self) -> bool:
            if not super().is_cancelled():
                raise ChannelError("no shared memory")
            return True

    silent, other = SilentChannel(), FakeChannel()
    streams = [desk.open(silent), desk.open(other)]
    other.gone = True
    desk.responder.poll()
    assert desk.engine.cancelled == [streams[1].request_id]
    silent.gone = True
    desk.responder.poll()
    assert desk.engine.cancelled[1:] == [streams[0].request_id, streams[1].request_id]


def test_polling_forgets_streams_that_ended(desk: Desk) -> None:
    channel = FakeChannel()
    stream = desk.open(channel)
    stream.put(3, None, "length")
    desk.responder.serve(stream)
    desk.responder.poll()
    assert channel.polls == 0
    assert not desk.responder._poll_queue


def test_a_client_that_left_before_the_engine_had_its_request_is_cancelled_again(desk: Desk) -> None:
    channel = FakeChannel()
    stream = desk.open(channel)
    channel.gone = True
    desk.responder.poll()  # the request is not submitted yet: the engine ignores an id that it does not know
    desk.responder.poll()
    assert desk.engine.cancelled == [stream.request_id] * 2
    stream.close("cancelled")
    desk.responder.serve(stream)
    desk.responder.poll()
    assert channel.polls == 2
    assert not desk.responder._poll_queue


@pytest.mark.parametrize("num_senders", [1, 4])
def test_many_streams_get_every_token_once_and_in_order(
    running: Callable[..., Desk], text: Text, num_senders: int
) -> None:
    desk = running(num_senders=num_senders)
    rng = random.Random(3)
    channels = [FakeChannel() for _ in range(40)]
    streams = [desk.open(channel) for channel in channels]
    ids = [[rng.randrange(text.vocab_size) for _ in range(rng.randrange(1, 150))] for _ in streams]
    for step in range(150):
        for stream, tokens in zip(streams, ids, strict=True):
            if step < len(tokens):
                stream.put(tokens[step], None, "length" if step == len(tokens) - 1 else None)
    for channel, tokens in zip(channels, ids, strict=True):
        assert channel.ended.wait(WAIT_S)
        assert channel.ids() == tokens
        assert channel.text() == text.decode(tokens)
    assert desk.responder.num_live() == 0


def test_closing_ends_what_is_left_with_an_error_and_leaves_no_thread(running: Callable[..., Desk]) -> None:
    before = threading.active_count()
    desk = running()
    assert desk.responder.is_alive()
    channel = FakeChannel()
    desk.open(channel)
    desk.responder.close(timeout_s=0.0)
    assert channel.error is not None and channel.error.kind is ErrorKind.UNAVAILABLE
    assert threading.active_count() == before


def test_a_slow_stream_does_not_hold_up_the_others(running: Callable[..., Desk]) -> None:
    release = threading.Event()

    class SlowChannel(FakeChannel):
        def send(self, chunk: Chunk, outputs: Sequence[str], final: bool) -> None:
            release.wait(WAIT_S)
            super().send(chunk, outputs, final)

    desk = running(num_senders=2)
    slow, quick = SlowChannel(), FakeChannel()
    slow_stream, quick_stream = desk.open(slow), desk.open(quick)
    slow_stream.put(3)
    quick_stream.put(4, None, "length")
    assert quick.ended.wait(WAIT_S)
    slow_stream.put(5)
    slow_stream.put(6, None, "length")
    release.set()
    assert slow.ended.wait(WAIT_S)
    assert [chunk.token_ids for chunk in slow.chunks] == [[3], [5, 6]]


def test_a_bug_in_one_stream_ends_that_stream_and_no_other(text: Text) -> None:
    class BuggyChannel(FakeChannel):
        def send(self, chunk: Chunk, outputs: Sequence[str], final: bool) -> None:
            raise ZeroDivisionError

    desk, buggy, healthy = Desk(text, num_senders=1), BuggyChannel(), FakeChannel()
    desk.responder.start()
    first, second = desk.open(buggy), desk.open(healthy)
    first.put(3, None, None)
    second.put(3, None, "length")
    assert buggy.ended.wait(WAIT_S) and healthy.ended.wait(WAIT_S)
    assert buggy.error is not None and buggy.error.kind is ErrorKind.ENGINE
    assert desk.engine.cancelled == [first.request_id]
    assert healthy.error is None and desk.responder.is_alive()
    desk.responder.close(WAIT_S)
