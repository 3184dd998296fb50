"""Every message between the server and a worker, and their bytes. `docs/wire.md` tells the same in prose.

One ZeroMQ message is one msgpack array, of a tagged union, or a `Batch` of them (msgspec checks types while decoding;
nothing is ever unpickled and no class is looked up by name). Token ids are packed int32, request ids and block hashes
packed uint64, all little-endian. A change here changes `WIRE_VERSION` and docs/wire.md. Those of the KV hand-over are
in `kv_messages`.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Collection, Sequence
from itertools import islice
from typing import TypeAlias

import msgspec

from trtserve.plugins.api import (
    BlockHash,
    EngineInfo,
    KVCleared,
    KVEvent,
    KVHandle,
    KVRemoved,
    KVStored,
    Output,
    PassStats,
    Request,
    RequestId,
    Role,
    SamplingParams,
    StepOutputs,
    TokenIds,
    TokenLogprob,
    WorkerId,
    WorkerLoad,
)
from trtserve.server.workers.kv_messages import KVFromWorker, KVPort, KVToWorker, KVUsage

WIRE_VERSION = 7

MAX_MESSAGE_BYTES = 64 * 2**20
"""Either side closes the connection of a peer that sends more."""

MAX_DESCRIPTOR_BYTES = 2**20
"""Of a `KVHandle` that an engine made."""

MAX_BLOCKS = (MAX_MESSAGE_BYTES - 64) // 8
"""Hashes that one `Blocks` can carry."""

assert sys.byteorder == "little", "the packed arrays on the wire are little-endian"
assert array("i").itemsize == 4 and array("Q").itemsize == 8


# ------------------------------------------------------------------ worker -> server


class Hello(msgspec.Struct, tag="hello", frozen=True, array_like=True):
    """First message of a worker, before it loads anything, so that a mismatch costs no time."""

    wire_version: int
    worker_id: WorkerId
    incarnation: int  # random, new for every process
    token: str  # proves that this worker was started for this server
    pid: int
    role: Role
    engine: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    trtserve_version: str


class Progress(msgspec.Struct, tag="progress", frozen=True, array_like=True):
    """What start-up is doing, for people."""

    phase: str


class Ready(msgspec.Struct, tag="ready", frozen=True, array_like=True):
    """The engine has generated a real token; requests may come. Without `kv` the worker takes no part in the KV
    hand-over."""

    info: EngineInfo
    kv: KVPort | None = None


class Heartbeat(msgspec.Struct, tag="alive", frozen=True, array_like=True):
    """Sent every second by the thread that owns the socket. `steps` that stand still while requests are open mean a
    hung engine in a living process."""

    steps: int
    load: WorkerLoad
    kv: KVUsage | None = None


class Stored(msgspec.Struct, tag="stored", frozen=True, array_like=True):
    """As `KVStored`, without the tokens."""

    parent: BlockHash | None
    hashes: bytes  # uint64[num_blocks]


class Removed(msgspec.Struct, tag="removed", frozen=True, array_like=True):
    """As `KVRemoved`."""

    hashes: bytes  # uint64[num_blocks]


class Cleared(msgspec.Struct, tag="cleared", frozen=True, array_like=True):
    """As `KVCleared`."""


WireEvent: TypeAlias = Stored | Removed | Cleared


class Detail(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """What is rare about one request's output in a step. `logprobs` belong to the tokens of the same step."""

    request_id: RequestId
    finish_reason: str | None = None  # a FinishReason
    cached_tokens: int | None = None
    stop_token_id: int | None = None
    error: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    kv_handle: KVHandle | None = None
    kv_lost: bool = False
    is_refused: bool = False
    speculation: tuple[int, int] | None = None


class Step(msgspec.Struct, tag="step", frozen=True, array_like=True):
    """All that one engine step gave. Row i of the packed arrays is one request; the tokens of all rows follow one
    another. Empty `counts`: one token a row, the usual case."""

    number: int  # grows by one a step within an incarnation
    request_ids: bytes  # uint64[num_rows]
    counts: bytes  # uint16[num_rows], or empty
    token_ids: bytes  # int32[sum of counts]
    details: tuple[Detail, ...]
    load: WorkerLoad
    first_event: int  # number of events[0]; counts every event of the incarnation, so that a gap is seen
    events: tuple[WireEvent, ...]
    stats: PassStats | None
    rank: int = 0  # as `StepOutputs.rank`; each has events of its own

    @property
    def num_rows(self) -> int:
        """Requests that got tokens."""
        return len(self.request_ids) // 8

    @property
    def num_tokens(self) -> int:
        """Tokens generated, over all rows."""
        return len(self.token_ids) // 4


