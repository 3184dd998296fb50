"""All that a plugin author needs: the data that crosses plugin borders and the contracts.

Nothing here imports anything of trtserve, so a plugin package can depend on this module alone. Hooks
(`trtserve.plugins.hooks`) make the objects described here by name. It is one file, longer than the others, because it
is the one page that an author reads: half of it is the contracts' text.

Token ids travel as `TokenIds`: an `array` of C ints (typecode ``"i"``, int32), which is compact, indexable and
gives its bytes away without a copy. Nobody changes one after it was handed over.

What is made for every request or step is a frozen `msgspec.Struct`: it is made in a quarter of the time that a frozen
dataclass takes, and goes over the wire as an array of its fields. `msgspec.structs.replace` makes a changed copy.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Any, Literal, NewType, Protocol, Self, TypeAlias, runtime_checkable

import msgspec

RequestId = NewType("RequestId", int)
"""One generated sequence, unique for the life of the server process (a request with n=2 has two)."""

WorkerId = NewType("WorkerId", str)
"""A place in the deployment, such as ``agg-0``; it survives a restart of the process behind it."""

BlockHash = NewType("BlockHash", int)
"""Chained hash of a full block of tokens (`trtserve.plugins.blocks`), an unsigned 64-bit integer."""

TokenIds: TypeAlias = "array[int]"


class Role(StrEnum):
    """What a worker does for a request; a label, not an engine type."""

    AGG = "agg"
    PREFILL = "prefill"
    DECODE = "decode"


class FinishReason(StrEnum):
    """How a sequence ended in the engine. Stop *strings* are the server's business, not the engine's."""

    STOP = "stop"  # an end-of-sequence or stop token
    LENGTH = "length"  # max_tokens or the engine's longest sequence
    CANCELLED = "cancelled"  # Engine.cancel took effect
    ERROR = "error"  # this request failed; the engine goes on


# ------------------------------------------------------------------ requests and what comes back


class GuidedDecoding(msgspec.Struct, frozen=True, array_like=True):
    """The form that an answer must have."""

    kind: Literal["json_object", "json_schema", "regex", "grammar"]  # grammar: EBNF
    text: str = ""  # the schema as JSON, the expression or the grammar; empty with json_object


class SamplingParams(msgspec.Struct, frozen=True, array_like=True):
    """How to choose tokens. The server has validated every bound given here; engines need not.

    Greedy means ``temperature == 0``. Penalties look at prompt and output as vLLM's do: repetition_penalty counts
    both, presence_penalty and frequency_penalty count generated tokens only.
    """

    max_tokens: int  # >= 1, prompt + max_tokens <= the engine's max_seq_len
    min_tokens: int = 0  # end and stop tokens are impossible before this many
    temperature: float = 1.0  # >= 0
    top_p: float = 1.0  # (0, 1]
    top_k: int = 0  # 0: off
    min_p: float = 0.0  # [0, 1], 0: off
    seed: int | None = None  # signed 64 bit; None: the engine's own generator
    repetition_penalty: float = 1.0  # > 0
    presence_penalty: float = 0.0  # [-2, 2]
    frequency_penalty: float = 0.0  # [-2, 2]
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id < vocab size, added to its logit)
    stop_token_ids: tuple[int, ...] = ()  # end the sequence, whatever ignore_eos says
    ignore_eos: bool = False  # end-of-sequence tokens are ordinary tokens
    logprobs: int | None = None  # None: none; k >= 0: the chosen token's and the k most likely ones'
    guided: GuidedDecoding | None = None  # only where `EngineInfo.supports_guided_decoding`


class KVHandle(msgspec.Struct, frozen=True, array_like=True):
    """KV of a prompt that a worker keeps for another one; (worker_id, incarnation, lease_id) names it.

    Of a worker whose rows others read: block i of the prompt, for i from `first_block` on, is in row
    `rows[i - first_block]` of its KV region, under a lease that ends unless it is extended. Of an engine that moves KV
    itself: there are no rows, `lease_id` and `descriptor` are the engine's, and the server fills in the rest.
    """

    lease_id: int  # 0 to 2^63 - 1, unique within the incarnation
    worker_id: WorkerId
    incarnation: int
    first_block: int
    rows: tuple[int, ...]
    is_final: bool = True  # False: the prompt is still being computed, and more of its blocks follow
    descriptor: bytes = b""  # at most 1 MiB, opaque: all that the engine on the other side needs


class Request(msgspec.Struct, frozen=True):
    """One sequence to generate. Immutable; `prompt` is shared, never copied, by whoever holds the request."""

    id: RequestId
    prompt: TokenIds  # int32[num_prompt_tokens], at least one token
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...] = ()  # end of sequence for this model
    block_hashes: tuple[BlockHash, ...] = ()  # of the prompt's full blocks; () where nobody asked for them
    cache_salt: str = ""  # keeps one tenant's prefix cache apart; part of every block hash
    num_resumed: int = 0  # of the prompt's last tokens: generated by another worker before, and output in every respect
    arrival_s: float = 0.0  # monotonic clock of the server
    keeps_kv: bool = False  # the prefill of a hand-over, see `EngineInfo.moves_kv`
    kv_handle: KVHandle | None = None  # the decode of one: where the KV is; the prefill's tokens are the resumed ones
    rank: int | None = None  # of an engine with `EngineInfo.num_ranks` above 1: the one that is to serve it; None: any


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities at one position, after temperature-free softmax of the penalised logits."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What a row of KV bytes is; workers exchange rows only where the fingerprints are equal."""

    fingerprint: str  # of model, dtype, block size, heads, layers and the version of the layout itself
    block_bytes: int  # of one block of tokens: all layers, in the canonical order
    device: str  # where rows have to be: cpu, or cuda:N


