"""On the worker that needs a prompt's KV: reads a peer's rows into its own, then puts them into the prefix cache.

A fetch lives on the transport's thread. Once it is reported to the server it waits for `commit` or `abort`, which the
socket's thread calls, so that a request behind a commit finds the blocks in place.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from trtserve.plugins.api import KVStoreEngine, RequestId
from trtserve.plugins.transfer_api import BlockCopies, Completion, ReadPlan, TransferOutcome
from trtserve.server.workers.kv_connections import Connection, Connections
from trtserve.server.workers.kv_engine import Call
from trtserve.server.workers.kv_fetch import Fetch, Part
from trtserve.server.workers.kv_messages import KVFetch, KVFetched, rows_of
from trtserve.server.workers.kv_staging import Staging
from trtserve.server.workers.kv_transport import Read, TransportThread, read_deadline_s

logger = logging.getLogger(__name__)

REGION = "kv"
MAX_FETCHES = 1024
FORGET_S = 120.0


class Fetcher:
    """`fetch`, `forget_stale` and what they lead to run on the transport's thread; `commit` and `abort` on the
    socket's.

    call: runs a function where the engine's methods may be called, in the order of submits and calls. report: queues
    the message for the server.
    """

    def __init__(
        self,
        engine: KVStoreEngine,
        call: Call,
        staging: Staging,
        thread: TransportThread,
        connections: Connections,
        block_bytes: int,
        report: Callable[[KVFetched], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._call = call
        self._staging = staging
        self._thread = thread
        self._connections = connections
        self._block_bytes = block_bytes
        self._report = report
        self._clock = clock
        self._fetches: dict[RequestId, Fetch] = {}
        self._reported: dict[RequestId, Fetch] = {}  # taken out by either thread, in one step
        self.num_bytes = self.num_failed = self.num_written = self.num_write_failures = 0
        self.copying_s = 0.0

    @property
    def num_open(self) -> int:
        return len(self._fetches)

    # -------------------------------------------------------------- from the socket's thread

    def commit(self, request_id: RequestId, is_valid: bool) -> None:
        """Write what was read into the prefix cache, before any request that is submitted after this call; or drop
        it."""
        fetch = self._reported.pop(request_id, None)
        self._thread.post(partial(self._drop, request_id))
        if fetch is None:
            return
        if not is_valid or not fetch.num_usable:
            self._give_back(fetch)
            return
        written = self._call(partial(self._write, fetch))
        written.add_done_callback(partial(self._written, fetch))

    def abort(self, request_id: RequestId) -> None:
        """Drop a fetch in any state."""
        fetch = self._reported.pop(request_id, None)
        if fetch is not None:
            self._give_back(fetch)
        self._thread.post(partial(self._drop, request_id))

    # -------------------------------------------------------------- on the transport's thread

    def fetch(self, order: KVFetch) -> None:
        """Read what a message asks for, behind what was asked for before."""
        if order.prompt:
            self._drop(order.request_id)
            if len(self._fetches) >= MAX_FETCHES:
                reason = f"{MAX_FETCHES} fetches are under way already"
                self._report(KVFetched(order.request_id, False, 0, 0, 0.0, "", reason))
                return
            self._begin(order)
        fetch = self._fetches.get(order.request_id)
        if fetch is None or fetch.is_reported or fetch.has_all_orders:
            return  # aborted, failed or complete before this message came
        fetch.orders.append(order)
        fetch.has_all_orders = order.is_final
        if fetch.next_block is not None:
            self._go_on(fetch)

    def forget_stale(self) -> None:
        """For a timer: drop what the server has forgotten."""
        for fetch in list(self._fetches.values()):
            if self._clock() - fetch.begun_s > FORGET_S:
                logger.warning("nobody wants the KV fetched for request %d any more", fetch.request_id)
                self._drop(fetch.request_id)

    def _begin(self, order: KVFetch) -> None:
        prompt = array("i")
        prompt.frombytes(order.prompt)
        fetch = Fetch(order.request_id, prompt, order.cache_salt, self._clock)
        self._fetches[order.request_id] = fetch
        stored = self._call(lambda: self._engine.stored_blocks(prompt, order.cache_salt))
        stored.add_done_callback(lambda future: self._thread.post(lambda: self._know_stored(fetch, future)))

    def _know_stored(self, fetch: Fetch, stored: Future[int]) -> None:
        if fetch.is_dropped or fetch.is_reported:
            return
        error = stored.exception()
        if error is not None:
            self._fail(fetch, f"the engine did not say what it has: {error}")
            return
        fetch.next_block = stored.result()
        self._go_on(fetch)

    def _go_on(self, fetch: Fetch) -> None:
        """Read what is ordered, and report if that was all."""
        orders, fetch.orders = fetch.orders, []
        for order in orders:
            if not fetch.is_reported:
                self._follow(fetch, order)
        self._report_if_complete(fetch)

    def _follow(self, fetch: Fetch, order: KVFetch) -> None:
        """Begin to read the blocks of an order that are needed, as many as there are rows for."""
        assert fetch.next_block is not None
        try:
            sources = rows_of(order.rows)[max(fetch.next_block - order.first_block, 0) :]
        except ValueError as error:
            self._fail(fetch, str(error))
            return
        if not sources or fetch.next_block < order.first_block:
            return  # there already, or behind blocks that found no row
        connection = self._connections.find(order.worker_id, order.incarnation)
        if isinstance(connection, str):
            self._fail(fetch, connection)
            return
        rows = self._staging.take(len(sources))
        if len(rows) < len(sources):
            fetch.shortage = f"no row was free for {len(sources) - len(rows)} of {len(sources)} blocks"
        if rows:
            self._read(fetch, connection, Part(fetch.next_block, rows), sources[: len(rows)])
            fetch.next_block += len(rows)

    def _read(self, fetch: Fetch, connection: Connection, part: Part, sources: array[int]) -> None:
        peer = connection.peer
        fetch.lane = peer.lane
        part.read = Read(
            connection.transfer,
            peer,
            ReadPlan([BlockCopies(REGION, sources, array("i", part.rows))]),
            read_deadline_s(len(sources) * self._block_bytes, peer.bandwidth_bytes_per_s),
            ended=partial(self._read_ended, fetch, part, connection),
            overdue=partial(self._read_overdue, fetch, connection),
        )
        fetch.begin(part)
        self._thread.read(part.read)

    def _read_ended(self, fetch: Fetch, part: Part, connection: Connection, completion: Completion) -> None:
        is_done = completion.outcome is TransferOutcome.DONE
        is_late = fetch.is_dropped or fetch.is_reported
        fetch.end(part, is_done, completion.num_bytes)
        self.num_bytes += completion.num_bytes
        if completion.outcome in (TransferOutcome.PEER_LOST, TransferOutcome.TIMED_OUT):
            self._connections.lost(connection)  # what else is read from it would only time out too
        if is_late:
            self._staging.give_back(part.rows)  # it was open when the fetch ended, so it is of no use
        elif is_done:
            self._report_if_complete(fetch)
        else:
            self._fail(fetch, completion.reason or f"the read ended: {completion.outcome}")

    def _read_overdue(self, fetch: Fetch, connection: Connection) -> None:
        self._fail(fetch, f"the read over {connection.peer.lane} did not end in time")
        self._connections.lost(connection)

    def _report_if_complete(self, fetch: Fetch) -> None:
        if fetch.is_complete and not fetch.is_reported:
            self._hand_out(fetch, fetch.report())

    def _fail(self, fetch: Fetch, reason: str) -> None:
        """Report what there is so far, and end what is still being read."""
        if fetch.is_reported or fetch.is_dropped:
            return
        self.num_failed += 1
        logger.warning("fetching KV for request %d failed: %s", fetch.request_id, reason)
        self._hand_out(fetch, fetch.report(reason))
        self._cancel_reads(fetch)

    def _hand_out(self, fetch: Fetch, message: KVFetched) -> None:
        usable = set(fetch.usable())
        for part in fetch.parts:
            if part.is_over and part not in usable:
                self._staging.give_back(part.rows)
        self._quarantine_open(fetch)
        self._reported[fetch.request_id] = fetch
        self._report(message)

    def _drop(self, request_id: RequestId) -> None:
        """Forget a fetch. Its rows are free as soon as nothing writes to them."""
        fetch = self._fetches.pop(request_id, None)
        if fetch is None:
            return
        if self._reported.pop(request_id, None) is not None:
            self._give_back(fetch)
        if fetch.is_reported:
            return  # its rows are taken care of, by whom it was handed out to
        fetch.is_dropped = True
        for part in fetch.parts:
            if part.is_over:
                self._staging.give_back(part.rows)
        self._quarantine_open(fetch)
        self._cancel_reads(fetch)

    def _quarantine_open(self, fetch: Fetch) -> None:
        for part in fetch.parts:
            if not part.is_over:
                self._staging.quarantine(part.rows)

    def _cancel_reads(self, fetch: Fetch) -> None:
        for part in fetch.parts:
            if not part.is_over and part.read is not None:
                self._thread.cancel(part.read)

    # -------------------------------------------------------------- after the end

    def _write(self, fetch: Fetch) -> int:
        """On the engine's thread: put the blocks into its prefix cache; how many of them are new there."""
        begun_s = time.perf_counter()
        try:
            return self._stored(fetch)
        finally:
            self.copying_s += time.perf_counter() - begun_s

    def _stored(self, fetch: Fetch) -> int:
        rows = [row for part in fetch.usable() for row in part.rows]
        first_block = fetch.parts[0].first_block
        # What had been there at the beginning may have been evicted, and other requests may have stored more.
        num_stored = self._engine.stored_blocks(fetch.prompt, fetch.cache_salt)
        rows = rows[max(num_stored - first_block, 0) :]
        if num_stored < first_block or not rows:
            return 0
        return self._engine.write_kv(fetch.prompt, fetch.cache_salt, num_stored, rows)

    def _written(self, fetch: Fetch, written: Future[int]) -> None:
        self._give_back(fetch)
        error = written.exception()
        if error is not None:
            self.num_write_failures += 1
            logger.error("the engine did not take the KV of request %d", fetch.request_id, exc_info=error)
        else:
            self.num_written += written.result()

    def _give_back(self, fetch: Fetch) -> None:
        self._staging.give_back([row for part in fetch.usable() for row in part.rows])
