"""Disaggregated serving: a prefill worker computes the prompt, a decode worker takes its KV over and goes on.

The first token reaches the client when the prefill worker has it. Whatever fails on the way costs time, never an answer
that is wrong: the decode worker computes what it did not get. The ladder, counted rung by rung:

    another prefill worker → the prompt on the decode worker → (its loss) another decode worker → an error

A prompt may also be computed on the decode worker at once, where that is expected to be cheaper for all (`_is_local`).
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Any, TypeVar

from msgspec.structs import replace

from trtserve.plugins.api import (
    Cluster,
    Finish,
    FinishReason,
    HandOver,
    Mode,
    ModeConfig,
    OutputSink,
    Placement,
    Request,
    Role,
    TokenLogprob,
    WorkerFailure,
)
from trtserve.plugins.hooks import hookimpl

_Result = TypeVar("_Result")

PREFILL_ATTEMPTS = 2
DECODE_ATTEMPTS = 2

INTERFERENCE = 0.5
"""What a pass with a prompt on a decode worker costs each sequence that decodes there, against the prompt's own wait.
It counts one more than there are: a worker that is idle now will not stay so for the length of a prompt."""


class Kept:
    """The request's own sink, and a memory of the tokens that went through it: another worker can go on from them."""

    def __init__(self, sink: OutputSink) -> None:
        self.tokens = array("i")
        self._sink = sink
        self._has_cached = False

    def push(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None) -> None:
        self.tokens.extend(token_ids)
        self._sink.push(token_ids, logprobs)

    def cached(self, num_tokens: int) -> None:
        """Only the first worker's count is the client's: the others find what they were given."""
        if not self._has_cached:
            self._has_cached = True
            self._sink.cached(num_tokens)