class Blocks(msgspec.Struct, tag="blocks", frozen=True, array_like=True):
    """The answer to `Resync`, one for each rank: every block stored after all events below `next_event`, in no order.
    Stands among the steps where it belongs: the rank's next step's `first_event` is `next_event`."""

    next_event: int
    hashes: bytes  # uint64[num_blocks]
    rank: int = 0


class Failed(msgspec.Struct, tag="failed", frozen=True, array_like=True):
    """The last words of a worker that cannot go on; it exits right after."""

    reason: str


FromWorker: TypeAlias = Hello | Progress | Ready | Heartbeat | Step | Blocks | KVFromWorker | Failed


class Batch(msgspec.Struct, tag="batch", frozen=True, array_like=True):
    """Messages that waited for the worker's socket at the same time, in order; as good as one by one, and cheaper to
    receive. Made by `batch_of`."""

    messages: tuple[FromWorker, ...]


# ------------------------------------------------------------------ server -> worker


class Welcome(msgspec.Struct, tag="welcome", frozen=True, array_like=True):
    """Hello accepted: load the engine."""


class Refused(msgspec.Struct, tag="refused", frozen=True, array_like=True):
    """Hello or Ready not accepted; the worker prints the reason and exits without being restarted."""

    reason: str


class Submit(msgspec.Struct, tag="submit", frozen=True, array_like=True):
    """A request; ends with exactly one finish reason."""

    request_id: RequestId
    prompt: bytes  # int32[num_prompt_tokens]
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...]
    cache_salt: str = ""
    keep_kv: bool = False  # keep the prompt's KV blocks readable for other workers: `KVPublished` tells of them
    num_resumed: int = 0  # as `Request.num_resumed`
    kv_handle: KVHandle | None = None  # as `Request.kv_handle`
    rank: int | None = None  # as `Request.rank`


class Cancel(msgspec.Struct, tag="cancel", frozen=True, array_like=True):
    """A request is not wanted any more."""

    request_id: RequestId


class Resync(msgspec.Struct, tag="resync", frozen=True, array_like=True):
    """Events were lost: say which blocks are stored. `Blocks` is the answer."""


class Shutdown(msgspec.Struct, tag="shutdown", frozen=True, array_like=True):
    """End now: the server has finished or given up what was running."""


ToWorker: TypeAlias = Welcome | Refused | Submit | Cancel | Resync | KVToWorker | Shutdown

_encoder = msgspec.msgpack.Encoder()
_from_worker = msgspec.msgpack.Decoder(FromWorker | Batch)
_BATCH_HEAD = _encoder.encode(Batch(()))[:-1]  # all but the array of messages
_to_worker = msgspec.msgpack.Decoder(ToWorker)

