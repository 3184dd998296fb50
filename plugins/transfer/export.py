"""What a worker tells its peers of its memory: a versioned msgpack envelope, the same for every transfer.

    [transfer, version, worker_id, incarnation, [[name, address, num_blocks, block_bytes, stride, kind], …], payload]

`payload` is the transfer's own (keys, socket names). The bytes come from another process: decoding checks every type,
bound and size, and says TransferError; the payload is for the transfer to check.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

import msgspec

from trtserve.plugins.transfer_api import MemoryKind, PeerInfo, Region, TransferConfig, TransferError

MAX_EXPORT_BYTES = 4 << 20
MAX_REGIONS = 4096
MAX_ADDRESS = 2**62  # far past any address that a CPU or GPU has

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Address = Annotated[int, msgspec.Meta(ge=0, le=MAX_ADDRESS)]
Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]  # block ids are int32
Size = Annotated[int, msgspec.Meta(ge=1, le=2**40)]


class _Region(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    name: Name
    address: Address
    num_blocks: Count
    block_bytes: Size
    stride: Size
    kind: MemoryKind


class _Head(msgspec.Struct, frozen=True, array_like=True):
    transfer: Name
    version: int


class _Envelope(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    transfer: Name
    version: int
    worker_id: str
    incarnation: int
    regions: Annotated[list[_Region], msgspec.Meta(max_length=MAX_REGIONS)]
    payload: bytes


@dataclass(frozen=True, slots=True)
class Export:
    """A peer's regions by name, with addresses of the peer's own address space, and the transfer's payload."""

    regions: Mapping[str, Region]
    payload: bytes


def region_end(region: Region) -> int:
    """The address after a region's last block."""
    return region.address + (region.num_blocks - 1) * region.stride + region.block_bytes


def encode_export(
    transfer: str, version: int, config: TransferConfig, regions: Iterable[Region], payload: bytes = b""
) -> bytes:
    """The envelope. version: of the payload's meaning; raise it with every change."""
    rows = [
        _Region(region.name, region.address, region.num_blocks, region.block_bytes, region.stride, region.kind)
        for region in regions
    ]
    return msgspec.msgpack.encode(_Envelope(transfer, version, config.worker_id, config.incarnation, rows, payload))


def decode_export(exported: bytes, transfer: str, version: int, peer: PeerInfo) -> Export:
    """Check and unpack what `encode_export` made in process `peer`. Raises TransferError."""
    envelope = _decode(exported, transfer, version, peer)
    if (envelope.worker_id, envelope.incarnation) != (peer.worker_id, peer.incarnation):
        raise TransferError(
            f"the export is of worker {envelope.worker_id}, incarnation {envelope.incarnation}, "
            f"not of worker {peer.worker_id}, incarnation {peer.incarnation}"
        )
    regions: dict[str, Region] = {}
    for row in envelope.regions:
        region = Region(row.name, row.address, row.num_blocks, row.block_bytes, row.stride, row.kind)
        if region.name in regions or region.stride < region.block_bytes or region_end(region) > MAX_ADDRESS:
            raise TransferError(f"worker {peer.worker_id} exports region {region.name!r} twice or with sizes that lie")
        regions[region.name] = region
    return Export(regions, envelope.payload)


def check_same_shape(own: Mapping[str, Region], peer: Mapping[str, Region]) -> None:
    """Raise TransferError where a region that both sides have differs in its block size or kind of memory."""
    for name in own.keys() & peer.keys():
        mine, theirs = own[name], peer[name]
        if (mine.block_bytes, mine.kind) != (theirs.block_bytes, theirs.kind):
            raise TransferError(
                f"region {name!r} has blocks of {theirs.block_bytes} bytes in {theirs.kind} memory at the peer, "
                f"of {mine.block_bytes} bytes in {mine.kind} memory here; do both serve the same model alike?"
            )


def _decode(exported: bytes, transfer: str, version: int, peer: PeerInfo) -> _Envelope:
    if len(exported) > MAX_EXPORT_BYTES:
        raise TransferError(f"the export of worker {peer.worker_id} has {len(exported)} bytes, over {MAX_EXPORT_BYTES}")
    try:
        head = msgspec.msgpack.decode(exported, type=_Head)
        if (head.transfer, head.version) != (transfer, version):
            raise TransferError(
                f"worker {peer.worker_id} exports for transfer {head.transfer}, version {head.version}; "
                f"this is {transfer}, version {version}"
            )
        return msgspec.msgpack.decode(exported, type=_Envelope)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TransferError(f"worker {peer.worker_id} sent no export of transfer {transfer}: {error}") from None
