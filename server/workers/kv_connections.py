"""The peers whose rows a worker can read: connected before the first request needs it, and again when one was lost."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trtserve.plugins.api import WorkerId
from trtserve.plugins.transfer_api import KVTransfer, Peer, TransferError
from trtserve.server.workers.kv_messages import KVLinked, KVPeer
from trtserve.server.workers.kv_transport import TransportThread

logger = logging.getLogger(__name__)

IMPORT_S = 5.0  # holds up the transport's thread, so other peers' reads too
_RETRY_IMPORT_S = 1.0
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0
_MOST_PROBLEM = 4096  # characters, as the message takes


@dataclass(frozen=True, slots=True)
class Connection:
    """An imported peer, and the transfer that reads it."""

    transfer: KVTransfer
    peer: Peer


@dataclass(slots=True)
class _Known:
    """A peer that the server told of."""

    message: KVPeer
    connection: Connection | None = None
    problem: str = "it is being connected"
    retry_s: float = 0.0  # on the clock; when to connect again
    pause_s: float = _FIRST_PAUSE_S


class Connections:
    """One incarnation of each peer. All calls on the transport's thread.

    transfers: opened; for each peer, the first of them that reaches it. layout: a peer with another one is refused.
    report: told whenever a connection comes, is lost or fails to come.
    """

    def __init__(
        self,
        thread: TransportThread,
        transfers: Sequence[KVTransfer],
        layout: str,
        report: Callable[[KVLinked], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._thread = thread
        self._transfers = transfers
        self._layout = layout
        self._report = report
        self._clock = clock
        self._known: dict[WorkerId, _Known] = {}

    def __len__(self) -> int:
        """How many are connected."""
        return sum(known.connection is not None for known in self._known.values())

    def introduce(self, message: KVPeer) -> None:
        """Connect; blocks up to IMPORT_S for each transfer that could reach it."""
        self._forget(message.worker_id)
        known = self._known[message.worker_id] = _Known(message)
        self._connect(known, IMPORT_S)

    def gone(self, worker_id: WorkerId, incarnation: int) -> None:
        """Reads from it end; ignored for another incarnation than the present one."""
        known = self._known.get(worker_id)
        if known is not None and known.message.incarnation == incarnation:
            self._forget(worker_id)

    def find(self, worker_id: WorkerId, incarnation: int) -> Connection | str:
        """The connection, or in words why there is none."""
        known = self._known.get(worker_id)
        if known is None:
            return f"worker {worker_id} is not there"
        if known.message.incarnation != incarnation:
            return f"worker {worker_id} has been restarted"
        return known.connection or f"worker {worker_id} is not connected: {known.problem}"

    def lost(self, connection: Connection) -> None:
        """A read found that the peer is gone: connect anew, soon."""
        for known in self._known.values():
            if known.connection is connection:
                self._disconnect(known)
                self._retry_later(known, "its connection was lost")

    def reconnect(self) -> None:
        """For a timer: try again where it is time for it."""
        for known in self._known.values():
            if known.connection is None and self._clock() >= known.retry_s:
                self._connect(known, _RETRY_IMPORT_S)

    def _connect(self, known: _Known, deadline_s: float) -> None:
        message = known.message
        if message.layout != self._layout:
            known.problem = f"its KV layout is {message.layout}, the own one {self._layout}"
            known.retry_s = float("inf")
            logger.error("worker %s cannot be read: %s", message.worker_id, known.problem)
            self._report_problem(known)
            return
        try:
            known.connection = self._import(message, deadline_s)
        except TransferError as error:
            self._retry_later(known, str(error))
            return
        known.pause_s = _FIRST_PAUSE_S
        peer = known.connection.peer
        gigabytes_per_s = peer.bandwidth_bytes_per_s / 1e9
        logger.info("KV of %s comes over %s, %.1f GB/s at the probe", message.worker_id, peer.lane, gigabytes_per_s)
        transfer = known.connection.transfer.name
        self._report(
            KVLinked(message.worker_id, message.incarnation, transfer, peer.lane, peer.bandwidth_bytes_per_s, "")
        )

    def _import(self, message: KVPeer, deadline_s: float) -> Connection:
        """By the first transfer that can. Raises TransferError with all their reasons."""
        exports: Mapping[str, bytes] = dict(message.exports)
        problems = []
        for transfer in self._transfers:
            problem = "it does not offer it" if transfer.name not in exports else transfer.unreachable(message.info)
            if problem is None:
                try:
                    return Connection(transfer, transfer.import_peer(message.info, exports[transfer.name], deadline_s))
                except TransferError as error:
                    problem = str(error)
                    logger.warning("%s does not reach %s: %s", transfer.name, message.worker_id, problem)
            problems.append(f"{transfer.name}: {problem}")
        raise TransferError("; ".join(problems))

    def _retry_later(self, known: _Known, problem: str) -> None:
        known.problem = problem
        known.retry_s = self._clock() + known.pause_s
        known.pause_s = min(2 * known.pause_s, _LONGEST_PAUSE_S)
        logger.warning("worker %s is not connected: %s", known.message.worker_id, problem)
        self._report_problem(known)

    def _report_problem(self, known: _Known) -> None:
        message = known.message
        self._report(KVLinked(message.worker_id, message.incarnation, "", "", 0.0, known.problem[:_MOST_PROBLEM]))

    def _forget(self, worker_id: WorkerId) -> None:
        known = self._known.pop(worker_id, None)
        if known is not None:
            self._disconnect(known)

    def _disconnect(self, known: _Known) -> None:
        connection, known.connection = known.connection, None
        if connection is not None:
            self._thread.drop_peer(connection.transfer, connection.peer)
