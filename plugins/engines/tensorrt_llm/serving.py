"""Everything that lives on the engine's event loop: requests, the readers of the side channels, and the warm-up."""

from __future__ import annotations

import asyncio
import logging
import random
from array import array
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from itertools import count
from typing import Any

from trtserve.plugins.api import EngineInfo, EngineSink, Request, RequestId, SamplingParams, WorkerLoad
from trtserve.plugins.engines.tensorrt_llm.events import EventTranslator
from trtserve.plugins.engines.tensorrt_llm.executor import Executor
from trtserve.plugins.engines.tensorrt_llm.generation import Generation
from trtserve.plugins.engines.tensorrt_llm.reading import read_on
from trtserve.plugins.engines.tensorrt_llm.salts import Salts
from trtserve.plugins.engines.tensorrt_llm.sampling_objects import SamplingObjects
from trtserve.plugins.engines.tensorrt_llm.stats import LoadBook, num_blocks, pass_stats
from trtserve.plugins.engines.tensorrt_llm.steps import StepReport

logger = logging.getLogger(__name__)

_FIRST_WARM_UP_ID = 3 << 61  # beyond the server's ids and those of the worker's own warm-up
_WARM_UP_TOKENS = 16
_STATS_S = 30.0  # what is assumed without them may be far too much, and a machine that starts workers is busy
_MOST_UNHEARD = 16
_HEALTH_S = 2.0


class WarmUpFailed(Exception):
    """The executor cannot generate."""


class ExecutorDied(Exception):
    """Nothing can be generated any more."""


