"""What a UCX export carries beside the regions: how to connect, and a key for each region.

    [ucx_version, worker_address, [packed_rkey, …], crc32]

UCX parses addresses and keys without bounds of its own, so a damaged one must not reach it: the checksum sees to that.
Against a peer that lies there is no defence but not to talk to it: the control channel lets only own workers in.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Annotated

import msgspec

from trtserve.plugins.transfer.export import MAX_REGIONS
from trtserve.plugins.transfer_api import TransferError

VERSION = 1
_Blob = Annotated[bytes, msgspec.Meta(min_length=1, max_length=64 << 10)]


class Payload(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """`rkeys` in the order of the export's regions."""

    ucx_version: Annotated[str, msgspec.Meta(max_length=64)]
    address: _Blob
    rkeys: Annotated[list[_Blob], msgspec.Meta(max_length=MAX_REGIONS)]
    checksum: int


def encode_payload(ucx_version: str, address: bytes, rkeys: Sequence[bytes]) -> bytes:
    """address: of the own UCX worker; rkeys: packed, one for each region, in order."""
    return msgspec.msgpack.encode(Payload(ucx_version, address, list(rkeys), _checksum(address, rkeys)))


def decode_payload(payload: bytes, num_regions: int) -> Payload:
    """Raises TransferError for anything that `encode_payload` did not make for that many regions."""
    try:
        decoded = msgspec.msgpack.decode(payload, type=Payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TransferError(f"the export has no UCX address: {error}") from None
    if len(decoded.rkeys) != num_regions:
        raise TransferError(f"the export has {len(decoded.rkeys)} keys for {num_regions} regions")
    if decoded.checksum != _checksum(decoded.address, decoded.rkeys):
        raise TransferError("the export's UCX address or keys were damaged on their way")
    return decoded


def _checksum(address: bytes, rkeys: Sequence[bytes]) -> int:
    checksum = zlib.crc32(address)
    for rkey in rkeys:
        checksum = zlib.crc32(rkey, checksum)
    return checksum
