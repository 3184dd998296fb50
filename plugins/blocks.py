"""Chained block hashes, used by the server's prefix index and by every engine, so that they agree.

A block's hash covers its own tokens and, through its parent's hash, everything before it:

    root    = XXH3-64(b"trtserve-blocks-1" | extra)              extra: cache salt, and b"\\0lora\\0" | id of an adapter
    hash[i] = XXH3-64(hash[i - 1] as 8 bytes little-endian | tokens of block i as int32 little-endian)

XXH3 is fast, not cryptographic: whoever reuses KV by such a hash compares the tokens too (`trtserve.plugins.engines`
do), so a forged collision can cost a cache miss, never a wrong answer.
"""

from __future__ import annotations

from xxhash import xxh3_64_intdigest

from trtserve.plugins.api import BlockHash, TokenIds

_VERSION = b"trtserve-blocks-1"


def root_hash(cache_salt: str = "", lora_id: str = "") -> BlockHash:
    """The parent of every first block. Requests with different salts, or different LoRA adapters, share no block."""
    adapter = b"\0lora\0" + lora_id.encode() if lora_id else b""
    return BlockHash(xxh3_64_intdigest(_VERSION + cache_salt.encode() + adapter))


def block_hash(parent: BlockHash, token_ids: TokenIds) -> BlockHash:
    """The hash of one full block. token_ids: int32[block_size]."""
    return BlockHash(xxh3_64_intdigest(parent.to_bytes(8, "little") + token_ids.tobytes()))


def block_hashes(
    token_ids: TokenIds, block_size: int, cache_salt: str = "", lora_id: str = ""
) -> tuple[BlockHash, ...]:
    """The hashes of all full blocks of a sequence, in order. token_ids: int32[num_tokens]."""
    raw = token_ids.tobytes()
    width = block_size * token_ids.itemsize
    parent: int = root_hash(cache_salt, lora_id)
    hashes: list[BlockHash] = []
    for start in range(0, len(raw) - width + 1, width):
        # As `block_hash`, without its calls: most of the time of a short prompt's routing was here.
        parent = xxh3_64_intdigest(parent.to_bytes(8, "little") + raw[start : start + width])
        hashes.append(parent)  # type: ignore[arg-type]
    return tuple(hashes)