class Output(msgspec.Struct, frozen=True):
    """What one engine step gave one request.

    `token_ids` holds every token that was generated, the one that ended the sequence included; `stop_token_id` then
    names it and the server keeps it out of the text. After an output with a `finish_reason` the engine says nothing
    more about that request, and has given back all that it held.
    """

    request_id: RequestId
    token_ids: Sequence[int] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    cached_tokens: int | None = None  # prompt tokens taken from the prefix cache; given once, with the first output
    logprobs: tuple[TokenLogprob, ...] | None = None  # one per token id, where asked for
    error: str | None = None  # with FinishReason.ERROR: a sentence for the client
    kv_handle: KVHandle | None = None  # engines that move KV themselves: with the last output of a prefill
    kv_lost: bool = False  # with FinishReason.ERROR and no token ever: the request's kv_handle could not be taken
    is_refused: bool = False  # with FinishReason.ERROR: the request asks for what this engine cannot do
    speculation: tuple[int, int] | None = (
        None  # with the last output, where tokens were drafted: how many, how many kept
    )


class StoredBlock(msgspec.Struct, frozen=True, gc=False):
    """A full block whose KV can be reused from now on."""

    hash: BlockHash
    token_ids: TokenIds  # int32[block_size]


class KVStored(msgspec.Struct, frozen=True):
    """`blocks` follow one another; the first one's parent is `parent` (None: the start of a sequence)."""

    parent: BlockHash | None
    blocks: tuple[StoredBlock, ...]


class KVRemoved(msgspec.Struct, frozen=True):
    """These blocks were evicted (a block that a request merely let go of is still stored)."""

    hashes: tuple[BlockHash, ...]


class KVCleared(msgspec.Struct, frozen=True):
    """Nothing is stored any more."""


KVEvent: TypeAlias = KVStored | KVRemoved | KVCleared


class WorkerLoad(msgspec.Struct, frozen=True, array_like=True):
    """State of an engine right after a step. Counters (`*_total`) only ever grow within one incarnation."""

    running: int = 0  # sequences holding KV blocks
    waiting: int = 0  # sequences submitted and not running
    free_blocks: int = 0  # unused or evictable
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0  # of prompt_tokens_total: taken from the prefix cache
    generated_tokens_total: int = 0
    preemptions_total: int = 0
    drafted_tokens_total: int = 0  # speculative decoding: proposed
    accepted_tokens_total: int = 0  # speculative decoding: kept
    lost_kv_events_total: int = 0  # events that the engine itself lost: nobody knows what they would have told


class PassStats(msgspec.Struct, frozen=True, array_like=True):
    """What one forward pass did, for the router's learnt speeds."""

    duration_s: float
    prefill_tokens: int  # new prompt tokens computed
    decode_sequences: int
    context_tokens: int  # KV tokens read by the decoding sequences


class StepOutputs(msgspec.Struct, frozen=True):
    """Everything one engine step has to say; the worker sends it as one message."""

    outputs: Sequence[Output]
    load: WorkerLoad
    events: Sequence[KVEvent] = ()
    stats: PassStats | None = None
    rank: int = 0  # that `load`, `events` and `stats` are of; the outputs as well


