"""The messages of the KV hand-over between workers; part of the wire (`trtserve.server.workers.wire`, docs/wire.md).

The server passes control on, the bytes go from worker to worker. Row numbers are packed int32, prompts as in `Submit`.
What peers say is bounded while it is decoded; the packed arrays are checked by `rows_of`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from trtserve.plugins.api import KVHandle, Request, RequestId, WorkerId
from trtserve.plugins.transfer_api import PeerInfo

MAX_ROWS = 2**22
"""Rows of one region, and so of one message."""

MAX_LEASES = 4096
"""Leases that one `KVExtend` names."""

Count: TypeAlias = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Bytes: TypeAlias = Annotated[int, Meta(ge=0, le=2**62)]
Seconds: TypeAlias = Annotated[float, Meta(ge=0)]
BytesPerSecond: TypeAlias = Annotated[float, Meta(ge=0)]
Id: TypeAlias = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Rows: TypeAlias = Annotated[bytes, Meta(max_length=4 * MAX_ROWS)]  # int32[num_rows]
Text: TypeAlias = Annotated[str, Meta(max_length=4096)]
Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=256)]
Export: TypeAlias = tuple[Name, Annotated[bytes, Meta(max_length=4 * 2**20)]]  # a transfer's name, and its export
Exports: TypeAlias = Annotated[tuple[Export, ...], Meta(max_length=16)]


class KVPort(msgspec.Struct, frozen=True, array_like=True):
    """How a worker's KV rows can be read; a part of `Ready`."""

    layout: Text  # fingerprint; the same everywhere or no row means anything
    block_bytes: Annotated[int, Meta(ge=1, le=2**40)]
    num_rows: Annotated[int, Meta(ge=1, le=MAX_ROWS)]
    info: PeerInfo
    exports: Exports


class KVUsage(msgspec.Struct, frozen=True, array_like=True):
    """What a worker's KV rows are in use for, and totals of the incarnation; a part of `Heartbeat`."""

    rows_free: Count = 0
    rows_leased: Count = 0  # readable for peers
    rows_fetched: Count = 0  # being read from a peer, or read and not yet in the prefix cache
    rows_quarantined: Count = 0  # of fetches given up whose reads may still write
    leases: Count = 0  # open now
    fetches: Count = 0  # open now
    peers: Count = 0  # imported now
    leases_granted_total: Bytes = 0
    leases_released_total: Bytes = 0
    leases_expired_total: Bytes = 0
    blocks_published_total: Bytes = 0
    blocks_unpublished_total: Bytes = 0  # no row was free for them
    blocks_written_total: Bytes = 0  # fetched, and put into the prefix cache
    bytes_read_total: Bytes = 0
    reads_failed_total: Bytes = 0
    writes_failed_total: Bytes = 0  # the engine took what was fetched for wrong, or broke
    copying_us_total: Bytes = 0  # of the engine's thread, between its cache and rows


# ------------------------------------------------------------------ worker -> server


class KVPublished(msgspec.Struct, tag="kv_published", frozen=True, array_like=True):
    """Blocks of a prompt are readable now: block first_block + i in row i of `rows`. Comes right behind a step."""

    request_id: RequestId
    lease_id: Id  # 0: nothing of this request is kept
    first_block: Count
    rows: Rows
    is_final: bool  # nothing of this request follows


class KVReleased(msgspec.Struct, tag="kv_released", frozen=True, array_like=True):
    """The answer to `KVRelease`. is_valid: the lease had not ended, so what was read of its rows until now is right."""

    lease_id: Id
    is_valid: bool


class KVFetched(msgspec.Struct, tag="kv_fetched", frozen=True, array_like=True):
    """A fetch is over: after its last `KVFetch` all of its reads, or the first that failed. Comes once a request, and
    not after `KVAbort`."""

    request_id: RequestId
    ok: bool  # no read failed; some blocks may be missing for want of rows
    num_blocks: Count  # read, and following one another behind those that the worker had
    num_bytes: Bytes
    duration_s: Seconds  # while at least one read was under way, waiting for its turn included
    lane: Text  # how the bytes travelled; "" where none did
    reason: Text  # for people, where it is not ok or blocks are missing


