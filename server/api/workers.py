"""The routes for operators of workers: what there is, and another role for one of them."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from trtserve.plugins.api import Role, WorkerId
from trtserve.server.api.body import body_of
from trtserve.server.api.inspection import json_response
from trtserve.server.api.schema import parse_role
from trtserve.server.api.serving import Serving
from trtserve.server.workers.client import WorkerClient
from trtserve.server.workers.kv_links import KVLink


class Workers:
    """Handlers for Starlette."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def list(self, request: Request) -> Response:
        """Every worker with its role, state and load."""
        return json_response({"workers": [self._described(client) for client in self._serving.cluster.pool]})

    async def change_role(self, request: Request) -> Response:
        """Waits until the worker is drained; its client may leave meanwhile without changing that."""
        serving = self._serving
        wanted = parse_role(await body_of(request, serving.limits))
        worker_id = WorkerId(request.path_params["worker_id"])
        former = await serving.roles.change(worker_id, Role(wanted.role), wanted.drain_timeout_s, bool(wanted.force))
        return json_response({"worker": self._described(serving.cluster.pool[worker_id]), "former_role": former})

    def _described(self, client: WorkerClient) -> dict[str, Any]:
        is_draining = self._serving.roles.is_draining(client.worker_id)
        port = client.kv.port
        described: dict[str, Any] = {
            "id": client.worker_id,
            "role": client.role,
            "state": "draining" if is_draining else client.state,
            "phase": client.phase,
            "restarts": client.restarts,
            "booked_sequences": self._serving.cluster.booked(client),
            "load": msgspec.structs.asdict(client.load),
            "ranks": client.num_ranks,
            "engine": dict(client.info.about) if client.info is not None else {},
            "kv": None,
        }
        if port is not None:
            described["kv"] = {
                "transfers": [name for name, _ in port.exports],
                "rows": port.num_rows,
                "row_bytes": port.block_bytes,
                "reads_from": [_link(link) for link in client.kv.links],
                "usage": msgspec.structs.asdict(client.kv.usage),
            }
        return described


def _link(link: KVLink) -> dict[str, Any]:
    return {
        "worker": link.worker_id,
        "is_connected": link.is_up,
        "transfer": link.transfer or None,
        "lane": link.lane or None,
        "bandwidth_bytes_per_second": link.bandwidth_bytes_per_s if link.is_up else None,
        "failures": link.failures,
        "problem": link.problem or None,
    }