# ------------------------------------------------------------------ engines


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How to build an engine; made from the settings in the worker process."""

    model_path: str  # a Hugging Face folder on this machine
    role: Role = Role.AGG
    dtype: str = "auto"  # auto, bfloat16, float16, float32
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    block_size: int = 16  # tokens in a KV block
    num_blocks: int | None = None  # KV blocks; None: from kv_cache_gib
    kv_cache_gib: float | None = None  # None: the engine's default
    max_num_seqs: int = 64  # sequences running at once
    max_num_tokens: int | None = None  # tokens in one pass, decodes included; None: the engine's own default
    max_seq_len: int | None = None  # prompt + output; None: the model's own limit, bounded by the KV cache
    enable_prefix_caching: bool = True
    seed: int = 0
    transfer: str = "auto"  # how an engine that moves KV itself is to do it: auto, or a name that it knows
    options: Mapping[str, Any] = field(default_factory=dict)  # checked by the engine's own options model


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """What an engine will need and be given, told before any worker starts (hook `plan_engine`)."""

    num_gpus: int  # of one worker; it sees these and no others
    environment: Mapping[str, str] = field(default_factory=dict)  # of the worker's process, over what it would inherit
    unset: tuple[str, ...] = ()  # variables that the process must not inherit
    arguments: Mapping[str, Any] = field(default_factory=dict)  # for people: what the engine's library is given
    notes: tuple[str, ...] = ()  # for people: what someone should know
    moves_kv: bool = False  # the engine moves KV itself; no transfer of ours is needed
    by_hand: str = ""  # why the server cannot start such a worker, and how it is started; empty: it can


class PlanRefused(Exception):
    """An engine cannot run as it is configured; the text has a line for each problem."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine turned out to be, once started. Sent to the server in the worker's `Ready`.

    An engine with `moves_kv` hands KV over to its like in another worker by itself:

    1. The prefill is a request with `keeps_kv`. If it ends with LENGTH, its last output has a `kv_handle`, and the
       engine keeps the prompt's KV. With any other end it keeps nothing.
    2. The decode is a request with that handle, whose prompt ends in the tokens that the prefill gave
       (`num_resumed`). The engine takes the KV and goes on, or ends it with ERROR and `kv_lost`, bounded in time. A
       handle is given to one request at most. The prefill's side frees what was taken; nobody tells it.
    3. `Engine.cancel` of the prefill, after its end, says that its KV is not needed any more; no output follows. An
       engine waits with freeing it while a transfer is under way. It comes at the end of every hand-over, so it is
       ignored for KV that was taken.
    4. A decode that is cancelled while its KV is under way ends when that is safe.

    Such an engine is an `Engine` of its own: `Driver` passes no cancel on to a request that has ended.
    """

    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_tokens: int
    max_seq_len: int  # prompt and output
    vocab_size: int
    publishes_kv_events: bool = True
    caches_prefixes: bool = True  # the KV of equal prompt beginnings is reused; False where that is off, or never done
    supports_logprobs: bool = True
    max_logprobs: int = 20
    max_prompt_tokens: int | None = None  # of a prompt that this engine computes; None: one less than max_seq_len
    moves_kv: bool = False
    kv_fingerprint: str = ""  # with moves_kv: only engines with equal ones understand each other's descriptors
    supports_guided_decoding: bool = False
    supports_cache_salt: bool = True  # `Request.cache_salt` keeps caches apart; without it, such requests are refused
    num_ranks: int = 1  # attention-DP ranks: each has its own KV cache of num_blocks and runs max_num_seqs
    about: tuple[tuple[str, str], ...] = ()  # versions and the like, by name, for people; a few short texts


class RequestRefused(Exception):
    """An engine cannot serve this one request; the text is for the client. The engine goes on."""


class EngineSink(Protocol):
    """Where an engine puts what it made. Any thread may call it; no call blocks on a client."""

    def push(self, step: StepOutputs) -> None:
        """Hand over one step. Ownership of the lists goes to the sink."""

    def fail(self, error: BaseException) -> None:
        """The engine is broken for good: the worker process ends and is restarted."""

    def progress(self, phase: str) -> None:
        """Tell what start-up is doing, in a word or two (``loading weights``)."""


@runtime_checkable
class Engine(Protocol):
    """A model that generates, with its own scheduler and KV cache. Made by the hook `make_engine`.

    Order of calls: `start` once, then `submit`, `cancel`, `stats` in any order, `close` once. They come one at a time
    but not all from one thread: the worker starts and warms up on one, and serves and closes on another, where `close`
    may come while the warm-up still submits. None but `start` and `close` waits for a forward pass. Results come
    through the sink given to `start`.
    """

    def start(self, sink: EngineSink) -> EngineInfo:
        """Load the model and start generating. Blocks until requests can be submitted; raises if it cannot."""

    def submit(self, request: Request) -> None:
        """Queue a request. One that cannot be served ends with an `Output` of FinishReason.ERROR, not an exception."""

    def cancel(self, request_id: RequestId) -> None:
        """End a request early. Exactly one final `Output` follows (CANCELLED, or another reason if it came first);
        a request that has ended, or was never known, is ignored. Of a prefill that has ended with a `kv_handle`: its
        KV is not needed any more, see `EngineInfo`."""

    def stats(self) -> WorkerLoad:
        """The load after the last step; cheap."""

    def close(self) -> None:
        """Stop and free everything. Requests that still run get no more outputs. Idempotent, bounded in time."""


class StepEngine(Protocol):
    """An engine that is moved on one pass at a time. `trtserve.plugins.driver.Driver` makes an `Engine` of it.

    One thread makes every call, so an implementation needs no locks.
    """

    def start(self, progress: Callable[[str], None]) -> EngineInfo:
        """Load; as `Engine.start`."""

    def add(self, request: Request) -> None:
        """Queue a request; raises `RequestRefused` if it can never be served."""

    def abort(self, request_id: RequestId) -> None:
        """End a request at once and give back what it held; the next `step` reports it CANCELLED. Unknown ids are
        ignored."""

    def has_work(self) -> bool:
        """Whether `step` has anything to do or to report."""

    def step(self) -> StepOutputs:
        """Run one pass. May take as long as a pass takes. An exception means the engine is broken for good."""

    def stats(self) -> WorkerLoad:
        """The load as it is now; cheap."""

    def close(self) -> None:
        """Free everything; idempotent. Also called where `start` or `step` raised."""


class KVStoreEngine(Protocol):
    """What a `StepEngine` also has that takes part in disaggregated serving: its prefix cache, as rows of bytes.

    Rows lie in memory that others can reach, given once by `attach_rows`. All calls come from the thread that steps.
    `tokens` are those of a prompt, int32[num_tokens]; only its full blocks are ever meant.
    """

    def kv_layout(self) -> KVLayout:
        """Fixed once the engine has started."""

    def attach_rows(self, rows: KVRows) -> None:
        """Called once, before any other of these but `kv_layout`."""

    def stored_blocks(self, tokens: TokenIds, cache_salt: str) -> int:
        """How many leading blocks of the prompt are in the prefix cache now."""

    def read_kv(self, tokens: TokenIds, cache_salt: str, first_block: int, rows: Sequence[int]) -> int:
        """Copy blocks first_block, first_block + 1, … of the prompt into these rows, one each, as far as they are in
        the prefix cache; returns how many."""

    def write_kv(self, tokens: TokenIds, cache_salt: str, first_block: int, rows: Sequence[int]) -> int:
        """Put blocks into the prefix cache, from these rows; the blocks before first_block are there. Evicts as
        computing them would; returns how many there was room for. KV events tell of them with the next step."""


@dataclass(frozen=True, slots=True)
class KVRows:
    """Rows of `row_bytes` each, one after the other at `address`; `owner` keeps the memory alive."""

    address: int
    num_rows: int
    row_bytes: int
    device: str  # cpu, or cuda:N
    owner: object


# ------------------------------------------------------------------ serving: modes, routing, launching


class OutputSink(Protocol):
    """Where a running request's tokens go; called on the event loop, must not block and must not raise."""

    def push(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None) -> None:
        """New tokens, in order. May be called many times before control returns to any task."""

    def cached(self, num_tokens: int) -> None:
        """How many prompt tokens came from a prefix cache; called once, before the first `push`."""


