"""The face of the engine in Triton: tensors in, a stream of responses out. Everything else is in nmoe_backend.

Decoupled: `execute` hands requests to the engine and returns at once; the responder's threads send. One instance
(KIND_MODEL, count 1) holds all ranks.
"""

from __future__ import annotations

import gc
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any

import triton_python_backend_utils as pb_utils

from nmoe_backend import environ, stub
from nmoe_backend.config import ServeConfig
from nmoe_backend.contract import Call, Contract, ParsedRequest, StopCommand
from nmoe_backend.contract_outputs import OUTPUTS, Chunk, ResponseEncoder
from nmoe_backend.event_log import ROOT_LOGGER, RequestLog, log_event, start_log
from nmoe_backend.grammar import GrammarCompiler
from nmoe_backend.lifecycle import Observers, RequestRecord
from nmoe_backend.metrics import Metric, Metrics, MetricsPusher
from nmoe_backend.metrics_devices import gpu_use_reader, host_use
from nmoe_backend.metrics_families import MetricSpec
from nmoe_backend.responder import ChannelError, Responder
from nmoe_backend.text import Text
from nmoe_backend.tracing import start_tracing, traceparent_of
from nmoe_backend.types import DeviceUse, ErrorKind, Grammar, RequestError

_LOG = logging.getLogger(f"{ROOT_LOGGER}.deepseek_v3")  # Triton calls this module as it likes
DRAIN_S = 20.0  # inside of a bare tritonserver's --exit-timeout-secs, 30; `nmoe serve` has let requests end before
_CODES = {  # names: pb_utils is filled in after this module has been imported
    ErrorKind.INVALID: "INVALID_ARG",
    ErrorKind.OVERLOADED: "UNAVAILABLE",
    ErrorKind.DEADLINE: "UNAVAILABLE",
    ErrorKind.CANCELLED: "CANCELLED",
    ErrorKind.NOT_FOUND: "NOT_FOUND",
    ErrorKind.UNAVAILABLE: "UNAVAILABLE",
    ErrorKind.ENGINE: "INTERNAL",
}


