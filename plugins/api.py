"""All that a plugin author needs: the data that crosses plugin borders and the contracts.

Nothing here imports anything of trtserve, so a plugin package can depend on this module alone. Hooks
(`trtserve.plugins.hooks`) make the objects described here by name. It is one file, longer than the others, because it
is the one page that an author reads: half of it is the contracts' text.

Token ids travel as `TokenIds`: an `array` of C ints (typecode ``"i"``, int32), which is compact, indexable and
gives its bytes away without a copy. Nobody changes one after it was handed over.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Any, NewType, Protocol, Self, TypeAlias, runtime_checkable

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


@dataclass(frozen=True, slots=True)
class SamplingParams:
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


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate. Immutable; `prompt` is shared, never copied, by whoever holds the request."""

    id: RequestId
    prompt: TokenIds  # int32[num_prompt_tokens], at least one token
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...] = ()  # end of sequence for this model
    block_hashes: tuple[BlockHash, ...] = ()  # of the prompt's full blocks; () where nobody asked for them
    cache_salt: str = ""  # keeps one tenant's prefix cache apart; part of every block hash
    arrival_s: float = 0.0  # monotonic clock of the server


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probabilities at one position, after temperature-free softmax of the penalised logits."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first


@dataclass(frozen=True, slots=True)
class KVHandle:
    """Where a finished prefill left its KV blocks: enough for a decode worker to pull them and to give them back."""

    lease_id: int
    worker_id: WorkerId
    incarnation: int
    num_tokens: int
    block_ids: tuple[int, ...]
    block_hashes: tuple[BlockHash, ...]
    layout: str  # fingerprint; both sides must have the same
    transfer: str
    descriptor: bytes = b""


@dataclass(frozen=True, slots=True)
class Output:
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
    kv_handle: KVHandle | None = None


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A full block whose KV can be reused from now on."""

    hash: BlockHash
    token_ids: TokenIds  # int32[block_size]


@dataclass(frozen=True, slots=True)
class KVStored:
    """`blocks` follow one another; the first one's parent is `parent` (None: the start of a sequence)."""

    parent: BlockHash | None
    blocks: tuple[StoredBlock, ...]


@dataclass(frozen=True, slots=True)
class KVRemoved:
    """These blocks were evicted (a block that a request merely let go of is still stored)."""

    hashes: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class KVCleared:
    """Nothing is stored any more."""


KVEvent: TypeAlias = KVStored | KVRemoved | KVCleared


@dataclass(frozen=True, slots=True)
class WorkerLoad:
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


@dataclass(frozen=True, slots=True)
class PassStats:
    """What one forward pass did, for the router's learnt speeds."""

    duration_s: float
    prefill_tokens: int  # new prompt tokens computed
    decode_sequences: int
    context_tokens: int  # KV tokens read by the decoding sequences


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """Everything one engine step has to say; the worker sends it as one message."""

    outputs: Sequence[Output]
    load: WorkerLoad
    events: Sequence[KVEvent] = ()
    stats: PassStats | None = None


# ------------------------------------------------------------------ engines


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How to build an engine; made from the settings in the worker process."""

    model_path: str  # a Hugging Face folder on this machine
    role: Role = Role.AGG
    dtype: str = "auto"  # auto, bfloat16, float16, float32
    device: str = "auto"  # auto, cpu, cuda
    block_size: int = 16  # tokens in a KV block
    num_blocks: int | None = None  # KV blocks; None: from kv_cache_gib
    kv_cache_gib: float | None = None  # None: the engine's default
    max_num_seqs: int = 64  # sequences running at once
    max_num_tokens: int = 512  # tokens in one pass, decodes included
    max_seq_len: int | None = None  # prompt + output; None: the model's own limit, bounded by the KV cache
    enable_prefix_caching: bool = True
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)  # checked by the engine's own options model


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine turned out to be, once started. Sent to the server in the worker's `Ready`."""

    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_tokens: int
    max_seq_len: int
    vocab_size: int
    publishes_kv_events: bool = True
    supports_logprobs: bool = True
    max_logprobs: int = 20


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

    Order of calls: `start` once, then `submit`, `cancel`, `stats` in any order from one thread, `close` once.
    None of them waits for a forward pass. Results come through the sink given to `start`.
    """

    def start(self, sink: EngineSink) -> EngineInfo:
        """Load the model and start generating. Blocks until requests can be submitted; raises if it cannot."""

    def submit(self, request: Request) -> None:
        """Queue a request. One that cannot be served ends with an `Output` of FinishReason.ERROR, not an exception."""

    def cancel(self, request_id: RequestId) -> None:
        """End a request early. Exactly one final `Output` follows (CANCELLED, or another reason if it came first);
        a request that has ended, or was never known, is ignored."""

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

    def stats(self) -> WorkerLoad: ...

    def close(self) -> None:
        """Free everything; idempotent."""


# ------------------------------------------------------------------ serving: modes, routing, launching


class OutputSink(Protocol):
    """Where a running request's tokens go; called on the event loop, must not block and must not raise."""

    def push(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None) -> None:
        """New tokens, in order. May be called many times before control returns to any task."""

    def cached(self, num_tokens: int) -> None:
        """How many prompt tokens came from a prefix cache; called once, before the first `push`."""


@dataclass(frozen=True, slots=True)
class Finish:
    """How a run ended, for the mode that awaited it."""

    reason: FinishReason
    stop_token_id: int | None = None
    error: str | None = None
    kv_handle: KVHandle | None = None


class Placement(Protocol):
    """A booking of one request on one worker. Use it as a context manager: leaving gives the booking back."""

    @property
    def worker_id(self) -> WorkerId: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Cluster(Protocol):
    """What a mode is given: the workers, seen through the router."""

    async def place(self, request: Request, role: Role) -> Placement:
        """Choose a worker and book the request on it before returning. Waits in the router's bounded queue while no
        worker has room; raises `trtserve.server.errors.Overloaded` when that is full or no worker is there."""

    async def run(self, placement: Placement, request: Request, sink: OutputSink) -> Finish:
        """Submit and wait for the end; tokens go to `sink` meanwhile. Cancelling the call cancels the request on the
        worker. Raises `trtserve.server.errors.WorkerLost` when the worker dies."""

    def stop(self, request_id: RequestId) -> None:
        """The text of a running request has met a stop string: its `run` returns now, with FinishReason.STOP, and the
        worker is told to cancel it. Nothing happens if it does not run any more."""


class Mode(Protocol):
    """How a request is taken through its phases; never touches a token. Made by the hook `make_mode`."""

    @property
    def roles(self) -> Mapping[Role, int]:
        """How many workers of each role to start."""

    async def run(self, request: Request, sink: OutputSink, cluster: Cluster) -> Finish: ...


@dataclass(frozen=True, slots=True)
class ModeConfig:
    """The worker counts of the settings."""

    workers: int
    prefill_workers: int
    decode_workers: int


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
    def pid(self) -> int: ...

    async def wait(self) -> int:
        """The exit code; negative for a signal."""

    def signal(self, signal_number: int) -> None:
        """Send to the process's whole group; nothing happens if it has ended."""


class Launcher(Protocol):
    """Starts worker processes somewhere. Made by the hook `make_launcher`."""

    async def start(self, spec: LaunchSpec) -> WorkerProcess:
        """Start it in its own process group; raises OSError if it cannot be started."""
