"""A first hand-over between each prefill and each decode worker whose engines move KV themselves.

Their connections are made by the first transfer, which is slow, and may fail where both sides are well: a worker gets
no requests until it has tried each pair that it makes with those that are ready.
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import Callable, Sequence
from itertools import count
from typing import Protocol

from msgspec.structs import replace

from trtserve.plugins.api import (
    Finish,
    FinishReason,
    Request,
    RequestId,
    Role,
    SamplingParams,
    TokenLogprob,
    WorkerFailure,
)
from trtserve.server.workers.client import WorkerClient, WorkerState

logger = logging.getLogger(__name__)

_FIRST_REQUEST_ID = 1 << 61  # beyond the server's own, and below those of the workers' warm-ups
_PROMPT_TOKENS = 40
_TOKENS = 3
_PAIR_S = 60.0


class PairFailed(Exception):
    """A pair cannot hand over; the text says why."""


class Drains(Protocol):
    """Who keeps requests from a worker (the cluster)."""

    def drain(self, client: WorkerClient, is_draining: bool) -> None: ...

    def count(self, event: str) -> None: ...


class PairWarmUp:
    """`begin` for each worker that has become ready; `run` warms one after the other, for as long as it lives.

    limit_s: seconds for one pair. changed: called when a worker takes requests.
    """

    def __init__(
        self,
        workers: Callable[[], Sequence[WorkerClient]],
        drains: Drains,
        changed: Callable[[], None],
        limit_s: float = _PAIR_S,
    ) -> None:
        self._workers = workers
        self._drains = drains
        self._changed = changed
        self._limit_s = limit_s
        self._ids = count(_FIRST_REQUEST_ID)
        self._waiting: asyncio.Queue[tuple[WorkerClient, int]] = (
            asyncio.Queue()
        )  # holds each worker a few times at most
        self._begun: dict[WorkerClient, int] = {}  # the number of its last `begin`

    def begin(self, client: WorkerClient) -> None:
        """Keep requests from it until its pairs are warm. One whose engine moves no KV takes them at once."""
        if client.moves_kv and client.role is not Role.AGG:
            client.is_warming = True
            self._drains.drain(client, True)
            number = self._begun[client] = self._begun.get(client, 0) + 1
            self._waiting.put_nowait((client, number))

    async def run(self) -> None:
        while True:
            client, number = await self._waiting.get()
            for prefill, decode in self._pairs(client):
                await self._try(prefill, decode)
            if number != self._begun[client]:
                continue  # its process was replaced meanwhile, and the new one's turn comes
            client.is_warming = False
            self._drains.drain(client, False)
            self._changed()

    def _pairs(self, client: WorkerClient) -> list[tuple[WorkerClient, WorkerClient]]:
        others = [other for other in self._workers() if _is_warm(other)]
        if client.role is Role.PREFILL:
            return [(client, other) for other in others if other.role is Role.DECODE]
        return [(other, client) for other in others if other.role is Role.PREFILL]

    async def _try(self, prefill: WorkerClient, decode: WorkerClient) -> None:
        """A pair that fails serves all the same: prompts are computed on its decode worker where it fails again."""
        for number in range(max(prefill.num_ranks, decode.num_ranks)):
            try:
                async with asyncio.timeout(self._limit_s):
                    await self._hand_over(prefill, decode, number)
            except TimeoutError:
                problem = f"it took longer than {self._limit_s:.0f} s"
            except (PairFailed, WorkerFailure) as error:
                problem = str(error)
            else:
                logger.info("%s: hands KV over to %s", prefill.worker_id, decode.worker_id)
                continue
            self._drains.count("pair_failed")
            logger.warning("no KV could be handed over from %s to %s: %s", prefill.worker_id, decode.worker_id, problem)

    async def _hand_over(self, prefill: WorkerClient, decode: WorkerClient, number: int) -> None:
        assert prefill.info is not None
        size = prefill.info.vocab_size
        # Special tokens lie at either end of a vocabulary; another prompt each time, so that all of it moves.
        middle = range(size // 4, max(size - size // 4, 1))
        request_id = RequestId(next(self._ids))
        tokens = [middle[(request_id * 7919 + place * 104_729) % len(middle)] for place in range(_PROMPT_TOKENS)]
        prompt = array("i", tokens[: max(1, min(len(tokens), prefill.info.max_seq_len - _TOKENS))])
        sampling = SamplingParams(max_tokens=_TOKENS, temperature=0.0, ignore_eos=True)
        request = Request(request_id, prompt, sampling, rank=_rank(prefill, number))
        try:
            sink = _Tokens()
            first = await prefill.run(replace(request, sampling=replace(sampling, max_tokens=1)), sink, keep_kv=True)
            _check(first, prefill)
            if first.kv_handle is None or not sink.tokens:
                raise PairFailed(f"{prefill.worker_id} computed a prompt and kept no KV of it")
            rest = replace(sampling, max_tokens=_TOKENS - len(sink.tokens))
            going_on = Request(
                request_id,
                prompt + sink.tokens,
                rest,
                num_resumed=len(sink.tokens),
                kv_handle=first.kv_handle,
                rank=_rank(decode, number),
            )
            _check(await decode.run(going_on, _Tokens()), decode)
        finally:
            prefill.let_go_of_kv(request_id)


class _Tokens:
    """An OutputSink that keeps the tokens."""

    def __init__(self) -> None:
        self.tokens = array("i")

    def push(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None) -> None:
        self.tokens.extend(token_ids)

    def cached(self, num_tokens: int) -> None: ...


def _is_warm(client: WorkerClient) -> bool:
    return client.state is WorkerState.READY and client.moves_kv and not client.is_warming


def _rank(client: WorkerClient, number: int) -> int | None:
    return number % client.num_ranks if client.num_ranks > 1 else None


def _check(finish: Finish, client: WorkerClient) -> None:
    if finish.reason is not FinishReason.LENGTH:
        raise PairFailed(f"{client.worker_id} ended its part with {finish.reason}: {finish.error}")
