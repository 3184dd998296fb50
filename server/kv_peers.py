"""Which worker may read which other one's KV: every decode worker is told of every prefill worker, as both are ready,
so that connections are up before the first request needs them."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from trtserve.plugins.api import Role
from trtserve.server.workers.client import WorkerClient
from trtserve.server.workers.kv_messages import KVPeer

logger = logging.getLogger(__name__)


class KVPeers:
    """Tells workers of each other. A worker without a KV port takes no part."""

    def __init__(self) -> None:
        self._ready: dict[WorkerClient, KVPeer] = {}

    def ready(self, client: WorkerClient) -> None:
        """A worker takes requests from now on."""
        port = client.kv.port
        if port is None:
            if client.role is not Role.AGG and not client.moves_kv:
                logger.warning(
                    "%s can neither give nor take KV, so prompts are computed twice; see its log", client.worker_id
                )
            return
        mine = KVPeer(client.worker_id, client.kv.incarnation, port.layout, port.info, port.exports)
        for other, theirs in self._ready.items():
            _introduce(mine, client.role, other)
            _introduce(theirs, other.role, client)
        self._ready[client] = mine

    def gone(self, client: WorkerClient) -> None:
        """It is not there any more; what is read from it fails."""
        mine = self._ready.pop(client, None)
        if mine is not None:
            for other in self._readers():
                other.kv.links.part(mine.worker_id, mine.incarnation)

    def relabelled(self, client: WorkerClient, former: Role) -> None:
        """It has another role now, and nothing is read from it or by it at present."""
        if client not in self._ready:
            return
        self.gone(client)
        if former is Role.DECODE:
            for other, theirs in self._ready.items():
                if other.role is Role.PREFILL:
                    client.kv.links.part(theirs.worker_id, theirs.incarnation)
        self.ready(client)

    def _readers(self) -> Iterable[WorkerClient]:
        return (client for client in self._ready if client.role is Role.DECODE)


def _introduce(peer: KVPeer, role: Role, reader: WorkerClient) -> None:
    if role is Role.PREFILL and reader.role is Role.DECODE:
        reader.kv.links.introduce(peer)
