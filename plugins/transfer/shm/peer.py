"""A peer's side of the shm transfer: what its export says beyond the regions, and its memory mapped here."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import msgspec

from trtserve.plugins.transfer.export import MAX_ADDRESS, region_end
from trtserve.plugins.transfer.probe import bandwidth, probe_span
from trtserve.plugins.transfer.runs import Run
from trtserve.plugins.transfer.shm.copying import copy_piece
from trtserve.plugins.transfer.shm.handout import MAX_SEGMENTS, close_all, receive_descriptors
from trtserve.plugins.transfer.shm.segment import OwnSegment, PeerSegment, address_of
from trtserve.plugins.transfer_api import PeerInfo, Region, TransferError


class SegmentPlace(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A segment's place in the address space of the process that exports it."""

    address: Annotated[int, msgspec.Meta(ge=0, le=MAX_ADDRESS)]
    num_bytes: Annotated[int, msgspec.Meta(ge=1, le=MAX_ADDRESS)]


class Payload(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The export's payload: the socket in the runtime folder, and the segments whose descriptors it hands out."""

    socket_name: str
    segments: Annotated[list[SegmentPlace], msgspec.Meta(max_length=MAX_SEGMENTS)]


@dataclass(frozen=True, slots=True, eq=False)
class ShmPeer:
    """A peer whose memory is mapped here. regions: with addresses of this process."""

    info: PeerInfo
    lane: str
    bandwidth_bytes_per_s: float
    regions: Mapping[str, Region]
    segments: Sequence[PeerSegment]

    def view(self, region: Region, block_id: int) -> memoryview:
        """One block, read-only."""
        segment = next(segment for segment in self.segments if holds(segment, region))
        return segment.view(region.address - segment.address + block_id * region.stride, region.block_bytes)

    def close(self) -> None:
        for segment in self.segments:
            segment.close()


def holds(segment: OwnSegment | PeerSegment | SegmentPlace, region: Region) -> bool:
    """Whether a region lies within a segment."""
    return segment.address <= region.address and region_end(region) <= segment.address + segment.num_bytes


def decode_payload(payload: bytes, peer: PeerInfo) -> Payload:
    """Raises TransferError for what no shm transfer made."""
    try:
        return msgspec.msgpack.decode(payload, type=Payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TransferError(f"worker {peer.worker_id} exports shared memory that makes no sense: {error}") from None


def map_segments(runtime_dir: str, payload: Payload, pid: int, timeout_s: float) -> list[PeerSegment]:
    """Fetch the peer's descriptors and map them, in the order of the payload. Raises TransferError.

    There may be more descriptors than segments: the peer has allocated again since it exported.
    """
    descriptors = receive_descriptors(runtime_dir, payload.socket_name, pid, timeout_s)
    segments: list[PeerSegment] = []
    try:
        if len(descriptors) < len(payload.segments):
            raise TransferError(f"the peer hands out {len(descriptors)} of its {len(payload.segments)} segments")
        for place in payload.segments:
            segments.append(PeerSegment(descriptors.pop(0), place.num_bytes))
        return segments
    except BaseException:
        for segment in segments:
            segment.close()
        raise
    finally:
        close_all(descriptors)


def regions_here(
    regions: Iterable[Region], places: Sequence[SegmentPlace], segments: Sequence[PeerSegment]
) -> dict[str, Region]:
    """The peer's regions where they are mapped in this process. Raises TransferError for one outside the segments."""
    here = {}
    for region in regions:
        for place, segment in zip(places, segments, strict=True):
            if holds(place, region):
                here[region.name] = replace(region, address=region.address - place.address + segment.address)
                break
        else:
            raise TransferError(f"the peer's region {region.name!r} lies outside of the memory that it hands out")
    return here


def measure(regions: Mapping[str, Region]) -> float:
    """Read a little of a peer; bytes per second, 0 of a peer without regions."""
    span = probe_span(regions.values())
    if span is None:
        return 0.0
    scratch = bytearray(span.num_bytes)
    begun_s = time.perf_counter()
    copy_piece([Run(span.address, address_of(scratch), span.num_bytes)])
    return bandwidth(span.num_bytes, time.perf_counter() - begun_s)