class KVLinked(msgspec.Struct, tag="kv_linked", frozen=True, array_like=True):
    """What became of the connection to a peer that `KVPeer` told of: sent whenever it comes, is lost, or fails to
    come."""

    worker_id: WorkerId  # of the peer
    incarnation: Id
    transfer: Text  # "" without a connection, as for lane
    lane: Text  # how bytes travel
    bandwidth_bytes_per_s: BytesPerSecond  # of the probe; rough
    problem: Text  # why there is no connection; "" where there is one


# ------------------------------------------------------------------ server -> worker


class KVPeer(msgspec.Struct, tag="kv_peer", frozen=True, array_like=True):
    """A worker whose rows this one may have to read: connect to it now. Replaces another incarnation of it."""

    worker_id: WorkerId
    incarnation: Id
    layout: Text
    info: PeerInfo
    exports: Exports


class KVPeerGone(msgspec.Struct, tag="kv_peer_gone", frozen=True, array_like=True):
    """A worker has ended or was given up: reads from it fail."""

    worker_id: WorkerId
    incarnation: Id


class KVFetch(msgspec.Struct, tag="kv_fetch", frozen=True, array_like=True):
    """Read these rows of that peer; as the fields of `KVPublished`. Several for one request follow one another."""

    request_id: RequestId
    prompt: bytes  # int32[num_prompt_tokens]; empty in all but the first of a request
    cache_salt: str
    worker_id: WorkerId
    incarnation: Id
    first_block: Count
    rows: Rows
    is_final: bool


class KVCommit(msgspec.Struct, tag="kv_commit", frozen=True, array_like=True):
    """The end of a fetch: put what was read into the prefix cache, or (not is_valid) drop it. A `Submit` that follows
    finds the blocks there."""

    request_id: RequestId
    is_valid: bool


class KVAbort(msgspec.Struct, tag="kv_abort", frozen=True, array_like=True):
    """The end of a fetch in any state: cancel its reads and forget it. Ignored where there is none."""

    request_id: RequestId


class KVExtend(msgspec.Struct, tag="kv_extend", frozen=True, array_like=True):
    """These leases last for another lease time from now; those that have ended stay so."""

    lease_ids: Annotated[tuple[Id, ...], Meta(max_length=MAX_LEASES)]


class KVRelease(msgspec.Struct, tag="kv_release", frozen=True, array_like=True):
    """The rows of this lease are not needed any more. `KVReleased` is the answer, always."""

    lease_id: Id


KVFromWorker: TypeAlias = KVPublished | KVReleased | KVFetched | KVLinked
KVToWorker: TypeAlias = KVPeer | KVPeerGone | KVFetch | KVCommit | KVAbort | KVExtend | KVRelease


# ------------------------------------------------------------------ domain <-> messages


def rows_of(packed: bytes) -> array[int]:
    """Raises ValueError where the bytes are not a whole number of row numbers, or one is negative."""
    rows = array("i")
    rows.frombytes(packed)
    if rows and min(rows) < 0:
        raise ValueError(f"row {min(rows)} is below 0")
    return rows


def pack_rows(rows: Sequence[int]) -> bytes:
    """int32[num_rows]; `rows_of` is the way back."""
    return array("i", rows).tobytes()


def handle_of(message: KVPublished, worker_id: WorkerId, incarnation: int) -> KVHandle:
    """Raises ValueError as `rows_of` does."""
    rows = tuple(rows_of(message.rows))
    return KVHandle(message.lease_id, worker_id, incarnation, message.first_block, rows, message.is_final)


def fetch_of(request: Request, handle: KVHandle, *, is_first: bool) -> KVFetch:
    """The order to read what a handle names. is_first: of this request, so that the worker has not the prompt yet."""
    prompt = request.prompt.tobytes() if is_first else b""
    rows = pack_rows(handle.rows)
    return KVFetch(
        request.id,
        prompt,
        request.cache_salt,
        handle.worker_id,
        handle.incarnation,
        handle.first_block,
        rows,
        handle.is_final,
    )
