"""Which peers a worker can read KV from, as it reported: the server's end of `KVPeer`, `KVPeerGone`, `KVLinked`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from trtserve.plugins.api import WorkerId
from trtserve.server.workers.kv_messages import KVLinked, KVPeer, KVPeerGone, KVToWorker

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class KVLink:
    """One peer that the worker was told of. Without a connection, `problem` says why."""

    worker_id: WorkerId  # of the peer
    incarnation: int
    transfer: str = ""
    lane: str = ""
    bandwidth_bytes_per_s: float = 0.0
    problem: str = "it is being connected"
    failures: int = 0

    @property
    def is_up(self) -> bool:
        return not self.problem


class KVLinks:
    """Belongs to a `KVClient`. Lives on the event loop. Only peers that the server introduced are in it."""

    def __init__(self, reader: WorkerId, send: Callable[[KVToWorker], bool]) -> None:
        self._reader = reader
        self._send = send
        self._links: dict[WorkerId, KVLink] = {}

    def __iter__(self) -> Iterator[KVLink]:
        return iter(self._links.values())

    def introduce(self, peer: KVPeer) -> None:
        """Have the worker connect to that peer."""
        self._links[peer.worker_id] = KVLink(peer.worker_id, peer.incarnation)
        self._send(peer)

    def part(self, worker_id: WorkerId, incarnation: int) -> None:
        """That peer is not to be read any more."""
        self._links.pop(worker_id, None)
        self._send(KVPeerGone(worker_id, incarnation))

    def clear(self) -> None:
        """The worker has ended, or a new process of it begins."""
        self._links.clear()

    def on_linked(self, message: KVLinked) -> None:
        """Reports on peers, or incarnations, that are not there any more are ignored."""
        link = self._links.get(message.worker_id)
        if link is None or link.incarnation != message.incarnation:
            return
        if message.problem:
            link.failures += 1
            if message.problem != link.problem:
                logger.warning(
                    "%s cannot read the KV of %s, so it computes what comes from there: %s",
                    self._reader,
                    message.worker_id,
                    message.problem,
                )
        else:
            logger.info(
                "%s reads the KV of %s by %s over %s, %.1f GB/s at the probe",
                self._reader,
                message.worker_id,
                message.transfer,
                message.lane,
                message.bandwidth_bytes_per_s / 1e9,
            )
        link.transfer, link.lane, link.problem = message.transfer, message.lane, message.problem
        link.bandwidth_bytes_per_s = message.bandwidth_bytes_per_s
