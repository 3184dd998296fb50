"""Which path is answered by what. The two generating routes are plain ASGI; Starlette routes the rest."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from trtserve.server.api.asgi import Receive, Scope, Send
from trtserve.server.api.body import discard_body
from trtserve.server.api.chat import prepare_chat
from trtserve.server.api.completions import prepare_completion
from trtserve.server.api.generation import GenerationEndpoint, answer_error
from trtserve.server.api.inspection import Inspection, json_response
from trtserve.server.api.openapi import openapi_document
from trtserve.server.api.serving import Serving, request_id_of
from trtserve.server.api.tokenization import Tokenization
from trtserve.server.api.workers import Workers
from trtserve.server.errors import Internal, MethodNotAllowed, NotFound, ServeError, body

_UNWANTED_BODY_BYTES = 2**20
"""So much of a body is read where none is wanted; past it the connection is cut off."""

Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]
Handler = Callable[[Request], Awaitable[Response]]


class Application:
    """The ASGI application that hypercorn serves."""

    def __init__(self, serving: Serving) -> None:
        self._generating: dict[str, Asgi] = {
            "/v1/chat/completions": GenerationEndpoint(serving, "chat", "chatcmpl-", prepare_chat),
            "/v1/completions": GenerationEndpoint(serving, "completions", "cmpl-", prepare_completion),
        }
        self._rest: Any = _starlette(serving)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        generating = self._generating.get(scope.get("path", ""))
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif generating is None or scope["type"] != "http":
            await self._rest(scope, receive, send)
        elif scope["method"] == "POST":
            await generating(scope, receive, send)
        else:
            headers = [(b"x-request-id", request_id_of(scope).encode())]
            await discard_body(receive, send, _UNWANTED_BODY_BYTES)
            await answer_error(send, MethodNotAllowed(scope["method"], ("POST",)), headers)


async def _live(receive: Receive, send: Send) -> None:
    """ASGI's lifespan: nothing to do, and, unlike Starlette's, no failure if it is cancelled at the end."""
    for _ in ("startup", "shutdown"):
        message = await receive()
        await send({"type": f"{message['type']}.complete"})


def _starlette(serving: Serving) -> Starlette:
    inspection = Inspection(serving)
    tokenization = Tokenization(serving)
    workers = Workers(serving)
    document = openapi_document(version("trtserve"), requires_key=serving.keys.are_required)

    async def openapi(request: Request) -> Response:
        return json_response(document)

    def identified(handler: Handler) -> Handler:
        """What it answers carries the request's id; errors get theirs in `_on_serve_error`."""

        async def answered(request: Request) -> Response:
            response = await handler(request)
            response.headers["x-request-id"] = request_id_of(dict(request.scope))
            return response

        return answered

    def guarded(handler: Handler) -> Handler:
        async def checked(request: Request) -> Response:
            try:
                serving.keys.check(dict(request.scope))
            except ServeError:
                await _discard_body_of(request)
                raise
            return await handler(request)

        return identified(checked)

    routes = [
        Route("/v1/models", guarded(inspection.models)),
        Route("/v1/models/{model:path}", guarded(inspection.model)),
        Route("/v1/router/state", guarded(inspection.router_state)),
        Route("/v1/router/check", guarded(inspection.check_index), methods=["POST"]),
        Route("/v1/workers", guarded(workers.list)),
        Route("/v1/workers/{worker_id}/role", guarded(workers.change_role), methods=["POST"]),
        Route("/v1/requests/{request_id}", guarded(inspection.cancel), methods=["DELETE"]),
        *(Route(f"{prefix}/tokenize", guarded(tokenization.tokenize), methods=["POST"]) for prefix in ("", "/v1")),
        *(Route(f"{prefix}/detokenize", guarded(tokenization.detokenize), methods=["POST"]) for prefix in ("", "/v1")),
        *(Route(path, identified(inspection.live)) for path in ("/live", "/healthz")),
        *(Route(path, identified(inspection.ready)) for path in ("/ready", "/readyz")),
        Route("/health", identified(inspection.health)),
        Route("/version", identified(inspection.version)),
        *(Route(path, identified(inspection.metrics)) for path in ("/metrics", "/prometheus/metrics")),
        Route("/openapi.json", identified(openapi)),
    ]
    handlers: dict[Any, Any] = {ServeError: _on_serve_error, HTTPException: _on_http_exception, Exception: _on_defect}
    return Starlette(routes=routes, exception_handlers=handlers)


async def _on_serve_error(request: Request, error: ServeError) -> Response:
    headers = dict(error.headers) | {"x-request-id": request_id_of(dict(request.scope))}
    return Response(body(error), error.status, headers, "application/json")


async def _on_http_exception(request: Request, error: HTTPException) -> Response:
    await _discard_body_of(request)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return await _on_serve_error(request, MethodNotAllowed(request.method, tuple(allowed.split(", "))))
    path = request.url.path[:200]
    return await _on_serve_error(request, NotFound(f"There is nothing at {path!r}; /openapi.json lists what is."))


async def _discard_body_of(request: Request) -> None:
    await discard_body(request.receive, request._send, _UNWANTED_BODY_BYTES)  # type: ignore[arg-type]


async def _on_defect(request: Request, error: Exception) -> Response:
    return await _on_serve_error(request, Internal())  # Starlette raises it again, and hypercorn logs it