class DisaggregatedMode:
    """A prefill and a decode worker for each request, or the decode worker alone where that is cheaper."""

    def __init__(self, config: ModeConfig) -> None:
        self._roles = {Role.PREFILL: config.prefill_workers, Role.DECODE: config.decode_workers}
        self._policy = config.disagg_policy

    @property
    def roles(self) -> Mapping[Role, int]:
        return self._roles

    async def run(self, request: Request, sink: OutputSink, cluster: Cluster) -> Finish:
        kept = Kept(sink)
        is_local = self._is_local(request, cluster)
        cluster.note(request.id, prefill="local" if is_local else "remote")
        if is_local:
            cluster.count("local_prefill")
            return await self._decode(request, kept, cluster)
        cluster.count("remote_prefill")
        async with cluster.hand_over(request) as kv:
            with ExitStack() as bookings:
                async with _owned(self._prefill(request, kept, cluster, kv)) as prefill:
                    early = await self._begin_early(prefill, request, cluster, kv, bookings)
                    finish = await prefill
                if finish is not None and (
                    finish.reason is not FinishReason.LENGTH or request.sampling.max_tokens == 1
                ):
                    return finish
                return await self._decode(request, kept, cluster, None if finish is None else kv, early)

    # -------------------------------------------------------------- where

    def _is_local(self, request: Request, cluster: Cluster) -> bool:
        """Whether the decode worker is to compute the prompt as well."""
        if self._policy != "auto":
            return self._policy == "never"
        there, here = cluster.predict(request, Role.PREFILL), cluster.predict(request, Role.DECODE)
        if there is None or here is None:
            return there is None  # without a decode worker, too, the error is `place`'s to raise
        local_ms = here.wait_ms + here.compute_ms * (1 + INTERFERENCE * (here.decoding + 1))
        remote_ms = there.wait_ms + there.compute_ms + cluster.transfer_ms(here.new_tokens)
        cluster.note(request.id, local_ms=local_ms, remote_ms=remote_ms)
        return local_ms <= remote_ms

    # -------------------------------------------------------------- the phases

    async def _prefill(self, request: Request, kept: Kept, cluster: Cluster, kv: HandOver) -> Finish | None:
        """The first token. None where no prefill worker could give it: the decode worker computes the prompt then."""
        if self._policy == "always" and cluster.predict(request, Role.PREFILL) is None:
            cluster.count("prefill_moved_to_decode")
            return None
        first = replace(request, sampling=replace(request.sampling, max_tokens=1))
        # What nobody is to go on with must not be kept: some engines free it by a time limit only.
        kept_for = kv if request.sampling.max_tokens > 1 else None
        for attempt in range(PREFILL_ATTEMPTS):
            try:
                with await cluster.place(first, Role.PREFILL) as placement:
                    return await cluster.run(placement, first, kept, kept_for)
            except WorkerFailure:
                if kept.tokens:
                    return Finish(FinishReason.LENGTH)
                if attempt + 1 == PREFILL_ATTEMPTS or cluster.predict(first, Role.PREFILL) is None:
                    cluster.count("prefill_moved_to_decode")
                    break
                cluster.count("prefill_retried")
        return None

    async def _begin_early(
        self,
        prefill: asyncio.Task[Finish | None],
        request: Request,
        cluster: Cluster,
        kv: HandOver,
        bookings: ExitStack,
    ) -> Placement | None:
        """While a long prompt is being computed, its decode worker reads the blocks that are done. None where the
        prompt was over before any part of it was published."""
        async with _owned(kv.published()) as published:
            await asyncio.wait({prefill, published}, return_when=asyncio.FIRST_COMPLETED)
        if prefill.done():
            return None
        placement = bookings.enter_context(await cluster.place(request, Role.DECODE, moves_kv=True))
        kv.begin(placement)
        return placement

    async def _decode(
        self,
        request: Request,
        kept: Kept,
        cluster: Cluster,
        kv: HandOver | None = None,
        placement: Placement | None = None,
    ) -> Finish:
        """The rest of the answer, on `placement` first, where one is given."""
        for attempt in range(DECODE_ATTEMPTS):
            if len(kept.tokens) >= request.sampling.max_tokens:
                break
            rest = resumed(request, kept.tokens)
            try:
                if placement is not None:
                    return await self._go_on(rest, kept, cluster, kv, placement)
                with await cluster.place(rest, Role.DECODE, moves_kv=kv is not None) as placed:
                    return await self._go_on(rest, kept, cluster, kv, placed)
            except WorkerFailure:
                if attempt + 1 == DECODE_ATTEMPTS:
                    cluster.count("decode_lost")
                    raise
                placement = None
                cluster.count("decode_retried")
        return Finish(FinishReason.LENGTH)

    async def _go_on(
        self, rest: Request, kept: Kept, cluster: Cluster, kv: HandOver | None, placement: Placement
    ) -> Finish:
        if kv is None:
            return await cluster.run(placement, rest, kept)
        kv.begin(placement)
        if not await kv.complete():
            cluster.count("transfer_failed")
        finish = await cluster.run(placement, kv.give(rest), kept)
        if not finish.kv_lost:
            return finish
        cluster.count("transfer_failed")
        kv.take_back()
        return await cluster.run(placement, rest, kept)


@asynccontextmanager
async def _owned(work: Coroutine[Any, Any, _Result]) -> AsyncIterator[asyncio.Task[_Result]]:
    """A task that does not outlive the block."""
    task = asyncio.get_running_loop().create_task(work)
    try:
        yield task
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


def resumed(request: Request, tokens: array[int]) -> Request:
    """The same request where these tokens of its answer are there already."""
    count = len(tokens)
    if not count:
        return request
    sampling = replace(
        request.sampling,
        max_tokens=request.sampling.max_tokens - count,
        min_tokens=max(0, request.sampling.min_tokens - count),
    )
    return replace(request, prompt=request.prompt + tokens, sampling=sampling, num_resumed=count)


@hookimpl
def make_mode(name: str, config: ModeConfig) -> Mode | None:
    return DisaggregatedMode(config) if name == "disagg" else None
