"""One iteration's statistics, with the names that the C++ serializer is believed to use (an open question)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .block_pool import BlockPool
from .engine_settings import EngineSettings


def iteration_stats(
    iteration: int,
    latency_ms: float,
    running: int,
    queued: int,
    contexts: tuple[int, int],
    settings: EngineSettings,
    pools: Iterable[BlockPool],
) -> dict[str, Any]:
    """contexts: requests in their context phase, and the tokens computed for them."""
    pools = list(pools)
    total, used = sum(pool.num_blocks for pool in pools), sum(pool.used_blocks for pool in pools)
    reused, missed = sum(pool.reused_blocks for pool in pools), sum(pool.missed_blocks for pool in pools)
    return {
        "iter": iteration,
        "iterLatencyMS": latency_ms,
        "numActiveRequests": running,
        "numQueuedRequests": queued,
        "numCompletedRequests": 0,
        "maxNumActiveRequests": settings.max_batch_size,
        "gpuMemUsage": 0,
        "cpuMemUsage": 0,
        "pinnedMemUsage": 0,
        "kvCacheStats": {
            "maxNumBlocks": total,
            "freeNumBlocks": total - used,
            "usedNumBlocks": used,
            "tokensPerBlock": settings.tokens_per_block,
            "allocTotalBlocks": missed,
            "allocNewBlocks": missed,
            "reusedBlocks": reused,
            "missedBlocks": missed,
            "cacheHitRate": reused / (reused + missed) if reused + missed else 0.0,
        },
        "inflightBatchingStats": {
            "numScheduledRequests": running,
            "numContextRequests": contexts[0],
            "numGenRequests": running - contexts[0],
            "numPausedRequests": 0,
            "numCtxTokens": contexts[1],
            "microBatchId": 0,
            "avgNumDecodedTokensPerIter": 0.0,
        },
    }
