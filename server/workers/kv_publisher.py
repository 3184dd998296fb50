"""On the worker that computes a prompt: its finished KV blocks become rows that peers can read, under a lease."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from trtserve.plugins.api import FinishReason, KVStoreEngine, Output, Request, RequestId, StepOutputs
from trtserve.server.workers.kv_messages import KVPublished, pack_rows
from trtserve.server.workers.kv_staging import Staging

logger = logging.getLogger(__name__)

_MOST_GROWING = 2
"""Prompts looked at after each pass, the oldest first. Engines compute long prompts one after the other."""


@dataclass(slots=True)
class _Kept:
    """A request whose KV is kept and that has no token yet."""

    request: Request
    lease_id: int = 0  # 0: none so far
    next_block: int = 0  # the first one that is not published


class Publisher:
    """`expect` is for the socket's thread, `after_step` for the engine's, where the engine's own methods may be called.

    publish: queues a message behind those of the steps so far. A prompt of more than max_num_tokens tokens takes
    several passes and is published as it grows.
    """

    def __init__(
        self, engine: KVStoreEngine, staging: Staging, max_num_tokens: int, publish: Callable[[KVPublished], None]
    ) -> None:
        self._engine = engine
        self._staging = staging
        self._max_num_tokens = max_num_tokens
        self._publish = publish
        self._kept: dict[RequestId, _Kept] = {}
        self._growing: dict[RequestId, _Kept] = {}  # those of `_kept` that take several passes
        self._lock = threading.Lock()  # over both
        self.num_published = self.num_unpublished = 0  # blocks
        self.copying_s = 0.0

    def expect(self, request: Request) -> None:
        """Call before the request is submitted."""
        kept = _Kept(request)
        with self._lock:
            self._kept[request.id] = kept
            if len(request.prompt) > self._max_num_tokens:
                self._growing[request.id] = kept

    def after_step(self, step: StepOutputs) -> None:
        """Publish what has come; costs nothing while no request's KV is kept."""
        if not self._kept:
            return
        for output in step.outputs:
            if output.request_id in self._kept and (output.token_ids or output.finish_reason is not None):
                self._end(output)
        if self._growing and (step.stats is None or step.stats.prefill_tokens):
            with self._lock:
                growing = list(islice(self._growing.values(), _MOST_GROWING))
            for kept in growing:
                self._grow(kept, is_final=False)

    def _end(self, output: Output) -> None:
        with self._lock:
            kept = self._kept.pop(output.request_id)
            self._growing.pop(output.request_id, None)
        if output.token_ids and output.finish_reason not in (FinishReason.CANCELLED, FinishReason.ERROR):
            self._grow(kept, is_final=True)
            return
        if kept.lease_id:
            self._staging.release(kept.lease_id)
        self._publish(KVPublished(output.request_id, 0, kept.next_block, b"", is_final=True))

    def _grow(self, kept: _Kept, *, is_final: bool) -> None:
        first_block = kept.next_block
        rows, num_lacking = self._read(kept)
        if rows and not kept.lease_id:
            kept.lease_id = self._staging.grant()
        if rows and not self._staging.keep(kept.lease_id, rows):
            rows = []  # the lease has ended, and with it everything published so far
        kept.next_block += len(rows)
        self.num_published += len(rows)
        if is_final:
            self.num_unpublished += num_lacking
        if rows or is_final:
            self._publish(KVPublished(kept.request.id, kept.lease_id, first_block, pack_rows(rows), is_final))

    def _read(self, kept: _Kept) -> tuple[list[int], int]:
        """Copy the blocks that are new into rows, as far as rows are free; and how many blocks got none."""
        request = kept.request
        rows: list[int] = []
        num_new = num_read = 0
        begun_s = time.perf_counter()
        try:
            num_new = max(self._engine.stored_blocks(request.prompt, request.cache_salt) - kept.next_block, 0)
            if num_new:
                rows = self._staging.take(num_new)
                num_read = self._engine.read_kv(request.prompt, request.cache_salt, kept.next_block, rows)
        except Exception:
            # An edge of the program: the engine is a plugin's code. Without the hand-over it can still serve.
            logger.exception("the engine did not give the KV of request %d", request.id)
        self.copying_s += time.perf_counter() - begun_s
        self._staging.give_back(rows[num_read:])
        return rows[:num_read], num_new - num_read
