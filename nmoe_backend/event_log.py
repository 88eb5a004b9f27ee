"""The log: one JSON object a line on standard output, for the engine's process and the front end's alike.

JSON and not key=value: every log collector reads it without a rule, and what a client sent cannot break a line. Every
line has `time`, `level` and `event`; events of a request have `request_id`, the client's own: the front end's
x-request-id is Triton's request id. Prompts stand in no line unless the TOML says log_prompts.

Nobody on the way of a token waits for the log: a thread writes it (`start_log`). A request costs three lines.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import queue
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from nmoe_backend.lifecycle import RequestRecord

_LOG = logging.getLogger(__name__)
ROOT_LOGGER = "nmoe_backend"
_GATHER_S = 0.05
_ENCODER = json.JSONEncoder(ensure_ascii=False)  # json.dumps would make one for every line


def log_event(logger: logging.Logger, event: str, fields: Mapping[str, Any], level: int = logging.INFO) -> None:
    """One line. Values are what JSON can say; None is left out."""
    if logger.isEnabledFor(level):
        logger.log(level, event, extra={"event": event, "fields": fields})


class JsonFormatter(logging.Formatter):
    """A record of log_event, or of any other call: those are `event` log, with a message."""

    def format(self, record: logging.LogRecord) -> str:
        """One line without its end."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {"time": f"{seconds}.{int(record.msecs):03}Z", "level": record.levelname.lower()}
        fields = getattr(record, "fields", None)
        line["event"] = getattr(record, "event", "log")
        if fields is None:
            line |= {"logger": record.name, "message": record.getMessage()}
        else:
            line |= {name: value for name, value in fields.items() if value is not None}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _ENCODER.encode(line)


class _Handover(logging.handlers.QueueHandler):
    """Formatting is left to the thread that writes."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record


class _Listener(logging.handlers.QueueListener):
    """Wakes once for what comes within a moment: each wake-up takes the interpreter's lock from those who send."""

    def __init__(self, records: queue.SimpleQueue[Any], handler: logging.Handler) -> None:
        super().__init__(records, handler)
        self._records = records

    def dequeue(self, block: bool) -> Any:
        was_idle = self._records.empty()
        record = self._records.get(block)
        if was_idle:
            time.sleep(_GATHER_S)
        return record


def start_log(level: str, stream: TextIO | None = None) -> Callable[[], None]:
    """Our loggers write to `stream` (standard output) from a thread of their own; returns what ends it."""
    handler = logging.StreamHandler(sys.stdout if stream is None else stream)
    handler.setFormatter(JsonFormatter())
    records: queue.SimpleQueue[Any] = queue.SimpleQueue()
    handover = _Handover(records)
    listener = _Listener(records, handler)
    listener.start()
    logger = logging.getLogger(ROOT_LOGGER)
    logger.addHandler(handover)
    logger.setLevel(level.upper())
    logger.propagate = False

    def stop() -> None:
        logger.removeHandler(handover)
        listener.stop()

    return stop


class RequestLog:
    """An Observer that writes a line for each event of a request."""

    def received(self, record: RequestRecord) -> None:
        """On its way to the engine."""
        own = {"prompt_tokens": record.num_prompt_tokens, "max_tokens": record.max_tokens, "prompt": record.prompt}
        log_event(_LOG, "received", _who(record) | own)

    def refused(self, record: RequestRecord) -> None:
        """It never became a stream."""
        log_event(_LOG, "refused", _who(record) | _error(record))

    def first_tokens(self, record: RequestRecord, num_tokens: int) -> None:
        """The first response with a token left."""
        waits = {"ttft_s": _since(record, record.first_token_s), "queue_s": _since(record, record.started_s)}
        log_event(_LOG, "first_token", _who(record) | waits)

    def more_tokens(self, gap_s: float, num_tokens: int) -> None:
        """No line."""

    def ended(self, record: RequestRecord) -> None:
        """finished, cancelled or error."""
        reason = record.finish_reason or "error"
        event = reason if reason in ("cancelled", "error") else "finished"
        counts = {"tokens": record.num_tokens, "responses": record.num_responses}
        took = {"finish_reason": reason, "latency_s": _since(record, record.ended_s), **counts}
        level = logging.ERROR if event == "error" else logging.INFO
        log_event(_LOG, event, _who(record) | took | _error(record), level)


def _who(record: RequestRecord) -> dict[str, Any]:
    return {"request_id": record.client_id, "id": record.request_id}


def _error(record: RequestRecord) -> dict[str, Any]:
    return {} if record.error is None else {"kind": record.error.kind.value, "error": str(record.error)}


def _since(record: RequestRecord, at_s: float | None) -> float | None:
    return None if at_s is None else round(at_s - record.arrival_s, 6)
