"""Every error that a client can be told of: one tree, which is also the table error -> HTTP status, type and code.

The body is OpenAI's, ``{"error": {"message", "type", "param", "code"}}``, the same in a JSON answer and in an SSE
``error`` event. Clients can rely on `status`, `type` and `code`; messages are for people and may change. Messages
name the value, the limit and the cure, and never hold a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import orjson

from trtserve.plugins.api import WorkerFailure


class ServeError(Exception):
    """Something a client is told of; the subclasses say what. Only they are raised.

    `param` is the dotted path of the offending field in the request body (``messages[0].role``), None where no field
    is to blame. `headers` are to be added to the answer.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code

    @property
    def headers(self) -> Mapping[str, str]:
        return {}


class InvalidRequest(ServeError):
    """The request is wrong whoever serves it. Sending it again gives the same answer."""

    status = 400
    type = "invalid_request_error"
    default_code = "invalid_value"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and output together are longer than the model or the KV cache takes."""

    default_code = "context_length_exceeded"


class AuthenticationFailed(ServeError):
    """The API key is missing or not one of ours."""

    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"

    @property
    def headers(self) -> Mapping[str, str]:
        return {"www-authenticate": "Bearer"}


class NotFound(ServeError):
    """No such path, or no such thing under it."""

    status = 404
    type = "not_found_error"
    default_code = "not_found"


class ModelNotFound(NotFound):
    """The model that was asked for is not served here."""

    default_code = "model_not_found"

    def __init__(self, model: str, served: tuple[str, ...] = ()) -> None:
        there = f"served here: {', '.join(served)}" if served else "GET /v1/models lists what is"
        super().__init__(f"The model {model[:200]!r} is not served here; {there}.", param="model")


class MethodNotAllowed(ServeError):
    """The path is there, but not for this method."""

    status = 405
    type = "invalid_request_error"
    default_code = "method_not_allowed"

    def __init__(self, method: str, allowed: tuple[str, ...]) -> None:
        self.allowed = allowed
        super().__init__(f"This path does not take {method[:20]}; use {' or '.join(allowed)}.")

    @property
    def headers(self) -> Mapping[str, str]:
        return {"allow": ", ".join(self.allowed)}


class Conflict(ServeError):
    """It cannot be done in the state that things are in; the code says what is in the way."""

    status = 409
    type = "conflict_error"
    default_code = "conflict"


class BodyTooLarge(ServeError):
    """The request body is over the limit of the settings."""

    status = 413
    type = "invalid_request_error"
    default_code = "body_too_large"


class RequestCancelled(ServeError):
    """The client left, or cancelled the request by its id. The status is for logs and for whoever still listens."""

    status = 499
    type = "invalid_request_error"
    default_code = "request_cancelled"


class Overloaded(ServeError):
    """Not now: codes ``queue_full``, ``no_worker`` (none is ready) and ``draining`` (this server is going down).

    `retry_after_s` seconds is when to try again; it goes out as Retry-After (whole seconds, at least 1) and as
    retry-after-ms, which the OpenAI clients prefer.
    """

    status = 503
    type = "overloaded_error"
    default_code = "queue_full"

    def __init__(self, message: str, *, code: str | None = None, retry_after_s: float = 1.0) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> Mapping[str, str]:
        return {
            "retry-after": str(max(1, math.ceil(self.retry_after_s))),
            "retry-after-ms": str(max(1, math.ceil(self.retry_after_s * 1000))),
        }


class WorkerLost(ServeError, WorkerFailure):
    """The worker died under the request and no other could take over. Sending it again may well work."""

    status = 503
    default_code = "worker_lost"


class RequestTimedOut(ServeError):
    """The answer was not complete within the time that the settings give a request; its work was cancelled."""

    status = 504
    default_code = "request_timeout"


class EngineFailed(ServeError):
    """The engine gave up on this request; it goes on serving others."""

    default_code = "engine_error"


class EngineRefused(InvalidRequest):
    """The engine cannot do what the request asks for."""

    default_code = "not_supported_by_engine"


class Internal(ServeError):
    """A defect of this server. The log has the traceback; the client gets no details."""

    def __init__(self, message: str = "Internal error of the server; its log has the details.") -> None:
        super().__init__(message)


def body(error: ServeError) -> bytes:
    """The JSON body, for an answer as for the data of an SSE ``error`` event. Never raises."""
    fields = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    try:
        return orjson.dumps({"error": fields})
    except (TypeError, ValueError):
        # A lone surrogate, from a URL or a file name, cannot be UTF-8.
        safe = {name: value and value.encode(errors="replace").decode() for name, value in fields.items()}
        return orjson.dumps({"error": safe})
