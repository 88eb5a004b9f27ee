"""What goes wrong, as OpenAI's clients expect it: a status and `{"error": {message, type, param, code}}`.

The engine's errors arrive as text that begins with the kind (`overloaded: ...`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import grpc
import grpc.aio
import orjson

from nmoe_backend.types import ErrorKind, RequestError

RETRY_AFTER_S = 1  # for 429 and 503: a step of a full server is 0.1 s, a restart some seconds
_TYPES: Mapping[int, str] = MappingProxyType(
    {
        400: "invalid_request_error",
        401: "authentication_error",
        404: "not_found_error",
        405: "invalid_request_error",
        408: "timeout_error",
        413: "invalid_request_error",
        415: "invalid_request_error",
        429: "rate_limit_error",
        499: "cancelled_error",
        503: "service_unavailable_error",
        504: "timeout_error",
    }
)
_STATUS: Mapping[ErrorKind, int] = MappingProxyType(
    {
        ErrorKind.INVALID: 400,
        ErrorKind.OVERLOADED: 429,
        ErrorKind.DEADLINE: 504,
        ErrorKind.CANCELLED: 499,
        ErrorKind.NOT_FOUND: 404,
        ErrorKind.UNAVAILABLE: 503,
        ErrorKind.ENGINE: 503,
    }
)


class ApiError(Exception):
    """One request cannot be served; becomes the answer, or the last event of a stream that has begun."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def as_json(self) -> dict[str, str | None]:
        """What stands in OpenAI's error object."""
        kind = _TYPES.get(self.status, "server_error")
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code or kind}

    def body(self) -> bytes:
        """OpenAI's error object."""
        return orjson.dumps({"error": self.as_json()})

    def headers(self) -> dict[str, str]:
        """Retry-After where another try may work, x-should-retry where none will, WWW-Authenticate without a key."""
        if self.status in (429, 503):
            return {"Retry-After": str(RETRY_AFTER_S)}
        if self.status == 504:  # the SDK would send it three times, each for the whole of its time
            return {"x-should-retry": "false"}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the client must change the request."""
    return ApiError(400, message, param=param, code=code)


def of_request_error(error: RequestError) -> ApiError:
    """400 for one that begins with the field's name."""
    return bad_request(str(error), str(error).partition(":")[0])


def too_large(limit: int) -> ApiError:
    """413."""
    return ApiError(413, f"the body is too large, need at most {limit} bytes. Send less, or raise max_request_bytes.")


def shutting_down() -> ApiError:
    """503 for what the drain left unfinished."""
    return ApiError(503, "the server shuts down, and drain_s is over. Try again.")


def of_engine(text: str) -> ApiError:
    """What the model answered. INVALID texts begin with the parameter's name where there is one."""
    word, colon, message = text.partition(": ")
    kind = next((kind for kind in ErrorKind if colon and word == kind.value), None)
    if kind is None:
        return ApiError(503, f"the engine's server failed: {text[:200]}. Try again.")
    if kind is ErrorKind.NOT_FOUND:  # the only thing that a request can name
        return ApiError(404, message, param="adapter", code="adapter_not_found")
    param = _param(message) if kind is ErrorKind.INVALID else None
    return renamed(ApiError(_STATUS[kind], message, param=param), "stop_words", "stop")


def of_connection(error: grpc.aio.AioRpcError) -> ApiError:
    """That nobody answered."""
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return ApiError(504, "the engine did not answer in time. Ask for fewer tokens, or try again.")
    text = (error.details() or "")[:200]
    return ApiError(503, f"the engine is not reachable ({error.code().name}: {text}). Try again.")


def renamed(error: ApiError, tensor: str, field: str) -> ApiError:
    """The error with the body's field in place of the engine's tensor, where it is about that one."""
    if error.param != tensor:
        return error
    rest = error.message.removeprefix(f"{tensor}:")
    message = error.message if rest == error.message else f"{field}:{rest}"
    return ApiError(error.status, message, param=field, code=error.code)


def _param(message: str) -> str | None:
    name = message.partition(":")[0].partition(" or ")[0]  # some checks are of two inputs
    return name if name.isidentifier() else None