class Serving:
    """Made on the loop; `group` owns its tasks, and ends them."""

    def __init__(self, executor: Executor, sink: EngineSink, group: asyncio.TaskGroup) -> None:
        self._executor = executor
        self._group = group
        self._books = [LoadBook(executor.block_size, executor.num_draft_tokens) for _ in range(executor.num_ranks)]
        self._report = StepReport(sink, self._books)
        self._salts = Salts(executor.block_size)
        self._generation = Generation(
            executor.llm,
            executor.library,
            SamplingObjects(executor.library, executor.vocab_size),
            self._report,
            self._books,
            self._salts,
            moves_kv=bool(executor.kv_fingerprint),
            transfer_s=executor.transfer_s,
            max_seq_len=executor.max_seq_len,
        )
        self._events: EventTranslator | None = None
        self._num_blocks: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._readers: list[asyncio.Task[None]] = []
        self._has_stored_blocks = False  # an event has told of some
        self._num_unheard = 0  # requests that must have stored blocks, before the first such event

    # -------------------------------------------------------------- requests, on the loop

    def submit(self, request: Request) -> None:
        self._report.open()
        self._miss_events(request)
        self._generation.add(request)
        self._group.create_task(self._generation.run(request.id))

    def _miss_events(self, request: Request) -> None:
        """Say so where requests fill blocks and no event tells of it: routing would be blind in silence."""
        if self._events is None or self._has_stored_blocks or len(request.prompt) <= self._executor.block_size:
            return
        self._num_unheard += 1
        if self._num_unheard == _MOST_UNHEARD:
            logger.warning(
                "TensorRT-LLM has told of no stored KV block in %d requests: the router does not know what this worker "
                "has cached; see kv_cache_config.event_buffer_max_size and enable_block_reuse",
                _MOST_UNHEARD,
            )

    def cancel(self, request_id: RequestId) -> None:
        self._generation.cancel(request_id)

    def load(self) -> WorkerLoad:
        """Of the first rank; on any thread."""
        return self._books[0].load()

    async def broken(self) -> None:
        """Raises what ends the executor, if it does not show in a request: an executor that died while nothing was
        asked of it, or one that hangs, would answer nobody ever again."""
        is_healthy = getattr(self._executor.llm, "_check_health", lambda: True)
        while is_healthy():
            with suppress(TimeoutError):
                async with asyncio.timeout(_HEALTH_S):
                    await asyncio.shield(self._generation.broken)
        raise ExecutorDied("TensorRT-LLM's executor is not healthy any more")

    def close(self) -> None:
        """Nothing is read or generated any more."""
        for reader in self._readers:
            reader.cancel()
        self._generation.close()

    # -------------------------------------------------------------- start

    async def warm_up(self, progress: Callable[[str], None]) -> EngineInfo:
        """The first requests, which are slow; then the side channels, which exist only from the first request on.

        Raises WarmUpFailed."""
        progress("first requests")
        ids = count(_FIRST_WARM_UP_ID)
        for _ in range(max(1, self._executor.num_warm_up_requests)):
            await self._warm_up_request(RequestId(next(ids)))
        self._start_readers()
        blocks = await self._cache_blocks()
        for book in self._books:
            book.start(blocks)
        if self._events is not None:
            self._events.bound(blocks)
        return self._info(blocks)

    async def _warm_up_request(self, request_id: RequestId) -> None:
        # The middle half of a vocabulary has no special tokens.
        size = self._executor.vocab_size
        tokens = random.Random(request_id).choices(range(size // 4, max(size - size // 4, 1)), k=_WARM_UP_TOKENS)
        sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        self._generation.add(Request(request_id, array("i", tokens), sampling))
        error = await self._generation.run(request_id)
        if error is not None:
            raise WarmUpFailed(f"the first request failed: {error}")

    def _start_readers(self) -> None:
        executor = self._executor
        generation = self._generation
        if executor.has_stats:
            self._readers.append(
                self._group.create_task(read_on(self._stats, generation.submission(), self._take_stats))
            )
        if executor.publishes_kv_events:
            self._events = EventTranslator(executor.block_size, self._salts, executor.num_ranks)
            self._readers.append(
                self._group.create_task(read_on(self._kv_events, generation.submission(), self._take_event))
            )

    async def _cache_blocks(self) -> int:
        """How large a rank's KV cache is, from the event that it was created or else the first statistics."""
        if self._readers:
            try:
                async with asyncio.timeout(_STATS_S):
                    told = await self._num_blocks
                # Models with several attention windows tell of each; by now the widest has been read.
                return (self._events and self._events.num_blocks) or told
            except TimeoutError:
                logger.warning("TensorRT-LLM does not tell how large its KV cache is")
        executor = self._executor
        tokens = executor.max_cache_tokens or executor.max_num_seqs * executor.max_seq_len
        return max(1, tokens // executor.block_size)

    def _info(self, blocks: int) -> EngineInfo:
        executor = self._executor
        return EngineInfo(
            block_size=executor.block_size,
            num_blocks=blocks,
            max_num_seqs=executor.max_num_seqs,
            max_num_tokens=executor.max_num_tokens,
            max_seq_len=min(executor.max_seq_len, blocks * executor.block_size),
            vocab_size=executor.vocab_size,
            max_prompt_tokens=executor.max_prompt_tokens,
            supports_guided_decoding=executor.guides,
            supports_cache_salt="cache_salt" in executor.library.generate_keywords,
            publishes_kv_events=executor.publishes_kv_events,
            caches_prefixes=executor.caches_prefixes,
            moves_kv=bool(executor.kv_fingerprint),
            kv_fingerprint=executor.kv_fingerprint,
            num_ranks=executor.num_ranks,
            about=executor.library.about(),
        )

    # -------------------------------------------------------------- side channels

    def _stats(self, silence_s: float) -> AsyncIterator[Any]:
        iteration: AsyncIterator[Any] = self._executor.llm.get_stats_async(timeout=silence_s)
        return iteration

    def _take_stats(self, stats: Mapping[str, Any]) -> None:
        # Of several ranks they may tell the sum, so events come first.
        if self._executor.num_ranks == 1 or not self._executor.publishes_kv_events:
            self._learn_blocks(num_blocks(stats))
        passed = pass_stats(stats)
        if passed is not None:
            self._report.passed(passed)

    def _kv_events(self, silence_s: float) -> AsyncIterator[Any]:
        iteration: AsyncIterator[Any] = self._executor.llm.get_kv_cache_events_async(timeout=silence_s)
        return iteration

    def _take_event(self, event: Mapping[str, Any]) -> None:
        assert self._events is not None
        rank, events = self._events.translate(event)
        self._learn_blocks(self._events.num_blocks)
        self._books[0].lost_kv_events = self._events.num_lost  # of all ranks
        self._has_stored_blocks = self._has_stored_blocks or bool(events)
        self._report.events(events, rank)

    def _learn_blocks(self, count: int | None) -> None:
        if count and not self._num_blocks.done():
            self._num_blocks.set_result(count)
