"""A peer's GPU memory, mapped here: opened once for each incarnation, closed when it is forgotten."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from trtserve.plugins.transfer.cupy_ipc.device import Device, DeviceError
from trtserve.plugins.transfer.cupy_ipc.payload import Payload
from trtserve.plugins.transfer_api import PeerInfo, Region, TransferError

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class CupyPeer:
    """regions: with addresses of this process. opened: the mappings to close, none where the peer is this process."""

    info: PeerInfo
    lane: str
    regions: Mapping[str, Region]
    opened: list[int]
    bandwidth_bytes_per_s: float = 0.0
    num_reads: int = field(default=0)  # under way; the mappings stay until there is none
    is_dropped: bool = False

    def close(self, device: Device) -> None:
        """Once no copy reads from it. Idempotent."""
        while self.opened:
            address = self.opened.pop()
            try:
                device.close_handle(address)
            except DeviceError as error:
                _log.warning("memory of worker %s was not closed: %s", self.info.worker_id, error)


def open_peer(
    device: Device, info: PeerInfo, payload: Payload, regions: Mapping[str, Region], *, is_own_process: bool
) -> CupyPeer:
    """Map all that the peer exports. Raises TransferError, with nothing left open."""
    if is_own_process:  # CUDA cannot open a process's own handle, nor is there a need to
        return CupyPeer(info, "cuda", dict(regions), [])
    opened: list[int] = []
    try:
        for allocation in payload.allocations:
            opened.append(device.open_handle(allocation.handle))
    except DeviceError as error:
        CupyPeer(info, "", {}, opened).close(device)
        raise TransferError(
            f"the GPU memory of worker {info.worker_id} cannot be opened: {error}; containers must share their pid "
            "and IPC namespaces"
        ) from None
    lane = "cuda_ipc" if payload.device_uuid == device.uuid else "cuda_ipc_p2p"
    return CupyPeer(info, lane, _regions_here(payload, opened, regions), opened)


def _regions_here(payload: Payload, opened: Sequence[int], regions: Mapping[str, Region]) -> dict[str, Region]:
    """`decode_payload` has seen to it that each region lies in an allocation."""
    here = {}
    for region in regions.values():
        index = next(number for number, each in enumerate(payload.allocations) if each.holds(region))
        offset = region.address - payload.allocations[index].address
        here[region.name] = replace(region, address=opened[index] + offset)
    return here