class Finish(msgspec.Struct, frozen=True):
    """How a run ended, for the mode that awaited it."""

    reason: FinishReason
    stop_token_id: int | None = None
    error: str | None = None
    kv_handle: KVHandle | None = None
    kv_lost: bool = False  # as `Output.kv_lost`, and so the other two
    is_refused: bool = False
    speculation: tuple[int, int] | None = None


class Placement(Protocol):
    """A booking of one request on one worker. Use it as a context manager: leaving gives the booking back."""

    @property
    def worker_id(self) -> WorkerId:
        """The worker; of an engine with attention-DP ranks the rank, such as ``agg-0/1``."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the router expects of the best worker of a role for a request, were it sent there now."""

    wait_ms: float  # until its prompt can begin
    compute_ms: float  # the passes for the part of the prompt that is not cached there
    new_tokens: int  # of the prompt, not cached there
    decoding: int  # sequences that decode there and would be held up


class HandOver(Protocol):
    """The KV of one request on its way from a prefill worker to a decode worker. Use as an async context manager:
    leaving gives every lease and row back, whatever became of the request."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def published(self) -> None:
        """Returns when a part of the prompt's KV is readable; never, if the prefill fails first."""

    def begin(self, decode: Placement) -> None:
        """The decode worker starts to read what is published, and goes on as more comes."""

    async def complete(self) -> bool:
        """Wait until the decode worker has all it could get, bounded in time, before it is sent the request. False
        where it got nothing that can be trusted: it will compute the prompt itself. Raises only where that worker was
        lost."""

    def give(self, request: Request) -> Request:
        """The request as the decode worker is to be sent it: with a `kv_handle` where engines move KV themselves and
        it has not been given before; it is used up then."""

    def take_back(self) -> None:
        """What was given could not be taken: the KV is not needed any more."""


