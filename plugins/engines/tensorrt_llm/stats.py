"""TensorRT-LLM's iteration statistics, and what the engine knows of its load itself.

The names are those of its C++ serializer as far as they are known, so each is read on its own and may be missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trtserve.plugins.api import PassStats, Request, RequestId, WorkerLoad

_ABSURD = 2**62  # infinity is a number as well


def pass_stats(stats: Mapping[str, Any]) -> PassStats | None:
    """What an iteration did; None where it did nothing or does not say."""
    batch, cache = _mapping(stats, "inflightBatchingStats"), _mapping(stats, "kvCacheStats")
    duration_ms, prefill_tokens = _number(stats, "iterLatencyMS"), _number(batch, "numCtxTokens")
    decoding = _number(batch, "numGenRequests")
    if not duration_ms or not (prefill_tokens or decoding):
        return None
    context_tokens = (_number(cache, "usedNumBlocks") or 0) * (_number(cache, "tokensPerBlock") or 0)
    # Taken when the pass was over: what ended with it is not counted any more.
    return PassStats(
        duration_ms / 1000,
        int(prefill_tokens or 0),
        int(decoding or 0),
        max(int(context_tokens), int(decoding)) if decoding else 0,
    )


def num_blocks(stats: Mapping[str, Any]) -> int | None:
    """The KV cache's size."""
    count = _number(_mapping(stats, "kvCacheStats"), "maxNumBlocks")
    return int(count) if count else None


def _mapping(stats: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = stats.get(name)
    return value if isinstance(value, Mapping) else {}


def _number(stats: Mapping[str, Any], name: str) -> float | None:
    value = stats.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return value if 0 <= value < _ABSURD else None


class LoadBook:
    """The engine's own count of what runs. Statistics come late and may be off; requests are known exactly.

    Blocks: what each request can need so far, as if nothing were shared, so that a free block is never promised twice.
    """

    def __init__(self, block_size: int, num_draft_tokens: int) -> None:
        self._block_size = block_size
        self._num_draft_tokens = num_draft_tokens
        self._lengths: dict[RequestId, int] = {}
        self._running: set[RequestId] = set()
        self._blocks = 0
        self.start(0)

    def start(self, num_blocks: int) -> None:
        """Count from zero; num_blocks: of the rank's KV cache."""
        self._num_blocks = num_blocks
        self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0
        self._drafted_tokens = self._accepted_tokens = 0
        self.lost_kv_events = 0

    def submitted(self, request: Request) -> None:
        """A request begins to wait."""
        self._lengths[request.id] = len(request.prompt)
        self._blocks += self._blocks_of(len(request.prompt))

    def generated(self, request_id: RequestId, num_tokens: int, cached_tokens: int | None) -> None:
        """Tokens came; cached_tokens: with the first ones."""
        before = self._lengths[request_id]
        if cached_tokens is not None:
            self._running.add(request_id)
            self._prompt_tokens += before
            self._cached_tokens += cached_tokens
        self._generated_tokens += num_tokens
        self._lengths[request_id] = before + num_tokens
        self._blocks += self._blocks_of(before + num_tokens) - self._blocks_of(before)

    def ended(self, request_id: RequestId) -> None:
        """A request is over, however it ended."""
        self._running.discard(request_id)
        self._blocks -= self._blocks_of(self._lengths.pop(request_id))

    def speculated(self, num_tokens: int, num_passes: int) -> tuple[int, int] | None:
        """Count a sequence that has ended: tokens drafted for it, and those that were kept. None where nothing is
        drafted. num_passes: those in which it got its `num_tokens` tokens; 0: not known."""
        if not self._num_draft_tokens or not num_passes:
            return None
        drafted = num_passes * self._num_draft_tokens
        kept = min(drafted, max(0, num_tokens - num_passes))
        self._drafted_tokens += drafted
        self._accepted_tokens += kept
        return drafted, kept

    def load(self) -> WorkerLoad:
        """As counted so far."""
        return WorkerLoad(
            running=len(self._running),
            waiting=len(self._lengths) - len(self._running),
            free_blocks=max(0, self._num_blocks - self._blocks),
            prompt_tokens_total=self._prompt_tokens,
            cached_tokens_total=self._cached_tokens,
            generated_tokens_total=self._generated_tokens,
            drafted_tokens_total=self._drafted_tokens,
            accepted_tokens_total=self._accepted_tokens,
            lost_kv_events_total=self.lost_kv_events,
        )

    def _blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)
