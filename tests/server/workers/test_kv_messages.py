"""What the messages of the hand-over refuse."""

import msgspec
import pytest

from tests.server.workers.conftest import a_request
from trtserve.plugins.api import KVHandle, WorkerId
from trtserve.server.workers import kv_messages as kv
from trtserve.server.workers import wire

PUBLISHED = kv.KVPublished(1, 2, 0, kv.pack_rows([3]), True)
FETCHED = kv.KVFetched(1, True, 2, 3, 0.5, "memfd", "")
FETCH = kv.KVFetch(1, b"1234", "", WorkerId("prefill-0"), 5, 0, kv.pack_rows([3]), True)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (PUBLISHED, {"lease_id": -1}),
        (PUBLISHED, {"first_block": 2**31}),
        (PUBLISHED, {"rows": "text"}),
        (FETCHED, {"num_bytes": -1}),
        (FETCHED, {"duration_s": -0.1}),
        (FETCHED, {"reason": 5000 * "x"}),
        (FETCH, {"first_block": -1}),
        (FETCH, {"incarnation": -1}),
        (kv.KVExtend(()), {"lease_ids": tuple(range(kv.MAX_LEASES + 1))}),
        (kv.KVRelease(0), {"lease_id": "1"}),
    ],
)
def test_values_out_of_bounds_do_not_decode(message, changes):
    is_worker_s = isinstance(message, kv.KVFromWorker)
    decode = wire.decode_from_worker if is_worker_s else wire.decode_to_worker
    assert decode(wire.encode(message)) == ((message,) if is_worker_s else message)
    with pytest.raises(wire.WireError):
        decode(wire.encode(msgspec.structs.replace(message, **changes)))


def test_more_rows_than_a_worker_can_have_do_not_decode():
    message = msgspec.structs.replace(PUBLISHED, rows=bytes(4 * kv.MAX_ROWS + 4))
    with pytest.raises(wire.WireError):
        wire.decode_from_worker(wire.encode(message))


@pytest.mark.parametrize("packed", [b"123", kv.pack_rows([1, -1])])
def test_rows_are_whole_numbers_from_zero_on(packed):
    with pytest.raises(ValueError):
        kv.rows_of(packed)


def test_the_prompt_goes_with_the_first_order_only():
    request = a_request(7)
    handle = KVHandle(9, WorkerId("prefill-0"), 5, 2, (4, 3), is_final=False)
    first, later = (kv.fetch_of(request, handle, is_first=is_first) for is_first in (True, False))
    assert (first.prompt, later.prompt) == (request.prompt.tobytes(), b"")
    assert list(kv.rows_of(first.rows)) == [4, 3] and (first.first_block, first.is_final) == (2, False)


@pytest.mark.parametrize("num_resumed", [-1, 3, 4])
def test_a_prompt_s_first_token_is_never_resumed_output(num_resumed):
    message = msgspec.structs.replace(wire.submit_of(a_request(1, num_tokens=3)), num_resumed=num_resumed)
    with pytest.raises(wire.WireError, match=f"{num_resumed} of 3 prompt tokens"):
        wire.request_of(message)


def test_a_descriptor_has_a_longest_length():
    handle = KVHandle(1, WorkerId("p"), 2, 0, (), descriptor=b"x" * (wire.MAX_DESCRIPTOR_BYTES + 1))
    message = msgspec.structs.replace(wire.submit_of(a_request(1, num_tokens=3)), kv_handle=handle)
    with pytest.raises(wire.WireError, match="1048577 bytes is longer than 1048576"):
        wire.request_of(message)
