"""The simulated prefix cache as rows of bytes, so that KV can move between workers that have none.

What a block's row holds follows from the block's hash alone, and with it from the salt and from every token so far:

    digest = XXH3-128 of the hash as 8 bytes little-endian
    row    = digest | the bytes of the tape from place (digest mod 2^20) on, up to block_bytes in all
    tape   = SHAKE-128 of a constant

Rows of two blocks differ at their beginning, and but for one pair in a million everywhere else; no part of a row looks
like another part of it. So whoever stores a row can check that these bytes, in this order, are those of this block: a
transfer that mixes up, tears or shifts rows is found out. It costs little more than copying.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_char
from hashlib import shake_128

from xxhash import xxh3_128_digest

from trtserve.plugins.api import BlockHash, KVLayout, KVRows, TokenIds
from trtserve.plugins.blocks import block_hashes
from trtserve.plugins.engines.sim.pool import BlockPool

_DEVICE = "cpu"
_TAPE_NAME = b"trtserve-sim-kv-1"
_NUM_PLACES = 1 << 20


class WrongKVBytes(Exception):
    """A row does not hold the KV of the block that it was said to hold."""


class RowPattern:
    """The bytes of any block; has no state but the tape."""

    def __init__(self, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self._tape = shake_128(_TAPE_NAME).digest(_NUM_PLACES + block_bytes)

    def row(self, block_hash: BlockHash) -> bytes:
        """bytes[block_bytes] of the block with this hash."""
        digest = xxh3_128_digest(block_hash.to_bytes(8, "little"))
        place = int.from_bytes(digest) % _NUM_PLACES
        return digest + self._tape[place : place + self.block_bytes - len(digest)]


class PrefixRows:
    """A `KVStoreEngine`'s part of a simulated engine, over its pool. Takes no simulated time."""

    def __init__(self, pool: BlockPool, block_bytes: int, enabled: bool) -> None:
        """enabled: whether blocks outlive their sequences at all."""
        self._pool = pool
        self._pattern = RowPattern(block_bytes)
        self._enabled = enabled
        self._rows: KVRows | None = None
        self._memory = memoryview(b"")

    def layout(self) -> KVLayout:
        """Of simulated KV: the same for every simulated model."""
        block_bytes = self._pattern.block_bytes
        return KVLayout(f"sim-kv1-{self._pool.block_size}-{block_bytes}", block_bytes, _DEVICE)

    def attach(self, rows: KVRows) -> None:
        """Raises ValueError where rows have another size or are no host memory."""
        block_bytes = self._pattern.block_bytes
        if (rows.row_bytes, rows.device) != (block_bytes, _DEVICE):
            raise ValueError(
                f"Rows of {rows.row_bytes} bytes on {rows.device} do not take simulated KV blocks, which are"
                f" {block_bytes} bytes on {_DEVICE}: allocate them as kv_layout says."
            )
        self._rows = rows  # keeps the memory alive
        self._memory = memoryview((c_char * (rows.num_rows * block_bytes)).from_address(rows.address)).cast("B")

    def stored_blocks(self, tokens: TokenIds, cache_salt: str) -> int:
        """Leading full blocks of the prompt that are in the cache."""
        return len(self._pool.match(self._hashes(tokens, cache_salt), len(tokens)))

    def read(self, tokens: TokenIds, cache_salt: str, first_block: int, rows: Sequence[int]) -> int:
        """Fill rows with blocks from `first_block` on, as far as they are stored; returns how many."""
        places = [self._place(row) for row in rows]
        hashes = self._hashes(tokens, cache_salt)
        stored = len(self._pool.match(hashes, first_block + len(rows)))
        wanted = hashes[first_block:stored]
        for block_hash, place in zip(wanted, places, strict=False):
            self._memory[place] = self._pattern.row(block_hash)
        return len(wanted)

    def write(self, tokens: TokenIds, cache_salt: str, first_block: int, rows: Sequence[int]) -> int:
        """Store blocks from rows; returns how many of them are in the cache now, none if one before them is not.

        Raises WrongKVBytes, and stores nothing, where a row holds other bytes than its block has.
        """
        hashes = self._hashes(tokens, cache_salt)[: first_block + len(rows)]
        if len(hashes) < first_block + len(rows):
            raise ValueError(
                f"{len(rows)} rows from block {first_block} on are more than the {len(hashes)} full blocks of a prompt"
                f" of {len(tokens)} tokens."
            )
        self._check(hashes, first_block, rows)
        here = self._pool.match(hashes, len(hashes))
        if not self._enabled or len(here) < first_block:
            return 0
        return self._pool.take_in(hashes, tokens) - first_block

    def _check(self, hashes: Sequence[BlockHash], first_block: int, rows: Sequence[int]) -> None:
        for number, row in enumerate(rows, first_block):
            if bytes(self._memory[self._place(row)]) != self._pattern.row(hashes[number]):
                raise WrongKVBytes(
                    f"Row {row} does not hold block {number} of its prompt, hash {hashes[number]:016x}: something wrote"
                    " other bytes there, and no block of this prompt was stored."
                )

    def _place(self, row: int) -> slice:
        if self._rows is None or not 0 <= row < self._rows.num_rows:
            attached = 0 if self._rows is None else self._rows.num_rows
            raise IndexError(f"There is no row {row} of KV: {attached} rows are attached.")
        return slice(row * self._rows.row_bytes, (row + 1) * self._rows.row_bytes)

    def _hashes(self, tokens: TokenIds, cache_salt: str) -> tuple[BlockHash, ...]:
        return block_hashes(tokens, self._pool.block_size, cache_salt)
