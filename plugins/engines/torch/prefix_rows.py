"""The prefix cache as rows of bytes: what one engine has stored becomes stored in another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trtserve.plugins.api import KVLayout, KVRows, TokenIds
from trtserve.plugins.engines.torch.kv_rows import rows_tensor
from trtserve.plugins.engines.torch.kv_store import KVStore
from trtserve.plugins.engines.torch.prefix_cache import BlockChain, PrefixCache


class PrefixRows:
    """A `KVStoreEngine`'s part of the engine. On a CUDA device every call returns when its copies are done."""

    def __init__(self, cache: PrefixCache, store: KVStore) -> None:
        self._cache = cache
        self._store = store
        self._device = str(store.keys[0].device)  # with the index that "cuda" alone lacks
        self._rows: KVRows | None = None
        self._memory: Tensor | None = None

    def layout(self, model_fingerprint: str) -> KVLayout:
        """Of rows of this model's KV."""
        store = self._store
        block_bytes = KVStore.block_bytes(store.layers, store.block_size, store.dtype)
        return KVLayout(f"torch-{store.layout}-{model_fingerprint}", block_bytes, self._device)

    def attach(self, rows: KVRows) -> None:
        """Raises ValueError where rows have another size or are elsewhere than the layout says."""
        block_bytes = self._store.row_width * self._store.dtype.itemsize
        if (rows.row_bytes, rows.device) != (block_bytes, self._device):
            raise ValueError(
                f"rows of {rows.row_bytes} bytes on {rows.device} do not take this engine's KV blocks, which are "
                f"{block_bytes} bytes on {self._device}: allocate them as kv_layout says"
            )
        self._memory = rows_tensor(rows, self._store.dtype)
        self._rows = rows  # keeps the memory alive

    def stored_blocks(self, tokens: TokenIds, cache_salt: str) -> int:
        """Leading full blocks of the prompt that are in the cache."""
        return len(self._cache.lookup(BlockChain(self._cache.block_size, cache_salt), tokens, len(tokens)))

    def read(self, tokens: TokenIds, cache_salt: str, first_block: int, rows: Sequence[int]) -> int:
        """Fill rows with blocks from `first_block` on, as far as they are stored; returns how many."""
        memory = self._checked(rows)
        most = min(len(tokens), (first_block + len(rows)) * self._cache.block_size)
        stored = self._cache.lookup(BlockChain(self._cache.block_size, cache_salt), tokens, most)
        block_ids = stored[first_block:]
        self._store.copy_out(block_ids, memory, rows[: len(block_ids)])
        self._finish()
        return len(block_ids)

    def write(self, tokens: TokenIds, cache_salt: str, first_block: int, rows: Sequence[int]) -> int:
        """Store blocks from rows; returns how many of them are in the cache now, none if one before them is not."""
        memory, total = self._checked(rows), first_block + len(rows)
        cache, chain = self._cache, BlockChain(self._cache.block_size, cache_salt)
        if total > len(tokens) // cache.block_size:
            raise ValueError(
                f"{len(rows)} rows from block {first_block} on are more than the full blocks of a prompt of "
                f"{len(tokens)} tokens, which has {len(tokens) // cache.block_size}"
            )
        here = cache.lookup(chain, tokens, total * cache.block_size)
        if not cache.enabled or len(here) < first_block:
            return 0
        cache.pool.acquire(here)  # so that making room for the rest evicts none of them
        held = list(here)
        try:
            held += cache.pool.allocate(min(total - len(here), cache.pool.num_free))
            self._store.copy_in(held[len(here) :], memory, rows[len(here) - first_block : len(held) - first_block])
            self._finish()
            cache.commit(chain, tokens, held, len(here), len(held))
        finally:
            cache.pool.release(held)
        return len(held) - first_block

    def _checked(self, rows: Sequence[int]) -> Tensor:
        memory = self._memory
        num_rows = 0 if memory is None else memory.shape[0]
        if memory is None or (rows and not 0 <= min(rows) <= max(rows) < num_rows):
            raise IndexError(f"rows {min(rows, default=0)} to {max(rows, default=0)}: {num_rows} rows are attached")
        return memory

    def _finish(self) -> None:
        if self._store.device.type == "cuda":
            torch.cuda.current_stream(self._store.device).synchronize()
