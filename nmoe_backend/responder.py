"""Every stream's way out: from the engine's tokens to responses, in order, each once.

The engine thread only appends to a stream and never sends (a send is a blocking round trip of about 150 us). A few
sender threads take ready streams, the one served longest ago first (responder_queue.py), and send one response with
whatever it has accumulated: chunks are one token while the senders keep up and grow when they do not. No timer waits
for more, unless a request names a least time between two responses: behind a response its stream rests for so long.
The first and the final one never wait.

Owns the sender threads and the polling of cancellation; knows nothing of Triton: a `Channel` is the way to one client.
Never drops a token and never blocks the engine.

Invariants:
* A stream is in the ready queue, with one sender or at rest, in one of them only: its responses leave in order.
* Every stream ends with exactly one final response: the last content, or an error.
* After its final response a stream ignores whatever the engine still puts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from nmoe_backend.contract import ParsedRequest
from nmoe_backend.contract_outputs import Chunk
from nmoe_backend.lifecycle import Observer, RequestRecord
from nmoe_backend.responder_chunks import ChunkBuilder, Taken, Token
from nmoe_backend.responder_pacing import Pacer
from nmoe_backend.responder_queue import ReadyQueue
from nmoe_backend.text import Text
from nmoe_backend.types import ErrorKind, FinishReason, RequestError, TokenLogprobs

POLL_INTERVAL_S = 0.1
POLL_ROUND_TICKS = 9  # in so many ticks every live stream is asked: once a second, with a tick to spare
MIN_POLLS_PER_TICK = 16  # a few streams are asked more often: at 40 us of CPU a poll this is 0.6 % of a core
MAX_POLLS_PER_TICK = 64  # and many less often, 2,048 every 3.2 s: once a second took a sixth of what responses take
_log = logging.getLogger(__name__)


class ChannelError(Exception):
    """The server did not take a response, or did not say whether the client is there."""


class Channel(Protocol):
    """The way to one client. One thread at a time sends; `is_cancelled` may be asked beside it."""

    def send(self, chunk: Chunk, outputs: Sequence[str], final: bool) -> None:
        """One response. Raises ChannelError when it cannot be delivered."""

    def fail(self, error: RequestError) -> None:
        """The final response, an error. Raises ChannelError when it cannot be delivered."""

    def is_cancelled(self) -> bool:
        """Whether the client went away. Never asked at or after the final response. Raises ChannelError when the server
        does not say: it may be short of shared memory for a moment."""


class Requests(Protocol):
    """What streams tell the engine (an Orchestrator)."""

    def cancel(self, request_id: int) -> None:
        """The client is gone."""

    def finish(self, request_id: int, reason: FinishReason = "stop") -> None:
        """A stop string was found."""


class Stream:
    """One request's TokenSink. The engine thread puts; one sender at a time takes."""

    def __init__(
        self, parsed: ParsedRequest, channel: Channel, record: RequestRecord, text: Text,
        ready: Callable[[Stream], None], pacer: Pacer, clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self.request = replace(parsed.request, on_start=self._started)  # what the engine gets
        self.request_id = parsed.request.request_id
        self.record = record
        record.num_prompt_tokens = len(parsed.request.prompt_ids)
        record.max_tokens = parsed.request.sampling.max_tokens
        self.outputs = parsed.response.outputs
        self.channel = channel
        self.chunks = ChunkBuilder(parsed, text)
        self.closed = False  # the final response is on its way or left
        self.final_lock = threading.Lock()  # see Responder._forget
        self.error: RequestError | None = None
        self.served_s = 0.0  # its last turn with a sender ended, or, before the first one, its prefill began
        self.min_interval_s = parsed.response.min_interval_s
        self._ready, self._pacer, self._clock = ready, pacer, clock
        self._lock = threading.Lock()
        self._scheduled = False  # in the ready queue, with a sender, or at rest
        self._resting = False
        self._ending = False  # the last of it was put: no rest any more
        self._tokens: deque[Token] = deque()
        self._prompt_logprobs: list[TokenLogprobs] | None = None
        self._embedding: list[float] = []
        self._end: FinishReason | None = None
        # one response and no stop string: nothing has to be looked at before the end
        self._waits_for_end = not parsed.response.stream and not parsed.request.sampling.stop

    def put(
        self, token_id: int, logprobs: TokenLogprobs | None = None, finish_reason: FinishReason | None = None
    ) -> None:
        """One token."""
        self._tokens.append((token_id, logprobs, finish_reason))
        if finish_reason is not None:
            self._end_rest()
        if not self._scheduled and not self._waits_for_end:
            self._schedule()

    def put_prompt_logprobs(self, logprobs: list[TokenLogprobs]) -> None:
        """Goes out with the first response."""
        self._prompt_logprobs = logprobs

    def put_embedding(self, embedding: list[float]) -> None:
        """Goes out with the last response."""
        self._embedding = embedding

    def close(self, finish_reason: FinishReason, error: RequestError | None = None) -> None:
        """The end without a token."""
        if error is None and finish_reason in ("cancelled", "error"):
            kind = ErrorKind.CANCELLED if finish_reason == "cancelled" else ErrorKind.ENGINE
            error = RequestError(f"the request ended: {finish_reason}", kind)
        self.error = error
        self._end = finish_reason
        self._end_rest()
        if not self._scheduled:
            self._schedule()

    def take(self) -> Taken:
        """Everything so far. `_end` is read first: what was put before it is then in the queue."""
        end, tokens = self._end, self._tokens
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        return Taken(
            tokens=[tokens.popleft() for _ in range(len(tokens))],
            prompt_logprobs=prompt_logprobs,
            embedding=self._embedding,
            end=end,
        )

    def release(self, rest_s: float = 0.0) -> None:
        """The sender is done with it for now: it rests, or goes back into the queue if something came meanwhile."""
        with self._lock:
            if rest_s and not (self._ending or self.closed):
                self._resting = True
                self._pacer.rest(rest_s, self)
            else:
                self._requeue()

    def wake(self) -> None:
        """The rest is over; the end may have been quicker."""
        with self._lock:
            if self._resting:
                self._resting = False
                self._requeue()

    def _requeue(self) -> None:
        """Under the lock. The flag falls before the queue is looked at, and `put` appends before it looks at the flag:
        one of the two sees the other, so no token is left lying."""
        self._scheduled = False
        if not self.closed and not self._waits_for_end and (self._tokens or self._end is not None):
            self._scheduled = True
            self._ready(self)

    def _end_rest(self) -> None:
        """What is there now is the last of it."""
        with self._lock:
            self._waits_for_end = False
            self._ending = True
            if self._resting:
                self._resting = False
                self._ready(self)

    def _started(self) -> None:
        self.served_s = self.record.started_s = self._clock()

    def _schedule(self) -> None:
        with self._lock:
            if not self._scheduled and not self.closed:
                self._scheduled = True
                self._ready(self)


class Responder:
    """Sender threads and the cancellation poll over all live streams."""

    def __init__(
        self,
        text: Text,
        requests: Requests,
        observer: Observer,
        *,
        num_senders: int = 2,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._text = text
        self._requests = requests
        self._observer = observer
        self._clock = clock
        self._ready: ReadyQueue[Stream] = ReadyQueue()
        self._live: dict[int, Stream] = {}
        self._poll_queue: deque[Stream] = deque()
        self._pacer = Pacer(clock)
        self._stopping = threading.Event()
        self._num_senders = num_senders
        # Daemons: in a process whose server was killed a send never returns, and must not keep the process from ending.
        loops = [(self._send_loop, f"sender-{i}") for i in range(num_senders)]
        loops += [(self._poll_loop, "cancel-poll"), (self._pacer.run, "pacer")]
        self._threads = [threading.Thread(target=loop, name=name, daemon=True) for loop, name in loops]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def open(self, parsed: ParsedRequest, channel: Channel, record: RequestRecord) -> Stream:
        """The sink for a request that is about to be submitted."""
        stream = Stream(parsed, channel, record, self._text, self._ready.put, self._pacer, self._clock)
        self._live[stream.request_id] = stream
        self._poll_queue.append(stream)
        return stream

    def discard(self, stream: Stream) -> None:
        """The engine did not take it; whoever opened it answers the client."""
        self._forget(stream)

    def num_live(self) -> int:
        """Streams without a final response."""
        return len(self._live)

    def is_alive(self) -> bool:
        """False when a thread died of a bug: streams would hang."""
        return all(thread.is_alive() for thread in self._threads)

    def close(self, timeout_s: float) -> None:
        """Wait for live streams (the engine has ended them), close what is left with an error, end the threads."""
        limit = self._clock() + timeout_s
        while self._live and self.is_alive() and self._clock() < limit:
            self._stopping.wait(0.01)
        for stream in list(self._live.values()):
            stream.close("error", RequestError("the server is shutting down. Send it again.", ErrorKind.UNAVAILABLE))
        self._stopping.set()
        self._ready.end(self._num_senders)  # behind the streams that were closed above
        self._pacer.stop()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def serve(self, stream: Stream) -> None:
        """Send what one stream has accumulated."""
        taken = stream.take()
        if stream.error is not None and taken.end is not None:
            self._fail(stream, stream.error)
            return
        chunk = stream.chunks.build(taken)
        if chunk is not None:
            self._send(stream, chunk, found_stop=chunk.finish_reason is not None and not _has_end(taken))
        stream.served_s = self._clock()
        stream.release(rest_s=stream.min_interval_s if chunk is not None else 0.0)

    def poll(self) -> None:
        """One tick: ask some of the live streams whether their clients are gone.

        Who is gone is asked again until its final response: a cancellation may come before the engine has the request.
        """
        num_live = len(self._poll_queue)
        polls = min(max(MIN_POLLS_PER_TICK, -(-num_live // POLL_ROUND_TICKS)), MAX_POLLS_PER_TICK)
        for _ in range(min(polls, num_live)):
            stream = self._poll_queue.popleft()
            with stream.final_lock:
                if stream.closed:
                    continue
                is_gone = self._is_gone(stream)
            if is_gone:
                self._requests.cancel(stream.request_id)  # the engine closes its sink, and so it ends with FINAL
            self._poll_queue.append(stream)

    def _is_gone(self, stream: Stream) -> bool:
        try:
            return stream.channel.is_cancelled()
        except ChannelError as error:
            _log.info("request %d: asked again later, it cannot be told now: %s", stream.request_id, error)
            return False

    def _send(self, stream: Stream, chunk: Chunk, found_stop: bool) -> None:
        final = chunk.finish_reason is not None
        if found_stop:
            self._requests.finish(stream.request_id)
        if final:
            self._forget(stream)
        try:
            stream.channel.send(chunk, stream.outputs, final)
        except ChannelError as error:
            self._lose(stream, error)
            return
        now, record, num_tokens = self._clock(), stream.record, len(chunk.token_ids)
        if num_tokens:
            before_s, record.last_token_s = record.last_token_s, now
            record.num_tokens += num_tokens
            record.num_responses += 1
            if before_s is None:
                record.first_token_s = now
                self._observer.first_tokens(record, num_tokens)
            else:
                self._observer.more_tokens(now - before_s, num_tokens)
        if final:
            record.ended_s, record.finish_reason = now, chunk.finish_reason
            self._observer.ended(record)

    def _fail(self, stream: Stream, error: RequestError) -> None:
        self._forget(stream)
        try:
            stream.channel.fail(error)
        except ChannelError as failure:
            _log.info("request %d: its error could not be delivered: %s", stream.request_id, failure)
        record = stream.record
        record.ended_s, record.error = self._clock(), error
        record.finish_reason = "cancelled" if error.kind is ErrorKind.CANCELLED else "error"
        self._observer.ended(record)

    def _lose(self, stream: Stream, error: ChannelError) -> None:
        """A response could not be delivered: the client is gone."""
        _log.info("request %d: cancelled, a response could not be delivered: %s", stream.request_id, error)
        self._requests.cancel(stream.request_id)
        self._fail(stream, RequestError("the client is gone", ErrorKind.CANCELLED))

    def _forget(self, stream: Stream) -> None:
        """Before the final response. A poll that is under way ends first: with that response the server frees what
        is_cancelled asks about, and it crashes when it is asked then."""
        with stream.final_lock:
            stream.closed = True
        self._live.pop(stream.request_id, None)

    def _send_loop(self) -> None:
        while (stream := self._ready.get()) is not None:
            try:
                self.serve(stream)
            except Exception:  # noqa: BLE001 - a bug of ours in one stream ends that stream; the thread serves the others
                _log.exception("request %d: a response could not be built", stream.request_id)
                self._requests.cancel(stream.request_id)
                self._fail(stream, RequestError("a response could not be built: see the log", ErrorKind.ENGINE))

    def _poll_loop(self) -> None:
        due = self._clock()
        while not self._stopping.wait(max(0.0, due - self._clock())):
            due = max(due + POLL_INTERVAL_S, self._clock())
            self.poll()


def _has_end(taken: Taken) -> bool:
    """Whether the engine ended it; otherwise a stop string did."""
    return taken.end is not None or bool(taken.tokens and taken.tokens[-1][2] is not None)
