"""The OpenAPI 3.1 document of this server, made from the very models that validate the bodies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from trtserve.server import errors
from trtserve.server.api.openapi_answers import Schema, answer_schemas, reference
from trtserve.server.api.schema_bodies import ChatCompletionBody, CompletionBody, DetokenizeBody, RoleBody, TokenizeBody

_BODIES: tuple[type[BaseModel], ...] = (ChatCompletionBody, CompletionBody, TokenizeBody, DetokenizeBody, RoleBody)

_ALWAYS = (errors.AuthenticationFailed, errors.Internal)
_WITH_BODY = (errors.InvalidRequest, errors.ModelNotFound, errors.BodyTooLarge, errors.RequestTimedOut, *_ALWAYS)
_GENERATING = (*_WITH_BODY, errors.RequestCancelled, errors.Overloaded)


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path. `answer` is the name of a schema, or None for plain text."""

    method: str
    path: str
    name: str  # operationId
    summary: str
    answer: str | None
    body: type[BaseModel] | None = None
    event: str | None = None  # schema of the SSE events with stream: true
    errors: tuple[type[errors.ServeError], ...] = ()
    is_open: bool = False  # asks for no API key
    is_probe: bool = False  # 503 comes with the same schema as 200


OPERATIONS: tuple[Operation, ...] = (
    Operation(
        "post",
        "/v1/chat/completions",
        "createChatCompletion",
        "Answer a conversation",
        "ChatCompletion",
        ChatCompletionBody,
        "ChatCompletionChunk",
        _GENERATING,
    ),
    Operation(
        "post",
        "/v1/completions",
        "createCompletion",
        "Continue a text",
        "Completion",
        CompletionBody,
        "CompletionChunk",
        _GENERATING,
    ),
    *(
        operation
        for prefix, suffix in (("", ""), ("/v1", "V1"))
        for operation in (
            Operation(
                "post",
                f"{prefix}/tokenize",
                f"tokenize{suffix}",
                "Token ids of a text or a conversation",
                "Tokenized",
                TokenizeBody,
                errors=_WITH_BODY,
            ),
            Operation(
                "post",
                f"{prefix}/detokenize",
                f"detokenize{suffix}",
                "Text of token ids",
                "Detokenized",
                DetokenizeBody,
                errors=_WITH_BODY,
            ),
        )
    ),
    Operation("get", "/v1/models", "listModels", "The models served here", "ModelList", errors=_ALWAYS),
    Operation("get", "/v1/models/{model}", "getModel", "One model", "Model", errors=(errors.ModelNotFound, *_ALWAYS)),
    Operation(
        "delete",
        "/v1/requests/{request_id}",
        "cancelRequest",
        "Cancel a running request by the id that its answer carries",
        "Cancelled",
        errors=(errors.NotFound, *_ALWAYS),
    ),
    Operation("get", "/v1/workers", "listWorkers", "Workers with role, state and load", "WorkerList", errors=_ALWAYS),
    Operation(
        "post",
        "/v1/workers/{worker_id}/role",
        "changeRole",
        "Drain a worker and give it another role",
        "RoleChanged",
        RoleBody,
        errors=(
            *(errors.InvalidRequest, errors.NotFound, errors.Conflict),
            *(errors.BodyTooLarge, errors.RequestTimedOut, errors.Overloaded, *_ALWAYS),
        ),
    ),
    Operation(
        "get",
        "/v1/router/state",
        "getRouterState",
        "Workers as the router sees them, and what it has learnt",
        "Document",
        errors=_ALWAYS,
    ),
    Operation(
        "post",
        "/v1/router/check",
        "checkIndex",
        "Compare the prefix index with the workers' own sets of blocks",
        "Document",
        errors=_ALWAYS,
    ),
    Operation(
        "get",
        "/health",
        "getHealth",
        "Whether requests can be served now",
        "Health",
        is_open=True,
        is_probe=True,
    ),
    Operation("get", "/live", "getLive", "Whether the process works at all", "Health", is_open=True),
    Operation(
        "get",
        "/ready",
        "getReady",
        "Whether a worker is ready and the server takes requests",
        "Health",
        is_open=True,
        is_probe=True,
    ),
    Operation("get", "/version", "getVersion", "The version of this server", "Version", is_open=True),
    Operation("get", "/metrics", "getMetrics", "Metrics in Prometheus' text format", None, is_open=True),
    Operation("get", "/prometheus/metrics", "getMetricsAlias", "The same as /metrics", None, is_open=True),
    Operation("get", "/openapi.json", "getOpenapi", "This document", "Document", is_open=True),
)


def openapi_document(version: str, *, requires_key: bool = False) -> dict[str, Any]:
    """The document as a plain dict, ready for orjson. version: of trtserve. requires_key: whether API keys are set."""
    _, bodies = models_json_schema(
        [(body, "validation") for body in _BODIES], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, requires_key)
    components: dict[str, Any] = {
        "schemas": {**bodies["$defs"], **answer_schemas(), "Document": {"type": "object"}},
        "responses": {
            kind.__name__: _error_response(kind)
            for kind in (*_GENERATING, errors.NotFound, errors.Conflict)
            if requires_key or kind is not errors.AuthenticationFailed
        },
    }
    if requires_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "trtserve",
            "version": version,
            "description": "An OpenAI-compatible server. docs/api.md says what is taken, refused and ignored.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": components,
    }


def _operation(operation: Operation, requires_key: bool) -> dict[str, Any]:
    responses: dict[str, Any] = {"200": _answer(operation)}
    for kind in operation.errors:
        if kind is not errors.AuthenticationFailed or requires_key:
            responses[str(kind.status)] = {"$ref": f"#/components/responses/{kind.__name__}"}
    if operation.is_probe:
        responses["503"] = {**_answer(operation), "description": "Not now."}
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "responses": responses,
    }
    names = [part[1:-1] for part in operation.path.split("/") if part.startswith("{")]
    if names:
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if operation.body is not None:
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": reference(operation.body.__name__)}},
        }
    if requires_key and not operation.is_open:
        described["security"] = [{"key": []}]
    return described


def _answer(operation: Operation) -> dict[str, Any]:
    if operation.answer is None:
        return {"description": "Done.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    content: dict[str, Schema] = {"application/json": {"schema": reference(operation.answer)}}
    described: dict[str, Any] = {"description": "Done.", "content": content}
    if operation.event is not None:
        content["text/event-stream"] = {"schema": reference(operation.event)}
        described["description"] = (
            "Done. With stream: true each event's data is one chunk, the last one is [DONE]; a failure after the "
            "first event comes as an event whose data is an Error."
        )
    if operation.body is not None:
        described["headers"] = {
            "X-Trtserve-Ignored-Params": _header(
                "string", "Fields of the body that nobody knows and that were ignored."
            )
        }
    return described


def _error_response(kind: type[errors.ServeError]) -> dict[str, Any]:
    described: dict[str, Any] = {
        "description": (kind.__doc__ or "").partition("\n")[0],
        "content": {"application/json": {"schema": reference("Error")}},
    }
    if kind is errors.Overloaded:
        described["headers"] = {
            "Retry-After": _header("integer", "Seconds until trying again makes sense."),
            "retry-after-ms": _header("integer", "The same in milliseconds."),
        }
    return described


def _header(kind: str, description: str) -> Mapping[str, Any]:
    return {"description": description, "schema": {"type": kind}}
