"""The contract of KV transfers: how a worker's KV bytes become readable for a peer, and how a peer reads them.

A transfer moves bytes and nothing else. It knows neither leases nor requests; what may be read when, and until when, is
agreed over the workers' control channel (`trtserve.plugins.transfer.lease`), the same for every transfer. One-sided:
the worker that needs blocks reads them from the worker that has them, which need take no part in a read.

Order of calls, all of them from one thread: `open` once, `allocate` where the transfer owns its memory, `register` for
every region, then `export` as often as a peer asks; `import_peer`, `read_blocks`, `poll`, `cancel` and `drop_peer` in
any order; `close` once. Only `import_peer` raises for what a peer did; later that is a failed `Completion`.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NewType, Protocol

from trtserve.plugins.api import WorkerId

TransferId = NewType("TransferId", int)
"""One read, unique within one `KVTransfer`; never used again."""


class MemoryKind(StrEnum):
    """Where memory is."""

    HOST = "host"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True)
class TransferCaps:
    """What a transfer can do; fixed for its lifetime."""

    memory: frozenset[MemoryKind]
    across_nodes: bool
    owns_memory: bool  # regions must come from `allocate`
    maps_blocks: bool = False  # `map_blocks` can give views without a copy


@dataclass(frozen=True, slots=True)
class TransferConfig:
    """Who this worker is, for its transfers."""

    worker_id: WorkerId
    incarnation: int  # of this process; a restarted worker has another one
    runtime_dir: str  # a private (0700) folder of the deployment, for Unix sockets
    host: str = "127.0.0.1"  # address that peers on other nodes can reach
    device: str = "cpu"  # or cuda:N
    options: Mapping[str, Any] = field(default_factory=dict)  # the defaults of the plugin's options model


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory of `num_bytes` at `address`, kept alive by `owner`. Host memory supports the buffer protocol by `view`."""

    address: int
    num_bytes: int
    kind: MemoryKind
    owner: object
    view: memoryview | None = None  # host memory only; writable


@dataclass(frozen=True, slots=True)
class Region:
    """Blocks of equal size in one piece of memory: block i is the `block_bytes` bytes from address + i * stride."""

    name: str  # equal names on both sides mean equal contents
    address: int
    num_blocks: int
    block_bytes: int
    stride: int  # >= block_bytes
    kind: MemoryKind = MemoryKind.HOST


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """Who a peer is and where it lives; enough to say whether it can be reached, before anything is opened."""

    worker_id: WorkerId
    incarnation: int
    boot_id: str  # of the kernel
    pid_namespace: str
    uid: int
    pid: int
    host: str
    device: str = "cpu"
    device_uuid: str = ""


@dataclass(frozen=True, slots=True)
class BlockCopies:
    """For one region: the peer's block sources[i] is to become the own block targets[i]. int32, equal lengths."""

    region: str
    sources: array[int]
    targets: array[int]


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """What one read copies. A region appears once, in it a target once; nobody touches the targets until the read has
    ended."""

    copies: Sequence[BlockCopies]


class TransferOutcome(StrEnum):
    """How a read ended."""

    DONE = "done"
    FAILED = "failed"  # this read only
    PEER_LOST = "peer_lost"  # the peer's process or connection is gone; import it anew
    TIMED_OUT = "timed_out"  # the deadline passed and nothing writes to the targets any more
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Completion:
    """The one end of a read. From here on the transfer does not touch the targets."""

    transfer_id: TransferId
    outcome: TransferOutcome
    num_bytes: int  # copied; of all regions
    duration_s: float
    reason: str = ""  # for people, where it is not DONE


class Cancelled(StrEnum):
    """What a `cancel` found."""

    STOPPED = "stopped"  # nothing writes any more; the completion is there for `poll`
    DRAINING = "draining"  # the targets stay quarantined until the completion comes


class Peer(Protocol):
    """An imported peer: one incarnation of one worker."""

    @property
    def info(self) -> PeerInfo:
        """As it was given to `import_peer`."""

    @property
    def lane(self) -> str:
        """How its bytes travel (``cma``, ``tcp``, ``memfd``, ``cuda_ipc``); for logs and metrics."""

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """What the probe of `import_peer` measured; rough, made for deadlines."""


class TransferError(Exception):
    """A transfer cannot be opened, a region not registered or a peer not imported; the text says why."""


class KVTransfer(Protocol):
    """Moves KV bytes between two workers. Made by the hook `make_transfer`; see the module's text for the order."""

    @property
    def name(self) -> str:
        """The plugin's, as in `--transfer`."""

    @property
    def caps(self) -> TransferCaps:
        """Known before `open`."""

    def open(self, config: TransferConfig) -> None:
        """Raises TransferError where the library or device is not usable."""

    def allocate(self, num_bytes: int) -> Buffer | None:
        """Memory that peers can read, where the transfer owns it (`caps.owns_memory`); else None."""

    def register(self, region: Region) -> None:
        """Make a region readable for peers and usable as the target of own reads. The caller keeps it alive until
        `close`. Raises TransferError."""

    def export(self) -> bytes:
        """A versioned description of all registered regions, for `import_peer` of another process. Never a pickle;
        the reader checks every bound."""

    def unreachable(self, peer: PeerInfo) -> str | None:
        """Why a peer cannot be read from here, as far as can be said without trying; None if it can."""

    def import_peer(self, peer: PeerInfo, exported: bytes, deadline_s: float) -> Peer:
        """Connect, and read a little as a probe. Blocks up to `deadline_s` seconds. Raises TransferError; also for
        bytes that are no export, or regions that do not fit the own ones of the same name."""

    def read_blocks(self, peer: Peer, plan: ReadPlan, deadline_s: float) -> TransferId:
        """Begin to copy; may do all of the copying before it returns, in pieces of some milliseconds (16 MiB; of one
        run, 128 MiB) between which the deadline (seconds from now) and `cancel` count. A plan out of bounds raises
        ValueError and copies nothing; an empty one ends DONE. A peer that is gone ends the read, it does not raise."""

    def poll(self) -> list[Completion]:
        """Move on what is under way and return what ended since the last call. Never blocks, never raises."""

    def wakeup_fd(self) -> int | None:
        """Readable when `poll` has something to do; None where it must be called on a tick (`tick_s`)."""

    def tick_s(self) -> float:
        """How long `poll` may stay uncalled; shorter while reads are under way, 0 where only the descriptor counts."""

    def cancel(self, transfer_id: TransferId) -> Cancelled:
        """End a read early. Its completion still comes, exactly once. One that has ended is STOPPED."""

    def map_blocks(self, peer: Peer, region: str, block_ids: Sequence[int]) -> list[memoryview] | None:
        """Read-only views of a peer's blocks without a copy, valid until `drop_peer`; None where that cannot be."""

    def drop_peer(self, peer: Peer) -> None:
        """Forget a peer: its reads end PEER_LOST, its memory and connections are given back. Idempotent."""

    def close(self) -> None:
        """Drop every peer and give everything back; idempotent. Reads under way get no completion any more."""
