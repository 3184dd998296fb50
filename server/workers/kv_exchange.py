"""A worker's part in the KV hand-over: keeps the KV of prompts readable for peers, and fetches what peers keep.

Control comes from the server over the worker's socket, bytes go straight between workers. Three threads meet here: the
socket's, the engine's, and one of its own that makes every call to the transfers (`kv_transport`). None waits for
another one; the engine's copies blocks, and nothing else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec

from trtserve.plugins.api import Engine, EngineInfo, KVLayout, KVRows, Request, StepOutputs
from trtserve.plugins.transfer.cuda_driver import device_uuid
from trtserve.plugins.transfer.identity import peer_info
from trtserve.plugins.transfer_api import TransferConfig, TransferError
from trtserve.server.workers.kv_connections import Connections
from trtserve.server.workers.kv_engine import KVEngine, kv_engine_of
from trtserve.server.workers.kv_fetcher import Fetcher
from trtserve.server.workers.kv_memory import RowMemory, TransferChoice, open_rows
from trtserve.server.workers.kv_messages import (
    MAX_ROWS,
    KVAbort,
    KVCommit,
    KVExtend,
    KVFetch,
    KVFetched,
    KVFromWorker,
    KVPeer,
    KVPeerGone,
    KVPort,
    KVRelease,
    KVReleased,
    KVToWorker,
    KVUsage,
)
from trtserve.server.workers.kv_publisher import Publisher
from trtserve.server.workers.kv_staging import LEASE_S, Staging
from trtserve.server.workers.kv_transport import TransportThread

logger = logging.getLogger(__name__)

_OPEN_S = 120.0  # to open transfers and populate the rows, which may be many GiB
_ATTACH_S = 60.0


@dataclass(frozen=True, slots=True)
class ExchangeOptions:
    """How a worker takes part. config: its device and options are filled in from the layout and the choice."""

    choice: TransferChoice
    config: TransferConfig
    num_rows: int | None = None  # None: by the size of the KV cache, see `default_num_rows`
    lease_s: float = LEASE_S
    clock: Callable[[], float] = time.monotonic


def default_num_rows(info: EngineInfo) -> int:
    """A quarter of the KV cache, and room for one longest sequence at least."""
    return max(info.num_blocks // 4, info.max_seq_len // info.block_size + 1)


@dataclass(frozen=True, slots=True)
class _Parts:
    """What there is from `start` on."""

    staging: Staging
    thread: TransportThread
    connections: Connections
    publisher: Publisher
    fetcher: Fetcher


class KVExchange:
    """`start` once the engine runs, on any thread; then `handle`, `expect` and `usage` from the socket's thread and
    `after_step` from the engine's; `close` after the engine.

    options: None for a worker that takes no part. send: queues a message for the server behind those that were queued
    before; does not wait.
    """

    def __init__(self, options: ExchangeOptions | None, send: Callable[[KVFromWorker], None]) -> None:
        self._options = options
        self._send = send
        self._parts: _Parts | None = None

    def start(self, engine: Engine, info: EngineInfo) -> KVPort | None:
        """Get the rows, attach them to the engine and open the transfers. None where the worker takes no part, as one
        whose engine moves KV itself.

        Raises TransferError where a transfer is required and cannot be used.
        """
        if self._options is None or info.moves_kv:
            return None
        kv_engine = kv_engine_of(engine)
        if kv_engine is None:
            problem = "this engine has no KV that other workers could read or write"
            if self._options.choice.is_required:
                raise TransferError(f"{problem}, and --transfer asks for it by name; auto does without")
            logger.warning("%s", problem)
            return None
        thread = TransportThread(self._options.clock)
        try:
            return self._open(self._options, kv_engine, info, thread)
        except TransferError as error:
            thread.close()
            if self._options.choice.is_required:
                raise
            logger.warning("no KV is moved from or to this worker: %s", error)
            return None
        except BaseException:
            thread.close()
            raise

    def expect(self, request: Request) -> None:
        """The KV of this request's prompt is to be kept; call before it is submitted."""
        if self._parts is not None:
            self._parts.publisher.expect(request)

    def after_step(self, step: StepOutputs) -> None:
        """Call right after the message of each step was queued."""
        if self._parts is not None:
            self._parts.publisher.after_step(step)

    def handle(self, message: KVToWorker) -> None:
        """What the server wants. Before `start`, or without a part in it, it is told so."""
        parts = self._parts
        if parts is None:
            self._decline(message)
            return
        match message:
            case KVFetch():
                parts.thread.post(lambda: parts.fetcher.fetch(message))
            case KVCommit():
                parts.fetcher.commit(message.request_id, message.is_valid)
            case KVAbort():
                parts.fetcher.abort(message.request_id)
            case KVExtend():
                parts.staging.extend(message.lease_ids)
            case KVRelease():
                self._send(KVReleased(message.lease_id, parts.staging.release(message.lease_id)))
            case KVPeer():
                parts.thread.post(lambda: parts.connections.introduce(message))
            case KVPeerGone():
                parts.thread.post(lambda: parts.connections.gone(message.worker_id, message.incarnation))

    def usage(self) -> KVUsage | None:
        """For the heartbeat; None without a part in it."""
        parts = self._parts
        if parts is None:
            return None
        return msgspec.structs.replace(
            parts.staging.usage(),
            fetches=parts.fetcher.num_open,
            peers=len(parts.connections),
            blocks_published_total=parts.publisher.num_published,
            blocks_unpublished_total=parts.publisher.num_unpublished,
            blocks_written_total=parts.fetcher.num_written,
            bytes_read_total=parts.fetcher.num_bytes,
            reads_failed_total=parts.fetcher.num_failed,
            writes_failed_total=parts.fetcher.num_write_failures,
            copying_us_total=round((parts.publisher.copying_s + parts.fetcher.copying_s) * 1e6),
        )

    def close(self) -> None:
        """End the thread and give the rows' memory back: nothing may use it any more. Idempotent, bounded in time."""
        if self._parts is not None:
            self._parts.thread.close()

    def _decline(self, message: KVToWorker) -> None:
        match message:
            case KVRelease():
                self._send(KVReleased(message.lease_id, is_valid=False))
            case KVFetch() if message.prompt:
                reason = "this worker takes no part in the KV hand-over"
                self._send(KVFetched(message.request_id, False, 0, 0, 0.0, "", reason))

    def _open(self, options: ExchangeOptions, engine: KVEngine, info: EngineInfo, thread: TransportThread) -> KVPort:
        layout = engine.call(engine.store.kv_layout).result(_ATTACH_S)
        num_rows = min(options.num_rows or default_num_rows(info), MAX_ROWS)
        if num_rows < info.max_seq_len // info.block_size:
            logger.warning(
                "KV of %d tokens can be handed over at a time, and a sequence may have %d: of longer prompts only the "
                "beginning is moved, and the decode worker computes the rest; see --kv-transfer-tokens",
                num_rows * info.block_size,
                info.max_seq_len,
            )

        def open_on_thread() -> RowMemory:
            memory = open_rows(options.choice, options.config, layout, num_rows)
            for transfer in memory.transfers:
                thread.add(transfer)
            return memory

        memory = thread.call(open_on_thread, _OPEN_S)
        rows = KVRows(memory.buffer.address, num_rows, layout.block_bytes, layout.device, memory.buffer.owner)
        engine.call(lambda: engine.store.attach_rows(rows)).result(_ATTACH_S)
        self._parts = self._assemble(options, engine, info, layout, num_rows, thread, memory)
        exports = thread.call(lambda: tuple((each.name, each.export()) for each in memory.transfers), _OPEN_S)
        logger.info("%d rows of %d bytes for KV, by %s", num_rows, layout.block_bytes, ", ".join(dict(exports)))
        own = peer_info(replace(options.config, device=layout.device), device_uuid(layout.device))
        return KVPort(layout.fingerprint, layout.block_bytes, num_rows, own, exports)

    def _assemble(
        self,
        options: ExchangeOptions,
        engine: KVEngine,
        info: EngineInfo,
        layout: KVLayout,
        num_rows: int,
        thread: TransportThread,
        memory: RowMemory,
    ) -> _Parts:
        staging = Staging(num_rows, options.lease_s, options.clock)
        connections = Connections(thread, memory.transfers, layout.fingerprint, self._send, options.clock)
        publisher = Publisher(engine.store, staging, info.max_num_tokens, self._send)
        fetcher = Fetcher(
            engine.store, engine.call, staging, thread, connections, layout.block_bytes, self._send, options.clock
        )
        for timer in (staging.expire, connections.reconnect, fetcher.forget_stale):
            thread.every_tick(timer)
        return _Parts(staging, thread, connections, publisher, fetcher)
