"""Moving a prefix's KV between two engines: the blocks that one has stored become stored in the other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trtserve.plugins.api import TokenIds
from trtserve.plugins.engines.torch.kv_store import KVStore
from trtserve.plugins.engines.torch.prefix_cache import BlockChain, PrefixCache


@dataclass(frozen=True, slots=True)
class PrefixBlocks:
    """The KV of the first `num_tokens` tokens of a sequence, whole blocks only."""

    num_tokens: int
    layout: str  # `KVStore.layout` of the engine that it comes from
    data: Tensor  # [blocks, numbers of a block], see `KVStore.export_blocks`; the holder's own copy


def export_prefix(cache: PrefixCache, store: KVStore, tokens: TokenIds, cache_salt: str = "") -> PrefixBlocks:
    """A copy of the longest stored prefix of these tokens; zero blocks where nothing is stored."""
    block_ids = cache.lookup(BlockChain(cache.block_size, cache_salt), tokens, len(tokens))
    return PrefixBlocks(len(block_ids) * cache.block_size, store.layout, store.export_blocks(block_ids))


def import_prefix(
    cache: PrefixCache, store: KVStore, tokens: TokenIds, prefix: PrefixBlocks, cache_salt: str = ""
) -> int:
    """Store a prefix so that requests which begin with these tokens reuse it; returns how many blocks were new.

    Raises ValueError where the layouts differ and OutOfBlocks where there is no room; then nothing has changed.
    """
    if prefix.layout != store.layout:
        raise ValueError(
            f"KV blocks of layout {prefix.layout} do not fit a cache of layout {store.layout}: run both engines with "
            "the same model, dtype and block size"
        )
    chain = BlockChain(cache.block_size, cache_salt)
    here = cache.lookup(chain, tokens, prefix.num_tokens)
    total = prefix.num_tokens // cache.block_size
    cache.pool.acquire(here)
    held = list(here)
    try:
        held += cache.pool.allocate(total - len(here))
        store.import_blocks(held[len(here) :], prefix.data[len(here) :])
        cache.commit(chain, tokens, held, len(here), total)
    finally:
        cache.pool.release(held)
    return total - len(here)
