"""The export's payload: whose memory it is, and the allocations that peers may open."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import msgspec

from trtserve.plugins.transfer.export import MAX_ADDRESS, region_end
from trtserve.plugins.transfer_api import PeerInfo, Region, TransferError

VERSION = 1
HANDLE_BYTES = 64  # of a cudaIpcMemHandle_t
MAX_ALLOCATIONS = 64


class Allocation(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A whole allocation: a handle opens to its beginning, wherever in it the regions lie."""

    address: Annotated[int, msgspec.Meta(ge=1, le=MAX_ADDRESS)]  # in the process that exports it
    num_bytes: Annotated[int, msgspec.Meta(ge=1, le=MAX_ADDRESS)]
    handle: Annotated[bytes, msgspec.Meta(min_length=HANDLE_BYTES, max_length=HANDLE_BYTES)]

    def holds(self, region: Region) -> bool:
        """Whether a region lies within it."""
        return self.address <= region.address and region_end(region) <= self.address + self.num_bytes


class Payload(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A worker's device, and the allocations that its regions lie in."""

    device_uuid: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    allocations: Annotated[list[Allocation], msgspec.Meta(max_length=MAX_ALLOCATIONS)]


def decode_payload(payload: bytes, peer: PeerInfo, regions: Iterable[Region]) -> Payload:
    """Raises TransferError; also for a region that lies in none of the allocations."""
    try:
        decoded = msgspec.msgpack.decode(payload, type=Payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TransferError(f"worker {peer.worker_id} exports GPU memory that makes no sense: {error}") from None
    for region in regions:
        if not any(allocation.holds(region) for allocation in decoded.allocations):
            raise TransferError(
                f"region {region.name!r} of worker {peer.worker_id} lies outside of the memory it exports"
            )
    return decoded
