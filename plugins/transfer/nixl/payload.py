"""What a NIXL export carries beside the regions: the agent's metadata, which connects and holds a key per region.

    [agent_metadata, crc32]

NIXL checks the structure of metadata, but UCX parses addresses and keys in it without bounds of its own, and metadata
that fails half-way unloads what was there. So a damaged one must not reach them: the checksum sees to that. Against a
peer that lies there is no defence but not to talk to it: the control channel lets only own workers in.
"""

from __future__ import annotations

import zlib
from typing import Annotated

import msgspec

from trtserve.plugins.api import WorkerId
from trtserve.plugins.transfer_api import PeerInfo, TransferError

VERSION = 1
_MAX_METADATA_BYTES = 3 << 20


class _Payload(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    metadata: Annotated[bytes, msgspec.Meta(min_length=1, max_length=_MAX_METADATA_BYTES)]
    checksum: int


def agent_name(worker_id: WorkerId, incarnation: int) -> str:
    """An agent's name; another one for every process, so that nothing is mistaken for a worker's earlier life."""
    return f"trtserve/{worker_id}/{incarnation}"


def encode_payload(metadata: bytes) -> bytes:
    """metadata: of the own agent, as NIXL gives it."""
    return msgspec.msgpack.encode(_Payload(metadata, zlib.crc32(metadata)))


def decode_payload(payload: bytes, peer: PeerInfo) -> bytes:
    """The metadata. Raises TransferError for anything that `encode_payload` did not make."""
    try:
        decoded = msgspec.msgpack.decode(payload, type=_Payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TransferError(f"worker {peer.worker_id} exports no metadata of NIXL: {error}") from None
    if zlib.crc32(decoded.metadata) != decoded.checksum:
        raise TransferError(f"NIXL's metadata of worker {peer.worker_id} was damaged on its way")
    return decoded.metadata