class TritonPythonModel:
    """See the Python backend's documentation for when Triton calls what."""

    def initialize(self, args: dict[str, str]) -> None:
        config = stub.load_config(args)
        stub.end_with_server()
        self._stop_log = start_log(environ.debug_switches().log_level)
        begun_s = time.monotonic()
        self._log_prompts = config.log_prompts
        self._text = text = Text(config.model_path)
        self._contract = Contract(
            text,
            config.generation,
            vocab_size=config.vocab_size,
            max_seq_len=config.max_seq_len,
            exclude_input_in_output=config.exclude_input_in_output,
            allow_stop_by_id=config.allow_stop_by_id,
            max_orphan_s=config.max_orphan_s,
        )
        self._grammars = GrammarCompiler(
            text, config.model_path, vocab_size=config.vocab_size, eos_token_ids=config.generation.eos_token_ids
        )
        self._encoder = ResponseEncoder(pb_utils.Tensor, text)
        self._registry = _Registry()
        self._request_ids = itertools.count(1)
        self._compiling: dict[int, tuple[str, _Channel]] = {}  # request id -> client id, its channel
        self._stop_lock = threading.Lock()  # a request is here or with the engine when a stop command looks
        self._engine = self._start_engine(config)
        devices = self._device_reader(config)
        metrics = Metrics(
            self._registry, self._engine.stats(), model_name=config.model_name, gpus=tuple(devices().gpu_percent)
        )
        self._tracer = start_tracing(config.trace_endpoint, config.model_name) if config.is_traced else None
        self._observers = Observers([metrics, RequestLog(), *([self._tracer] if self._tracer else [])])
        gc.collect()
        gc.freeze()  # what was loaded stays: a full collection over torch's objects would stop a step for tens of ms
        self._responder = Responder(text, self._engine, self._observers)
        self._responder.start()
        self._pusher = MetricsPusher(metrics, self._engine.stats, self.is_ready, devices)
        self._pusher.start()
        stats = self._engine.stats()
        took = {
            "ranks": len(stats.running_per_rank),
            "kv_pages": stats.pages_total,
            "took_s": time.monotonic() - begun_s,
        }
        log_event(_LOG, "engine_started", {"model": config.model_name, "device": config.device, **took})

    def execute(self, requests: list[Any]) -> None:
        arrival_s = time.monotonic()
        for request in requests:
            record = RequestRecord(
                request_id=next(self._request_ids), client_id=request.request_id(), arrival_s=arrival_s
            )
            if self._tracer is not None:
                record.traceparent = traceparent_of(request.trace().get_context())
            channel = _Channel(request.get_response_sender(), self._encoder, record)
            with self._answering(channel):
                self._accept(request, channel)

    def is_ready(self) -> bool:
        """Asked by newer servers for /v2/health. 2.51 does not ask: there `nmoe serve` watches the heartbeat metric,
        which is pushed while this says yes: streams also hang when a sender is dead."""
        return self._engine.is_alive() and self._responder.is_alive()

    def finalize(self) -> None:
        log_event(_LOG, "engine_draining", {"live_requests": self._responder.num_live(), "limit_s": DRAIN_S})
        self._grammars.close()  # whoever waits for a grammar is refused at once, also where its guide still compiles
        drained = self._engine.drain(DRAIN_S)
        self._engine.close()  # ends what is left with an error, which the responder still sends
        self._responder.close(timeout_s=5.0)
        self._pusher.stop()
        if self._tracer is not None:
            self._tracer.close()
        log_event(_LOG, "engine_stopped", {"drained": drained})
        self._stop_log()

    def _start_engine(self, config: ServeConfig) -> Any:
        from nmoe_backend import warmup  # torch; a scripted engine needs none

        return warmup.start(config)

    def _device_reader(self, config: ServeConfig) -> Callable[[], DeviceUse]:
        if config.device == "cpu":
            return host_use
        return gpu_use_reader(sorted({gpu for replica in config.replicas for gpu in replica.gpus}))

    def _accept(self, request: Any, channel: _Channel) -> None:
        record = channel.record
        requested = frozenset(request.requested_output_names())
        call = Call(
            request_id=record.request_id,
            tensors={tensor.name(): tensor.as_numpy() for tensor in request.inputs()},
            parameters=request.parameters(),
            client_id=record.client_id,
            requested_outputs=requested,
            timeout_us=request.timeout(),
            arrival_s=record.arrival_s,
        )
        parsed = self._contract.parse(call)
        if isinstance(parsed, StopCommand):
            self._stop(parsed.client_id)
            channel.answer_empty([name for name in OUTPUTS if name in requested])
        elif parsed.guide is None:
            self._submit(parsed, channel)
        else:  # from here, or later from a thread of the compiler
            done = self._grammars.compile(parsed.guide)
            self._compiling[call.request_id] = (call.client_id, channel)
            done.add_done_callback(partial(self._submit_guided, parsed, channel))

    def _submit_guided(self, parsed: ParsedRequest, channel: _Channel, done: Future[Grammar]) -> None:
        """The guide is compiled, or has failed. A client that went away meanwhile is noticed like any other."""
        with self._answering(channel), self._stop_lock:  # in this order: a refusal is sent without the lock
            if self._compiling.pop(parsed.request.request_id, None) is None:
                return  # a stop command was first
            if done.cancelled():
                raise RequestError("the server takes no requests any more: it is draining", ErrorKind.UNAVAILABLE)
            self._submit(parsed.with_grammar(done.result()), channel)

    def _stop(self, client_id: str) -> None:
        """Ends the requests of this id: the engine's, and those that it does not know yet."""
        with self._stop_lock:
            self._engine.cancel_by_client_id(client_id)
            compiling = [request_id for request_id, (owner, _) in self._compiling.items() if owner == client_id]
            channels = [self._compiling.pop(request_id)[1] for request_id in compiling]
        for channel in channels:
            self._refuse(channel, RequestError("the request ended: cancelled", ErrorKind.CANCELLED))

    def _submit(self, parsed: ParsedRequest, channel: _Channel) -> None:
        stream = self._responder.open(parsed, channel, channel.record)
        if self._log_prompts:
            channel.record.prompt = self._text.decode(parsed.request.prompt_ids)
        self._observers.received(channel.record)
        try:
            self._engine.submit(stream.request, stream)
        except BaseException:  # a bug of ours too: a stream that stays would be polled behind its final response
            self._responder.discard(stream)
            raise

    @contextmanager
    def _answering(self, channel: _Channel) -> Iterator[None]:
        """Whatever goes wrong with one request is its own final response, and nobody else's trouble."""
        try:
            yield
        except RequestError as error:
            self._refuse(channel, error)
        except ChannelError as error:
            _LOG.info("the answer to a stop command could not be delivered: %s", error)
        except Exception:  # noqa: BLE001 - a bug of ours in one request: the rest of this call is served
            _LOG.exception("a request could not be read")
            text = "the request could not be read: see the server's log"
            self._refuse(channel, RequestError(text, ErrorKind.ENGINE))

    def _refuse(self, channel: _Channel, error: RequestError) -> None:
        """The only response, an error; a client that is gone does not keep the others of its call waiting."""
        channel.record.error = error
        self._observers.refused(channel.record)
        try:
            channel.fail(error)
        except ChannelError as failure:
            _LOG.info("a refusal could not be delivered: %s", failure)


class _Channel:
    """A pb_utils response sender as the responder sees it."""

    def __init__(self, sender: Any, encoder: ResponseEncoder[Any], record: RequestRecord) -> None:
        self.record = record
        self._sender = sender
        self._encoder = encoder

    def send(self, chunk: Chunk, outputs: Sequence[str], final: bool) -> None:
        self._send(pb_utils.InferenceResponse(self._encoder.encode(chunk, outputs)), final)

    def fail(self, error: RequestError) -> None:
        # The kind goes first: several share a code, and a client (our OpenAI front end) must tell overload from drain.
        text = f"{error.kind.value}: {error}"
        failure = pb_utils.TritonError(text, getattr(pb_utils.TritonError, _CODES[error.kind]))
        self._send(pb_utils.InferenceResponse(error=failure), final=True)

    def answer_empty(self, outputs: Sequence[str]) -> None:
        """The only response to a `stop` command."""
        self._send(pb_utils.InferenceResponse(self._encoder.empty(outputs)), final=True)

    def is_cancelled(self) -> bool:
        try:
            return bool(self._sender.is_cancelled())
        except pb_utils.TritonModelException as error:
            raise ChannelError(str(error)) from error

    def _send(self, response: Any, final: bool) -> None:
        try:
            self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)
        except pb_utils.TritonModelException as error:
            raise ChannelError(str(error)) from error


class _Registry:
    """Triton's custom metrics. Holds the families: a metric whose family is gone cannot be set."""

    def __init__(self) -> None:
        self._families: dict[str, Any] = {}

    def __call__(self, spec: MetricSpec, labels: Mapping[str, str]) -> Metric:
        family = self._families.get(spec.name)
        if family is None:
            kind = getattr(pb_utils.MetricFamily, spec.kind.upper())
            family = pb_utils.MetricFamily(name=spec.name, description=spec.help, kind=kind)
            self._families[spec.name] = family
        buckets = {"buckets": list(spec.buckets)} if spec.buckets else {}
        metric: Metric = family.Metric(labels=dict(labels), **buckets)
        return metric
