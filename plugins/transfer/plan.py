"""Checks of what callers hand to a transfer: the plan of a read, and the regions they register."""

from __future__ import annotations

from array import array
from collections.abc import Mapping

from trtserve.plugins.transfer.export import MAX_ADDRESS, MAX_REGIONS, region_end
from trtserve.plugins.transfer_api import BlockCopies, ReadPlan, Region, TransferError


def check_region(region: Region, registered: Mapping[str, Region]) -> None:
    """Raise TransferError for a region that no peer would accept."""
    if not 0 < region.block_bytes <= region.stride:
        raise TransferError(f"region {region.name!r}: the stride {region.stride} must hold a block of at least 1 byte")
    if not 0 < region.num_blocks < 2**31 or region.address <= 0 or region_end(region) > MAX_ADDRESS:
        raise TransferError(f"region {region.name!r}: no memory has {region.num_blocks} blocks at {region.address:#x}")
    if region.name in registered or not 0 < len(region.name) <= 256:
        raise TransferError(f"region {region.name!r}: names have 1 to 256 characters and are registered once")
    if len(registered) >= MAX_REGIONS:
        raise TransferError(f"region {region.name!r}: a worker has at most {MAX_REGIONS} regions")


def check_plan(plan: ReadPlan, own: Mapping[str, Region], peer: Mapping[str, Region]) -> int:
    """How many bytes the plan copies. Raises ValueError for a plan that cannot be followed."""
    num_bytes, seen = 0, set()
    for copies in plan.copies:
        if copies.region in seen:
            raise ValueError(f"region {copies.region!r} appears twice in the plan")
        seen.add(copies.region)
        num_bytes += _check_copies(copies, own, peer)
    return num_bytes


def _check_copies(copies: BlockCopies, own: Mapping[str, Region], peer: Mapping[str, Region]) -> int:
    name = copies.region
    if name not in own or name not in peer:
        raise ValueError(f"region {name!r} is not known {'here' if name not in own else 'at the peer'}")
    if own[name].block_bytes != peer[name].block_bytes:
        raise ValueError(f"region {name!r} has other block sizes here and at the peer")
    if len(copies.sources) != len(copies.targets):
        raise ValueError(f"region {name!r}: {len(copies.sources)} sources for {len(copies.targets)} targets")
    _check_ids(f"source of region {name!r}", copies.sources, peer[name].num_blocks)
    _check_ids(f"target of region {name!r}", copies.targets, own[name].num_blocks)
    if len(set(copies.targets)) != len(copies.targets):
        raise ValueError(f"region {name!r}: a target appears twice")
    return len(copies.targets) * own[name].block_bytes


def _check_ids(what: str, block_ids: array[int], num_blocks: int) -> None:
    if not isinstance(block_ids, array) or block_ids.typecode != "i":
        raise ValueError(f"{what}: block ids come as array('i')")
    if block_ids and not 0 <= min(block_ids) <= max(block_ids) < num_blocks:
        raise ValueError(f"{what}: ids {min(block_ids)} to {max(block_ids)} are not all among {num_blocks} blocks")
