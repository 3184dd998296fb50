"""The error tree is the table that clients rely on."""

from __future__ import annotations

import inspect
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtserve.server import errors
from trtserve.server.errors import ServeError, body

TABLE = [
    (errors.InvalidRequest("m"), 400, "invalid_request_error", "invalid_value"),
    (errors.ContextLengthExceeded("m"), 400, "invalid_request_error", "context_length_exceeded"),
    (errors.AuthenticationFailed("m"), 401, "authentication_error", "invalid_api_key"),
    (errors.NotFound("m"), 404, "not_found_error", "not_found"),
    (errors.ModelNotFound("m"), 404, "not_found_error", "model_not_found"),
    (errors.MethodNotAllowed("PUT", ("GET",)), 405, "invalid_request_error", "method_not_allowed"),
    (errors.Conflict("m"), 409, "conflict_error", "conflict"),
    (errors.BodyTooLarge("m"), 413, "invalid_request_error", "body_too_large"),
    (errors.RequestCancelled("m"), 499, "invalid_request_error", "request_cancelled"),
    (errors.Overloaded("m"), 503, "overloaded_error", "queue_full"),
    (errors.WorkerLost("m"), 503, "server_error", "worker_lost"),
    (errors.RequestTimedOut("m"), 504, "server_error", "request_timeout"),
    (errors.EngineRefused("m"), 400, "invalid_request_error", "not_supported_by_engine"),
    (errors.EngineFailed("m"), 500, "server_error", "engine_error"),
    (errors.Internal(), 500, "server_error", "internal_error"),
]


@pytest.mark.parametrize(("error", "status", "kind", "code"), TABLE, ids=lambda value: type(value).__name__)
def test_each_error_has_its_row(error: ServeError, status: int, kind: str, code: str):
    assert error.status == status
    told = orjson.loads(body(error))["error"]
    assert told == {"message": error.message, "type": kind, "param": error.param, "code": code}
    assert str(error) == error.message


def test_the_table_here_has_every_error():
    there = {value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, ServeError)}
    assert there == {type(error) for error, *_ in TABLE} | {ServeError}


def test_an_error_can_name_a_field_and_a_code_of_its_own():
    error = errors.InvalidRequest("m", param="messages[0].role", code="invalid_type")
    assert orjson.loads(body(error))["error"]["param"] == "messages[0].role"
    assert error.code == "invalid_type"


@pytest.mark.parametrize(
    ("seconds", "header", "milliseconds"), [(0.0, "1", "1"), (0.25, "1", "250"), (1.0, "1", "1000"), (2.1, "3", "2100")]
)
def test_overload_says_when_to_try_again(seconds: float, header: str, milliseconds: str):
    error = errors.Overloaded("m", code="draining", retry_after_s=seconds)
    assert error.headers == {"retry-after": header, "retry-after-ms": milliseconds}
    assert error.code == "draining"


def test_headers_of_the_others():
    assert errors.AuthenticationFailed("m").headers == {"www-authenticate": "Bearer"}
    assert errors.MethodNotAllowed("PUT", ("GET", "POST")).headers == {"allow": "GET, POST"}
    assert errors.InvalidRequest("m").headers == {}


def test_a_missing_model_is_told_with_those_that_are_there():
    assert "a, b" in errors.ModelNotFound("c", ("a", "b")).message
    assert "/v1/models" in errors.ModelNotFound("c").message


@given(st.text(st.characters(), max_size=20), st.none() | st.text(st.characters(), max_size=5))
def test_any_text_makes_a_body(message: str, param: str | None):
    told = orjson.loads(body(errors.InvalidRequest(message, param=param)))["error"]
    assert (told["param"] is None) is (param is None)


def test_a_lone_surrogate_is_replaced():
    assert orjson.loads(body(errors.NotFound("no \ud800")))["error"]["message"] == "no ?"


def test_the_documentation_has_every_code():
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    for error, status, kind, code in TABLE:
        if type(error) is not errors.InvalidRequest:
            assert f"`{code}`" in page
        assert f"`{kind}`" in page
        assert f"| {status} |" in page
