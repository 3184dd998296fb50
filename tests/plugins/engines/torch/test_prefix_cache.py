"""The prefix cache: the right blocks for the right tokens, and events that tell the truth."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from trtserve.plugins.api import BlockHash, KVRemoved, KVStored
from trtserve.plugins.blocks import block_hashes
from trtserve.plugins.engines.torch.prefix_cache import BlockChain, PrefixCache

SIZE = 2
PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=12)


def tokens_of(numbers):
    return array("i", numbers)


def store(cache, tokens, salt="", **chain_options):
    """Compute a sequence from nothing, as a scheduler would, and let it go. Returns its blocks."""
    chain = BlockChain(SIZE, salt, **chain_options)
    found = cache.lookup(chain, tokens, len(tokens))
    cache.pool.acquire(found)
    blocks = found + cache.pool.allocate(-(-len(tokens) // SIZE) - len(found))
    cache.commit(chain, tokens, blocks, len(found), len(tokens) // SIZE)
    cache.pool.release(blocks)
    return blocks


def test_a_stored_prefix_is_found_again_as_far_as_asked():
    cache = PrefixCache(8, SIZE)
    tokens = tokens_of([1, 2, 3, 4, 5])
    blocks = store(cache, tokens)
    assert cache.lookup(BlockChain(SIZE), tokens, 5) == blocks[:2]
    assert cache.lookup(BlockChain(SIZE), tokens, 3) == blocks[:1]
    assert cache.lookup(BlockChain(SIZE), tokens_of([1, 2, 9, 9]), 4) == blocks[:1]
    assert cache.lookup(BlockChain(SIZE), tokens_of([9, 2, 3, 4]), 4) == []


def test_salts_share_nothing():
    cache = PrefixCache(8, SIZE)
    tokens = tokens_of([1, 2, 3, 4])
    store(cache, tokens, salt="mine")
    assert cache.lookup(BlockChain(SIZE, "yours"), tokens, 4) == []
    assert len(cache.lookup(BlockChain(SIZE, "mine"), tokens, 4)) == 2


def test_nothing_is_stored_when_off():
    cache = PrefixCache(8, SIZE, enabled=False)
    tokens = tokens_of([1, 2])
    store(cache, tokens)
    assert cache.lookup(BlockChain(SIZE), tokens, 2) == []
    assert not cache.has_events


@given(PROMPTS, st.integers(1, 4))
def test_colliding_hashes_never_give_blocks_of_other_tokens(prompts, num_hashes):
    """With a hash of a few values only, whatever is found must have been computed from these very tokens."""
    cache = PrefixCache(6, SIZE)
    computed_from: dict[int, tuple[int, ...]] = {}

    def weak_hash(parent, block):
        return BlockHash((parent + sum(block)) % num_hashes)

    for numbers in prompts:
        tokens = tokens_of(numbers)
        chain = BlockChain(SIZE, hash_block=weak_hash)
        for index, block in enumerate(cache.lookup(chain, tokens, len(tokens))):
            assert computed_from[block] == tuple(numbers[: (index + 1) * SIZE])
        for index, block in enumerate(store(cache, tokens, hash_block=weak_hash)):
            computed_from[block] = tuple(numbers[: (index + 1) * SIZE])


@given(PROMPTS)
def test_events_tell_exactly_what_can_be_found(prompts):
    cache = PrefixCache(6, SIZE)
    told: dict[int, int | None] = {}
    for numbers in prompts:
        tokens = tokens_of(numbers)
        store(cache, tokens)
        for event in cache.take_events():
            if isinstance(event, KVStored):
                parent = event.parent
                for block in event.blocks:
                    assert block.hash not in told
                    told[block.hash] = parent
                    parent = block.hash
            elif isinstance(event, KVRemoved):
                for block_hash in event.hashes:
                    del told[block_hash]
        assert len(told) <= 6
        hashes = block_hashes(tokens, SIZE)
        assert all(block_hash in told for block_hash in hashes)
        assert [told[block_hash] for block_hash in hashes] == [None, *hashes[:-1]][: len(hashes)]


def test_events_carry_hashes_and_tokens_of_the_deployment():
    cache = PrefixCache(8, SIZE)
    tokens = tokens_of([1, 2, 3, 4, 5])
    store(cache, tokens, salt="tenant")
    (event,) = cache.take_events()
    assert event.parent is None
    assert tuple(block.hash for block in event.blocks) == block_hashes(tokens, SIZE, "tenant")
    assert [list(block.token_ids) for block in event.blocks] == [[1, 2], [3, 4]]


def test_a_longer_sequence_announces_only_what_is_new():
    cache = PrefixCache(8, SIZE)
    store(cache, tokens_of([1, 2]))
    store(cache, tokens_of([1, 2, 3, 4]))
    first, second = cache.take_events()
    assert second.parent == first.blocks[-1].hash
    assert len(second.blocks) == 1


def test_discarded_blocks_are_blank_and_announced():
    cache = PrefixCache(8, SIZE)
    tokens = tokens_of([1, 2, 3, 4])
    chain = BlockChain(SIZE)
    blocks = cache.pool.allocate(2)
    cache.commit(chain, tokens, blocks, 0, 2)
    cache.pool.acquire(blocks[:1])
    cache.take_events()
    assert cache.discard(blocks) == blocks[1:]
    (event,) = cache.take_events()
    assert event == KVRemoved((block_hashes(tokens, SIZE)[1],))
    assert cache.lookup(BlockChain(SIZE), tokens, 4) == blocks[:1]
