import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtserve.plugins.api import WorkerId
from trtserve.plugins.transfer.export import (
    MAX_ADDRESS,
    MAX_EXPORT_BYTES,
    check_same_shape,
    decode_export,
    encode_export,
    region_end,
)
from trtserve.plugins.transfer.identity import peer_info
from trtserve.plugins.transfer_api import MemoryKind, Region, TransferConfig, TransferError

CONFIG = TransferConfig(WorkerId("one"), 7, "/run/x")
PEER = peer_info(CONFIG)
KEYS = Region("keys", 4096, 8, 1000, 1024)
VALUES = Region("values", 1 << 40, 3, 2048, 2048, MemoryKind.CUDA)
EXPORT = encode_export("mine", 2, CONFIG, [KEYS, VALUES], b"payload")


@st.composite
def regions(draw):
    block_bytes = draw(st.integers(1, 1 << 30))
    stride = block_bytes + draw(st.integers(0, 1 << 20))
    address, num_blocks = draw(st.integers(1, 2**47)), draw(st.integers(1, 1 << 24))
    return Region(draw(st.text(min_size=1, max_size=9)), address, num_blocks, block_bytes, stride)


@given(st.lists(regions(), max_size=5, unique_by=lambda region: region.name), st.binary(max_size=50))
def test_round_trip(wanted, payload):
    export = decode_export(encode_export("mine", 1, CONFIG, wanted, payload), "mine", 1, PEER)
    assert list(export.regions.values()) == wanted
    assert export.payload == payload


@given(st.binary(max_size=200))
def test_noise_is_refused(noise):
    with pytest.raises(TransferError):
        decode_export(noise, "mine", 2, PEER)


@given(st.integers(0, len(EXPORT) - 1), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_within_bounds(place, value):
    changed = EXPORT[:place] + bytes([value]) + EXPORT[place + 1 :]
    try:
        export = decode_export(changed, "mine", 2, PEER)
    except TransferError:
        return
    for region in export.regions.values():
        assert region.num_blocks >= 1
        assert 1 <= region.block_bytes <= region.stride
        assert 0 <= region.address <= region_end(region) <= MAX_ADDRESS


@pytest.mark.parametrize("length", range(len(EXPORT)))
def test_truncated_exports_are_refused(length):
    with pytest.raises(TransferError):
        decode_export(EXPORT[:length], "mine", 2, PEER)


@pytest.mark.parametrize(
    ("exported", "says"),
    [
        (encode_export("theirs", 2, CONFIG, []), "transfer theirs, version 2; this is mine, version 2"),
        (encode_export("mine", 3, CONFIG, []), "version 3"),
        (msgspec.msgpack.encode(["mine", 3, "a form of the future"]), "version 3"),
        (encode_export("mine", 2, TransferConfig(WorkerId("two"), 7, ""), []), "of worker two"),
        (encode_export("mine", 2, TransferConfig(WorkerId("one"), 6, ""), []), "incarnation 6"),
        (encode_export("mine", 2, CONFIG, [KEYS, KEYS]), "twice"),
        (encode_export("mine", 2, CONFIG, [Region("lap", 4096, 8, 1000, 999)]), "lie"),
        (encode_export("mine", 2, CONFIG, [Region("far", MAX_ADDRESS - 5, 8, 1000, 1000)]), "lie"),
        (encode_export("mine", 2, CONFIG, [Region("none", 4096, 0, 1000, 1000)]), "no export"),
        (bytes(MAX_EXPORT_BYTES + 1), "bytes, over"),
    ],
)
def test_exports_that_do_not_belong_here_say_why(exported, says):
    with pytest.raises(TransferError, match=says):
        decode_export(exported, "mine", 2, PEER)


def test_regions_of_one_name_must_have_one_shape():
    own = {"keys": KEYS}
    check_same_shape(own, {"keys": Region("keys", 1, 90, 1000, 1000), "more": VALUES})
    with pytest.raises(TransferError, match="999 bytes"):
        check_same_shape(own, {"keys": Region("keys", 1, 90, 999, 1000)})
    with pytest.raises(TransferError, match="cuda"):
        check_same_shape(own, {"keys": Region("keys", 1, 90, 1000, 1000, MemoryKind.CUDA)})