_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are no message; the last two for texts that are no UTF-8 and for deep nesting."""


class WireError(ValueError):
    """A message that does not decode: another version, or not one of ours."""


def encode(message: FromWorker | ToWorker) -> bytes:
    """One ZeroMQ frame."""
    return _encoder.encode(message)


def decode_from_worker(data: bytes) -> Sequence[FromWorker]:
    """The messages in one ZeroMQ message: one, or those of a batch."""
    try:
        message = _from_worker.decode(data)
    except _UNDECODABLE as error:
        raise WireError(str(error)) from error
    return message.messages if type(message) is Batch else (message,)


def batch_of(encoded: Sequence[bytes]) -> bytes:
    """One ZeroMQ message with these encoded ones, at most 65,535."""
    if len(encoded) == 1:
        return encoded[0]
    array_head = b"\xdc" + len(encoded).to_bytes(2, "big")  # msgpack's array 16
    return b"".join((_BATCH_HEAD, array_head, *encoded))


def decode_to_worker(data: bytes) -> ToWorker:
    """Raises WireError for anything else."""
    try:
        return _to_worker.decode(data)  # type: ignore[no-any-return]
    except _UNDECODABLE as error:
        raise WireError(str(error)) from error


# ------------------------------------------------------------------ domain <-> messages


def submit_of(request: Request, *, keep_kv: bool = False) -> Submit:
    """keep_kv: as `Submit.keep_kv`, beside what the request says itself."""
    return Submit(
        request.id,
        request.prompt.tobytes(),
        request.sampling,
        request.eos_token_ids,
        request.cache_salt,
        keep_kv or request.keeps_kv,
        request.num_resumed,
        request.kv_handle,
        request.rank,
    )


def request_of(message: Submit) -> Request:
    """Raises WireError where the packed prompt is not a whole, non-empty number of token ids, none of them would be a
    prompt's, or a descriptor is too long."""
    if not message.prompt or len(message.prompt) % 4:
        raise WireError(f"a prompt of {len(message.prompt)} bytes is not a non-empty array of int32")
    if not 0 <= message.num_resumed < len(message.prompt) // 4:
        raise WireError(f"{message.num_resumed} of {len(message.prompt) // 4} prompt tokens cannot be resumed output")
    if message.kv_handle is not None:
        check_descriptor(message.kv_handle)
    return Request(
        message.request_id,
        token_ids_of(message.prompt),
        message.sampling,
        message.eos_token_ids,
        cache_salt=message.cache_salt,
        num_resumed=message.num_resumed,
        keeps_kv=message.keep_kv,
        kv_handle=message.kv_handle,
        rank=message.rank,
    )


def check_descriptor(handle: KVHandle) -> None:
    """Raises WireError where an engine's descriptor is longer than one may be."""
    if len(handle.descriptor) > MAX_DESCRIPTOR_BYTES:
        raise WireError(f"a KV descriptor of {len(handle.descriptor)} bytes is longer than {MAX_DESCRIPTOR_BYTES}")


def token_ids_of(packed: bytes) -> TokenIds:
    """Raises ValueError for half a token."""
    ids = array("i")
    ids.frombytes(packed)
    return ids


def step_of(number: int, first_event: int, outputs: StepOutputs) -> Step:
    """Pack one engine step."""
    request_ids, counts, token_ids = array("Q"), array("H"), array("i")
    details = []
    for output in outputs.outputs:
        if output.token_ids:
            request_ids.append(output.request_id)
            counts.append(len(output.token_ids))
            token_ids.extend(output.token_ids)
        if _has_detail(output):
            details.append(_detail_of(output))
    one_each = len(token_ids) == len(request_ids)
    return Step(
        number,
        request_ids.tobytes(),
        b"" if one_each else counts.tobytes(),
        token_ids.tobytes(),
        tuple(details),
        outputs.load,
        first_event,
        tuple(event_of(event) for event in outputs.events),
        outputs.stats,
        outputs.rank,
    )


def _has_detail(output: Output) -> bool:
    return (
        output.finish_reason is not None
        or output.cached_tokens is not None
        or output.logprobs is not None
        or output.kv_handle is not None
    )


def _detail_of(output: Output) -> Detail:
    return Detail(
        output.request_id,
        None if output.finish_reason is None else output.finish_reason.value,
        output.cached_tokens,
        output.stop_token_id,
        output.error,
        output.logprobs,
        output.kv_handle,
        output.kv_lost,
        output.is_refused,
        output.speculation,
    )


def event_of(event: KVEvent) -> WireEvent:
    """As it travels."""
    match event:
        case KVStored():
            return Stored(event.parent, array("Q", [block.hash for block in event.blocks]).tobytes())
        case KVRemoved():
            return Removed(array("Q", event.hashes).tobytes())
        case KVCleared():
            return Cleared()


def blocks_of(next_event: int, hashes: Collection[BlockHash], rank: int = 0, limit: int = MAX_BLOCKS) -> Blocks:
    """Pack the whole set. Beyond `limit` some are left out: the server then knows less than is there, never more."""
    # An array takes a list at once, and anything else one by one.
    return Blocks(next_event, array("Q", list(islice(hashes, limit))).tobytes(), rank)


def hashes_of(packed: bytes) -> Sequence[BlockHash]:
    """Raises ValueError where the bytes are not a whole number of hashes."""
    hashes = array("Q")
    hashes.frombytes(packed)
    return hashes  # type: ignore[return-value]  # an array of ints is a sequence of hashes
