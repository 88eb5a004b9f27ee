"""Users of both faces for Locust: conversations, long contexts, bursts.

    .venv-tools/bin/python -m locust -f perf/locustfile.py --headless --host http://localhost:9000 \\
      --grpc localhost:8001 --model NAME --users 220 --spawn-rate 4 --run-time 10m --stop-timeout 60s --html load.html

(README.md has the one for the tiny model: `--scale` and `--long` make conversations that fit it.)

| user | face | asks |
|---|---|---|
| Chat | chat completions, streamed | lengths of lengths.py, a pause of --pause seconds in the mean |
| Grpc | Triton's `deepseek_v3`, streamed, ids in and out | the same |
| LongContext | chat completions, streamed | a prompt of --long words, a short answer |
| Burst | completions, streamed | one user: --burst requests at once, then ten pauses |

Each request is three lines of the report: the whole, its first token, and the mean time between its tokens. One that
did not bring all the tokens that it asked for is a failure. A user's n-th request is the same in every run of a seed.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Iterator
from typing import Any

import gevent
import grpc
import grpc.experimental.gevent
import requests
from locust import User, events, task
from tritonclient.grpc import service_pb2

from nmoe_backend.api.engine_client import decode_response, encode_request
from perf.lengths import Lengths, words

grpc.experimental.gevent.init_gevent()
LIMIT_S = 600.0
STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"


@events.init_command_line_parser.add_listener
def add_arguments(parser: Any) -> None:
    """What Locust itself does not ask for."""
    parser.add_argument("--grpc", default="localhost:8001", help="Triton's gRPC address")
    parser.add_argument("--model", default="tiny", help="its name at the OpenAI front end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="of conversations' lengths, for small servers")
    parser.add_argument("--long", type=int, default=8000, help="words of a long context")
    parser.add_argument("--burst", type=int, default=16, help="requests of a burst")
    parser.add_argument("--pause", type=float, default=2.0, help="mean seconds between a user's requests")


class Asking(User):
    """Draws what to ask, asks, and reports."""

    abstract = True
    numbers: Iterator[int]  # of the class

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.numbers = itertools.count()

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self.options = environment.parsed_options
        self.rng = random.Random(f"{self.options.seed}/{type(self).__name__}/{next(self.numbers)}")
        self.lengths = Lengths(scale=self.options.scale)

    def wait_time(self) -> float:
        """Exponential: many users together arrive as a Poisson process."""
        return self.rng.expovariate(1.0 / self.options.pause)

    def report(self, face: str, name: str, max_tokens: int, counts: Iterator[int]) -> None:
        """Read an answer to its end; `counts`: how many tokens have come, after each chunk."""
        began_s, first_s, last_s, num_tokens, error = time.perf_counter(), 0.0, 0.0, 0, None
        try:
            for count in counts:
                num_tokens, last_s = count, time.perf_counter()
                first_s = first_s or last_s
            if num_tokens != max_tokens:
                error = ValueError(f"got {num_tokens} tokens, asked for {max_tokens}")
        except (requests.RequestException, grpc.RpcError, ValueError) as failure:
            error = failure
        self.fire(face, name, time.perf_counter() - began_s, num_tokens, error)
        if error is None:
            self.fire(face, f"{name}: first token", first_s - began_s, num_tokens)
            if num_tokens > 1:
                self.fire(face, f"{name}: between tokens", (last_s - first_s) / (num_tokens - 1), num_tokens)

    def fire(self, face: str, name: str, seconds: float, num_tokens: int, error: Exception | None = None) -> None:
        """One line of Locust's statistics."""
        self.environment.events.request.fire(
            request_type=face, name=name, response_time=seconds * 1e3, response_length=num_tokens, exception=error,
            context=self.context(),
        )  # fmt: skip

    def openai(self, path: str, max_tokens: int, **prompt: object) -> Iterator[int]:
        """A streamed request to the front end; as many tokens as its usage says in every chunk."""
        body = {
            "model": self.options.model, "max_tokens": max_tokens, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True}, **prompt,
        }  # fmt: skip
        with requests.post(f"{self.host}/v1/{path}", json=body, stream=True, timeout=LIMIT_S) as answer:
            if answer.status_code != 200:
                raise ValueError(f"{answer.status_code}: {answer.json()['error']['message']}")
            for line in answer.iter_lines(chunk_size=None):
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise ValueError(event["error"]["message"])
                    if event["usage"]["completion_tokens"]:
                        yield event["usage"]["completion_tokens"]


class Chat(Asking):
    """A conversation's turn."""

    weight = 6

    @task
    def turn(self) -> None:
        """As a chat page asks."""
        prompt, max_tokens = self.lengths.draw(self.rng)
        messages = [{"role": "user", "content": words(self.rng, prompt)}]
        self.report("OpenAI", "chat", max_tokens, self.openai("chat/completions", max_tokens, messages=messages))


class Grpc(Asking):
    """The same lengths through Triton's own protocol, one stream a request."""

    weight = 3

    def on_start(self) -> None:
        """A connection of its own."""
        self.channel = grpc.insecure_channel(self.options.grpc, options=[("grpc.use_local_subchannel_pool", 1)])

    def on_stop(self) -> None:
        self.channel.close()

    @task
    def stream(self) -> None:
        """Ids in, ids out."""
        prompt, max_tokens = self.lengths.draw(self.rng)
        ids = self.rng.choices(range(30, 1000), k=prompt)
        self.report("gRPC", "deepseek_v3", max_tokens, self.ids(ids, max_tokens))

    def ids(self, prompt: list[int], max_tokens: int) -> Iterator[int]:
        """How many have come."""
        inputs = {"input_ids": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
        message = encode_request(inputs, ("output_ids", "finish_reason"), "")
        num_tokens = 0
        for raw in self.channel.stream_stream(STREAM_INFER)(iter([message]), timeout=LIMIT_S):
            response = service_pb2.ModelStreamInferResponse.FromString(raw)
            if response.error_message:
                raise ValueError(response.error_message)
            num_tokens += len(decode_response(response.infer_response).output_ids)
            yield num_tokens


class LongContext(Asking):
    """A document, and a question about it."""

    weight = 1

    @task
    def question(self) -> None:
        """Prefill is all that it costs."""
        messages = [{"role": "user", "content": words(self.rng, self.options.long)}]
        self.report("OpenAI", "long context", 16, self.openai("chat/completions", 16, messages=messages))


class Burst(Asking):
    """Many at once, then nothing for a while: what an agent that fans out, or a batch job, does."""

    fixed_count = 1

    def wait_time(self) -> float:
        """Ten times the others'."""
        return 10.0 * super().wait_time()

    @task
    def burst(self) -> None:
        """All begin at the same moment."""
        drawn = [self.lengths.draw(self.rng) for _ in range(self.options.burst)]
        asks = [(max_tokens, words(self.rng, prompt)) for prompt, max_tokens in drawn]
        gevent.joinall([gevent.spawn(self.one, *ask) for ask in asks], raise_error=True)

    def one(self, max_tokens: int, prompt: str) -> None:
        """One of them."""
        self.report("OpenAI", "burst", max_tokens, self.openai("completions", max_tokens, prompt=prompt))