class Cluster(Protocol):
    """What a mode is given: the workers, seen through the router."""

    async def place(self, request: Request, role: Role, moves_kv: bool = False) -> Placement:
        """Choose a worker and book the request on it before returning. Waits in the router's bounded queue while no
        worker has room; raises `trtserve.server.errors.Overloaded` when that is full or no worker is there.

        moves_kv: the prompt's KV comes from another worker, so that blocks which are lacking cost their transfer only.
        """

    async def run(
        self, placement: Placement, request: Request, sink: OutputSink, hand_over: HandOver | None = None
    ) -> Finish:
        """Submit and wait for the end; tokens go to `sink` meanwhile. Cancelling the call cancels the request on the
        worker. Raises `trtserve.server.errors.WorkerLost` when the worker dies. With `hand_over` the worker keeps the
        prompt's KV readable for it."""

    def hand_over(self, request: Request) -> HandOver:
        """For a request that is prefilled on one worker and decoded on another."""

    def predict(self, request: Request, role: Role) -> Prediction | None:
        """None where no worker of the role is ready."""

    def transfer_ms(self, num_tokens: int) -> float:
        """How long moving the KV of so many tokens takes, as learnt from the moves so far."""

    def count(self, event: str) -> None:
        """Count a decision or a fall-back of the mode, by a name of few different ones, for the metrics."""

    def note(self, request_id: RequestId, **why: str | float) -> None:
        """Say why the mode decided something about a request, for whoever asked to have it explained."""

    def stop(self, request_id: RequestId) -> None:
        """The text of a running request has met a stop string: its `run` returns now, with FinishReason.STOP, and the
        worker is told to cancel it. Nothing happens if it does not run any more."""


class WorkerFailure(Exception):
    """Base of what `Cluster.run` raises when the worker was lost, so that a mode can go on elsewhere."""


class Mode(Protocol):
    """How a request is taken through its phases; never touches a token. Made by the hook `make_mode`."""

    @property
    def roles(self) -> Mapping[Role, int]:
        """How many workers of each role to start."""

    async def run(self, request: Request, sink: OutputSink, cluster: Cluster) -> Finish:
        """Take one sequence to its one end; its tokens have gone to `sink` by then. On the event loop, once for each
        sequence. Cancelled when the client leaves or its time is over, so bookings and hand-overs are given back by
        `with`. What it raises ends the request: errors of `Cluster`'s methods are told to the client as they are."""


@dataclass(frozen=True, slots=True)
class ModeConfig:
    """The worker counts of the settings."""

    workers: int
    prefill_workers: int
    decode_workers: int
    disagg_policy: str = "auto"  # always, never or auto: whether prompts are computed on prefill workers


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """One worker process to start. `environment` is complete: nothing is inherited."""

    worker_id: WorkerId
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    log_path: str  # stdout and stderr go here


class WorkerProcess(Protocol):
    """A started worker. Modelled on asyncio's subprocess."""

    @property
    def pid(self) -> int:
        """Of the process that leads the group."""

    async def wait(self) -> int:
        """The exit code; negative for a signal."""

    def signal(self, signal_number: int) -> None:
        """Send to the process's whole group; nothing happens if it has ended."""


class Launcher(Protocol):
    """Starts worker processes somewhere. Made by the hook `make_launcher`."""

    async def start(self, spec: LaunchSpec) -> WorkerProcess:
        """Start it in its own process group; raises OSError if it cannot be started."""
