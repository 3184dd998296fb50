"""Block hashes agree with their definition, and change with everything that comes before a block."""

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from trtserve.plugins.blocks import block_hash, block_hashes, root_hash

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=70)


def test_the_definition_does_not_change():
    """Server and workers of one version may run on different machines; these numbers must not drift."""
    root = xxh3_64_intdigest(b"trtserve-blocks-1")
    first = xxh3_64_intdigest(root.to_bytes(8, "little") + b"\1\0\0\0\2\0\0\0")
    assert root_hash() == root
    assert block_hashes(array("i", [1, 2, 3]), 2) == (first,)


@settings(deadline=None)
@given(TOKENS, st.integers(1, 9), st.text(max_size=3))
def test_full_blocks_only_each_chained_to_the_one_before(tokens, block_size, salt):
    hashes = block_hashes(array("i", tokens), block_size, salt)
    assert len(hashes) == len(tokens) // block_size
    parent = root_hash(salt)
    for number, found in enumerate(hashes):
        assert found == block_hash(parent, array("i", tokens[number * block_size : (number + 1) * block_size]))
        parent = found


@settings(deadline=None)
@given(TOKENS.filter(bool), st.integers(1, 9), st.data())
def test_another_token_changes_its_block_and_all_after_it(tokens, block_size, data):
    place = data.draw(st.integers(0, len(tokens) - 1))
    changed = array("i", tokens)
    changed[place] ^= 1
    before, after = block_hashes(array("i", tokens), block_size), block_hashes(changed, block_size)
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        assert (old == new) == (number < place // block_size)


@settings(deadline=None)
@given(TOKENS, st.text(min_size=1, max_size=5))
def test_salts_share_nothing(tokens, salt):
    tokens = array("i", tokens)
    assert not set(block_hashes(tokens, 4)) & set(block_hashes(tokens, 4, salt))


def test_adapters_share_no_block():
    tokens = array("i", range(32))
    kinds = [block_hashes(tokens, 16, salt, lora) for salt in ("", "s") for lora in ("", "a", "b")]
    assert len({hashes for kind in kinds for hashes in kind}) == 12
    assert block_hashes(tokens, 16, "s", "") == block_hashes(tokens, 16, "s")
