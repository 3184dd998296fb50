"""KV on its way between workers, in virtual time: what is published when, how long it travels, and where it ends up.

As in the server (`server/hand_over.py` and the workers' end of it): a prompt of several passes is published pass by
pass, another one as a whole with its first token; the decode worker reads the blocks that it lacks; its cache has them
when all are there. A pair of workers moves one thing after another, each at the full bandwidth. Leases do not expire,
rows never run out, and copying between cache and rows takes no time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from trtserve.plugins.api import BlockHash, Placement, Request, WorkerId
from trtserve.server.replay.worker import VirtualWorker

KV_BYTES_PER_TOKEN = 131_072
"""Of Llama 3.1 8B in 16 bits: 32 layers, keys and values, 8 heads of 128."""


@dataclass(frozen=True, slots=True)
class TransferModel:
    """A move takes latency_s + bytes / bytes_per_s."""

    bytes_per_s: float = 25e9  # a 200 Gb/s link
    latency_s: float = 0.002
    bytes_per_token: float = KV_BYTES_PER_TOKEN

    def duration_s(self, num_tokens: int) -> float:
        return self.latency_s + num_tokens * self.bytes_per_token / self.bytes_per_s


@dataclass(slots=True)
class Links:
    """When each pair of workers is free again."""

    model: TransferModel
    moved_tokens: int = 0
    _free_s: dict[tuple[WorkerId, WorkerId], float] = field(default_factory=dict)

    def move(self, source: WorkerId, target: WorkerId, num_tokens: int, now_s: float) -> float:
        """Begin a move as soon as the pair is free; when it is over."""
        ends_s = max(now_s, self._free_s.get((source, target), 0.0)) + self.model.duration_s(num_tokens)
        self._free_s[source, target] = ends_s
        self.moved_tokens += num_tokens
        return ends_s


class ReplayedMoves(Protocol):
    """What a hand-over needs of the cluster."""

    links: Links

    def worker(self, worker_id: WorkerId) -> VirtualWorker: ...

    def entered(self, hand_over: ReplayHandOver) -> None: ...

    def left(self, hand_over: ReplayHandOver) -> None: ...

    def moved(self, num_tokens: int, duration_s: float) -> None:
        """A hand-over's reads took so long in all."""


class ReplayHandOver:
    """Implements `HandOver`."""

    def __init__(
        self,
        request: Request,
        hashes: Sequence[BlockHash],
        block_size: int,
        max_num_tokens: int,
        moves: ReplayedMoves,
        clock: Callable[[], float],
    ) -> None:
        """hashes: of the prompt's full blocks. max_num_tokens: of a pass; longer prompts are published as they grow."""
        self.request = request
        self.source: VirtualWorker | None = None
        self._hashes = hashes
        self._block_size = block_size
        self._grows = len(request.prompt) > max_num_tokens
        self._moves = moves
        self._clock = clock
        self._num_published = 0
        self._is_final = False
        self._published = asyncio.Event()
        self._target: VirtualWorker | None = None
        self._next_block = 0  # that the target has neither stored nor asked for
        self._reads_end_s = 0.0
        self._read_tokens = 0
        self._read_s = 0.0

    async def __aenter__(self) -> Self:
        self._moves.entered(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._moves.left(self)

    # -------------------------------------------------------------- the prefill worker's side

    def expect(self, source: VirtualWorker) -> None:
        """The prompt is computed there."""
        self.source = source

    def pass_ended(self, has_first_token: bool) -> None:
        """A pass of the source is over, at the clock's time."""
        if self._is_final or self.source is None or not (has_first_token or self._grows):
            return
        self._is_final = has_first_token
        self._num_published = max(self._num_published, self.source.stored_blocks(self._hashes))
        if self._num_published or has_first_token:
            self._published.set()
            self._read()

    async def published(self) -> None:
        await self._published.wait()

    # -------------------------------------------------------------- the decode worker's side

    def begin(self, decode: Placement) -> None:
        target = self._moves.worker(decode.worker_id)
        if target is self._target:
            return
        self._target = target
        self._next_block = target.stored_blocks(self._hashes)
        self._read()

    async def complete(self) -> bool:
        if self._target is None or self.source is None or not self._is_final:
            return False
        loop = asyncio.get_running_loop()
        if self._reads_end_s > loop.time():
            arrived = loop.create_future()
            loop.call_at(self._reads_end_s, arrived.set_result, None)
            await arrived
        if self._read_tokens:
            self._moves.moved(self._read_tokens, self._read_s)
            self._target.store(self._hashes[: self._next_block], self.request.prompt)
        return True

    def give(self, request: Request) -> Request:
        return request  # no engine of the replay moves KV itself

    def take_back(self) -> None: ...

    def _read(self) -> None:
        """Ask for what is published and lacking."""
        if self._target is None or self.source is None or self._num_published <= self._next_block:
            return
        num_tokens = (self._num_published - self._next_block) * self._block_size
        now_s = self._clock()
        self._reads_end_s = self._moves.links.move(self.source.worker_id, self._target.worker_id, num_tokens, now_s)
        self._read_s += self._reads_end_s - now_s
        self._read_tokens += num_tokens
        self._next_block = self._num_published
