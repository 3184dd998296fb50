"""The parts of the UCX transfer that need no UCX. None of these tests loads the library."""

import ctypes
import mmap
import os
import sys
from ctypes.util import find_library
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtserve.plugins.api import WorkerId
from trtserve.plugins.transfer import ucx
from trtserve.plugins.transfer.runs import Run
from trtserve.plugins.transfer.ucx import environment, structs
from trtserve.plugins.transfer.ucx.libucp import request_status
from trtserve.plugins.transfer.ucx.payload import decode_payload, encode_payload
from trtserve.plugins.transfer.ucx.peer import UcxPeer
from trtserve.plugins.transfer.ucx.read import Gets, Read
from trtserve.plugins.transfer_api import TransferConfig, TransferError, TransferId, TransferOutcome

BLOBS = st.binary(min_size=1, max_size=64)


@pytest.mark.parametrize(
    ("struct", "size"),
    [
        (structs.Params, 88),
        (structs.WorkerParams, 200),
        (structs.MemMapParams, 48),
        (structs.EpParams, 104),
        (structs.RequestParam, 72),
        (structs.MemAttr, 32),
        (structs.EpAttr, 328),
        (structs.Transports, 24),
        (structs.TransportEntry, 16),
    ],
)
def test_struct_sizes_are_those_of_the_headers(struct, size):
    assert ctypes.sizeof(struct) == size


@pytest.mark.parametrize(
    ("field", "offset"),
    [
        (structs.WorkerParams.events, 144),
        (structs.WorkerParams.client_id, 192),
        (structs.MemMapParams.memory_type, 32),
        (structs.EpParams.err_handler, 24),
        (structs.EpParams.flags, 48),
        (structs.RequestParam.memory_type, 48),
        (structs.RequestParam.memh, 64),
        (structs.EpAttr.transports, 296),
    ],
)
def test_fields_are_where_the_headers_have_them(field, offset):
    assert field.offset == offset


@pytest.mark.parametrize(
    ("pointer", "status"), [(None, 0), (0, 0), (0x7F00_0000_1000, 1), (2**64 - 25, -25), (2**64 - 100, -100)]
)
def test_a_returned_pointer_is_a_request_or_a_status(pointer, status):
    assert request_status(pointer) == status


def test_the_environment_is_filled_in_and_the_users_values_stay(monkeypatch):
    for name in environment.DEFAULTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("UCX_RNDV_THRESH", "1k")
    monkeypatch.setenv("UCX_TLS", "tcp")
    environment.set_defaults()
    assert os.environ["UCX_RNDV_THRESH"] == "1k"
    assert os.environ["UCX_TLS"] == "tcp"
    assert os.environ["UCX_KEEPALIVE_INTERVAL"] == "1s"
    assert os.environ["UCX_ERROR_SIGNALS"] == ""


def test_nixl_in_the_process_is_refused(monkeypatch):
    assert not environment.nixl_is_loaded()
    monkeypatch.setitem(sys.modules, "nixl_cu12", ModuleType("nixl_cu12"))
    problem = ucx.missing("transfer", "ucx")
    assert problem is not None
    transfer = ucx.make_transfer("ucx")
    with pytest.raises(TransferError, match="NIXL"):
        transfer.open(TransferConfig(WorkerId("reader"), 1, ""))


def test_a_mapped_library_of_nixl_is_seen(tmp_path):
    library = tmp_path / "nixl_cu12.libs" / "libucp.so.0"
    library.parent.mkdir()
    library.write_bytes(bytes(mmap.PAGESIZE))
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ):
        assert environment.nixl_is_loaded()
    assert not environment.nixl_is_loaded()


def test_missing_says_what_to_install(monkeypatch):
    assert ucx.missing("transfer", "shm") is None
    monkeypatch.setitem(sys.modules, "libucx", None)
    if find_library("ucp") is not None:
        pytest.skip("the system has a libucp")
    problem = ucx.missing("transfer", "ucx")
    assert problem is not None
    assert "pip install 'trtserve[ucx]'" in problem


def test_before_open_there_is_nothing_to_poll():
    transfer = ucx.make_transfer("ucx")
    assert transfer.poll() == []
    assert transfer.wakeup_fd() is None
    transfer.close()
    with pytest.raises(TransferError, match="not open"):
        transfer.export()


@given(address=BLOBS, rkeys=st.lists(BLOBS, max_size=4))
def test_a_payload_comes_back(address, rkeys):
    decoded = decode_payload(encode_payload("1.22.0", address, rkeys), len(rkeys))
    assert (decoded.ucx_version, decoded.address, decoded.rkeys) == ("1.22.0", address, rkeys)


@given(address=BLOBS, rkeys=st.lists(BLOBS, max_size=4), place=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_a_damaged_payload_never_reaches_ucx(address, rkeys, place, flip):
    payload = bytearray(encode_payload("1.22.0", address, rkeys))
    payload[place % len(payload)] ^= flip
    try:
        decoded = decode_payload(bytes(payload), len(rkeys))
    except TransferError:
        return
    assert (decoded.address, decoded.rkeys) == (address, rkeys), "only the version's text may have changed"


def test_a_payload_with_too_few_keys_is_refused():
    with pytest.raises(TransferError, match="1 keys for 2 regions"):
        decode_payload(encode_payload("1.22.0", b"address", [b"key"]), 2)


class PlayedUcx:
    """Gets go on until they are told to be over."""

    def __init__(self):
        self.are_over = False

    def ucp_get_nbx(self, *arguments):
        return 1

    def ucp_request_check_status(self, request):
        return structs.OK if self.are_over else structs.IN_PROGRESS

    def ucp_request_free(self, request):
        pass


@pytest.mark.parametrize(
    ("are_over", "outcome"), [(True, TransferOutcome.DONE), (False, TransferOutcome.TIMED_OUT)], ids=["over", "not"]
)
def test_a_deadline_is_for_reads_that_are_not_over(are_over, outcome):
    """Whoever looks after it may have had no processor for so long."""
    library = PlayedUcx()
    endpoint = SimpleNamespace(handle=1, close=lambda: None, is_closed=lambda: True)
    peer = UcxPeer(None, 1, endpoint, {})
    read = Read(library, TransferId(1), iter([Gets([Run(0, 0, 64)], 0, None)]), 0.0, 2.0)
    peer.add(read)
    assert peer.advance(1.0) == []
    library.are_over = are_over
    assert peer.advance(9.0) == ([read] if are_over else [])
    library.are_over = True
    peer.advance(9.0)
    assert read.completion(9.0).outcome is outcome
