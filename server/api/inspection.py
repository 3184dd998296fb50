"""The routes that tell of the server itself: models, health, version, metrics; and cancelling a request by its id."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from trtserve.server.api.serving import Serving
from trtserve.server.errors import ModelNotFound, NotFound, RequestCancelled
from trtserve.server.metrics import CONTENT_TYPE


def json_response(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


class Inspection:
    """Handlers for Starlette. None of them waits for anything."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name != self._serving.model.name:
            raise ModelNotFound(name, (self._serving.model.name,))
        return json_response(self._model())

    def _model(self) -> dict[str, Any]:
        model, max_seq_len = self._serving.model, self._serving.cluster.max_seq_len
        told = {"id": model.name, "object": "model", "created": model.created, "owned_by": "trtserve"}
        return told if max_seq_len is None else told | {"max_model_len": max_seq_len}

    async def cancel(self, request: Request) -> Response:
        """By X-Request-Id, or by the id of the answer, which is the same behind a prefix."""
        given = request.path_params["request_id"]
        reason = RequestCancelled("this request was cancelled by its id")
        for request_id in (given, given.removeprefix("chatcmpl-"), given.removeprefix("cmpl-")):
            if self._serving.live.cancel(request_id, reason):
                return json_response({"id": given, "object": "request", "cancelled": True})
        raise NotFound(f"No request {given[:200]!r} is running.", param="request_id")

    async def live(self, request: Request) -> Response:
        """The process answers. Never depends on workers: restarting the server does not mend a worker."""
        return json_response({"status": "live"})

    async def ready(self, request: Request) -> Response:
        """503 while loading, draining, or without a worker for every role."""
        if self._serving.live.draining:
            return json_response({"status": "draining"}, 503)
        if not self._serving.cluster.is_ready(set(self._serving.mode.roles)):
            return json_response({"status": "starting", "phase": self._serving.phase()}, 503)
        return json_response({"status": "ready"})

    async def health(self, request: Request) -> Response:
        """The state in detail; 200 when requests are served, else 503."""
        serving = self._serving
        is_ready = serving.cluster.is_ready(set(serving.mode.roles)) and not serving.live.draining
        workers = [
            {"id": client.worker_id, "role": client.role, "state": client.state, "phase": client.phase}
            for client in serving.cluster.pool
        ]
        status = "draining" if serving.live.draining else "ready" if is_ready else "starting"
        content = {"status": status, "phase": serving.phase(), "model": serving.model.name, "workers": workers}
        return json_response(content, 200 if is_ready else 503)

    async def router_state(self, request: Request) -> Response:
        """Workers as the router sees them, what it has learnt, and how much its index holds."""
        return json_response(self._serving.cluster.router_state())

    async def check_index(self, request: Request) -> Response:
        """The prefix index against the workers' own sets of blocks."""
        checks = await self._serving.cluster.check_index()
        workers = [
            {"id": worker_id, **(asdict(check) if check is not None else {"error": "no answer, or no KV events"})}
            for worker_id, check in checks.items()
        ]
        return json_response({"workers": workers})

    async def version(self, request: Request) -> Response:
        return json_response({"version": version("trtserve")})

    async def metrics(self, request: Request) -> Response:
        return Response(self._serving.metrics.render(), headers={"content-type": CONTENT_TYPE})
