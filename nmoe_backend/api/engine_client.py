"""`deepseek_v3` over gRPC: one stream a generation, so that ending the stream cancels the generation.

Owns the channels of one worker process and its event loop. The raw method and the generated messages are used:
tritonclient's own client takes three times as long a response. Triton's method takes a stream of requests: here the one
request and the half-close behind it leave as one operation, and the server ends the stream behind the last response.
"""

from __future__ import annotations

import asyncio
import itertools
import struct
from collections.abc import AsyncGenerator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import numpy as np
from tritonclient.grpc import service_pb2

from nmoe_backend.api.errors import of_connection, of_engine
from nmoe_backend.contract_inputs import INPUTS, NUMPY_TYPES

MODEL = "deepseek_v3"
_SERVICE = "/inference.GRPCInferenceService"
_MAX_RESPONSES_PER_S = 2500
_CONNECTIONS = 4  # one connection is one thread of the server
_END_S = 5.0  # at the end, for streams whose last response has arrived
_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),  # prompt logprobs are megabytes
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),  # the TOML says where the engine is, and no variable of the environment
    # Below 300 s a server counts pings without data as an attack and ends the connection with all its streams.
    ("grpc.keepalive_time_ms", 330_000),
    # The default backs off to 120 s: a server that is back would be refused for that long.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
_COUNTS = ("num_input_tokens", "num_output_tokens", "num_cached_tokens")
# W3C trace context of the HTTP request that this task answers; Triton joins its spans, and so the engine's, to it
TRACEPARENT: ContextVar[str] = ContextVar("traceparent", default="")
TEXT_OUTPUTS = ("text_output", "finish_reason", *_COUNTS)


@dataclass(slots=True)
class Delta:
    """One response of the engine. Text, ids, logprobs and num_output_tokens are what it adds."""

    text_output: str = ""
    finish_reason: str = ""  # not empty: this is the last one
    num_input_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    logprobs: bytes = b""  # JSON
    prompt_logprobs: bytes = b""  # JSON, in the first response
    output_ids: Sequence[int] = ()
    embedding: bytes = b""  # fp32, little-endian


class EngineClient:
    """The engine behind one address. For the event loop that made it."""

    def __init__(self, address: str) -> None:
        self._channels = [grpc.aio.insecure_channel(address, options=_OPTIONS) for _ in range(_CONNECTIONS)]
        self._turn = itertools.cycle(self._channels)
        self._ready = self._channels[0].unary_unary(f"{_SERVICE}/ModelReady")
        self._num_live = 0  # generations
        self._ending: set[grpc.aio.UnaryStreamCall] = set()  # streams whose last response has arrived

    async def close(self) -> None:
        """End the channels."""
        ends = [asyncio.wait_for(call.code(), _END_S) for call in self._ending]
        await asyncio.gather(*ends, return_exceptions=True)
        for channel in self._channels:
            await channel.close()

    async def is_ready(self, timeout_s: float = 2.0) -> bool:
        """Whether the server answers and has the model ready."""
        request = service_pb2.ModelReadyRequest(name=MODEL).SerializeToString()
        try:
            answer = service_pb2.ModelReadyResponse.FromString(await self._ready(request, timeout=timeout_s))
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.ready)

    async def generate(
        self, inputs: dict[str, Any], outputs: Sequence[str], request_id: str, timeout_s: float
    ) -> AsyncGenerator[Delta, None]:
        """The responses to one request. Close the iterator early to cancel. Raises ApiError."""
        # All live streams together bring no more than this process reads: what is not read piles up in the server,
        # where nothing holds the responder back. Below 50 streams this is less than a decode step: nothing waits.
        interval_ms = self._num_live * 1000 // _MAX_RESPONSES_PER_S
        message = encode_request({**inputs, "min_response_interval_ms": interval_ms}, outputs, request_id)
        method = next(self._turn).unary_stream(f"{_SERVICE}/ModelStreamInfer")
        call = method(message, metadata=_metadata(), timeout=timeout_s)
        ended = False
        self._num_live += 1
        try:
            while not ended:
                raw = await call.read()
                if raw is grpc.aio.EOF:
                    raise await _unexpected_end(call)
                answer = service_pb2.ModelStreamInferResponse.FromString(raw)
                if answer.error_message:
                    ended = True
                    raise of_engine(answer.error_message)
                delta = decode_response(answer.infer_response)
                ended = bool(delta.finish_reason)
                yield delta
        except grpc.aio.AioRpcError as error:
            raise of_connection(error) from error
        finally:
            self._num_live -= 1
            if ended:  # the server ends it; a cancellation that meets the last response would leak the request there
                self._ending.add(call)
                call.add_done_callback(self._ending.discard)
            else:
                call.cancel()


def _metadata() -> tuple[tuple[str, str], ...]:
    # Not triton_grpc_error, which would make errors a status of the call: this server then mistakes the end of the call
    # for a cancellation ("HandleCancellation called even when the context was not cancelled") and, in one refusal of
    # some hundreds, dies of it (signal 11).
    traceparent = TRACEPARENT.get()
    return (("traceparent", traceparent),) if traceparent else ()


def encode_request(inputs: dict[str, Any], outputs: Sequence[str], request_id: str) -> bytes:
    """A ModelStreamInferRequest; types and shapes are those of the contract's table."""
    request = service_pb2.ModelInferRequest(model_name=MODEL, id=request_id)
    for name, value in inputs.items():
        spec = INPUTS[name]
        is_list = spec.dims == (-1,)
        request.inputs.add(name=name, datatype=spec.dtype, shape=[1, len(value) if is_list else 1])
        request.raw_input_contents.append(_raw(spec.dtype, value if is_list else [value]))
    for name in outputs:
        request.outputs.add(name=name)
    return bytes(request.SerializeToString())


def decode_response(response: service_pb2.ModelInferResponse) -> Delta:
    """The values of one response."""
    delta = Delta()
    for output, content in zip(response.outputs, response.raw_output_contents, strict=True):
        name = output.name
        if output.datatype == "BYTES":
            text = content[4:]  # behind its length
            setattr(delta, name, text.decode() if name in ("text_output", "finish_reason") else text)
        elif name in _COUNTS:
            setattr(delta, name, _INT32.unpack(content)[0])
        else:
            setattr(delta, name, np.frombuffer(content, "<i4").tolist() if name == "output_ids" else content)
    return delta


_INT32 = struct.Struct("<i")


def _raw(dtype: str, values: Sequence[Any]) -> bytes:
    if dtype != "BYTES":
        return np.asarray(values, NUMPY_TYPES[dtype]).tobytes()
    encoded = [value.encode() for value in values]
    return b"".join(struct.pack("<I", len(value)) + value for value in encoded)


async def _unexpected_end(call: Any) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        await call.code(), await call.initial_metadata(), await call.trailing_metadata(), details=await call.details()
    )
