"""Requests on their way through a running `LLM`: one task each, from submission to the end.

    plain                        generate, read until it has ended
    prefill of a hand-over       context phase, read once; its KV stays there until the decode's side has taken it
    decode of a hand-over        generation phase: the same prompt, and what the prefill left behind

A context phase and a generation phase whose KV is still under way are never aborted: that has leaked KV blocks and
crashed executors in every version so far. They end by themselves; `_reap` bounds how long that is believed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from trtserve.plugins.api import FinishReason, KVHandle, Output, Request, RequestId, RequestRefused
from trtserve.plugins.engines.tensorrt_llm import hand_over
from trtserve.plugins.engines.tensorrt_llm.library import Library
from trtserve.plugins.engines.tensorrt_llm.repetition import FirstTokens
from trtserve.plugins.engines.tensorrt_llm.results import ResultNotUnderstood, ResultReader
from trtserve.plugins.engines.tensorrt_llm.salts import Salts
from trtserve.plugins.engines.tensorrt_llm.sampling_objects import SamplingObjects
from trtserve.plugins.engines.tensorrt_llm.stats import LoadBook
from trtserve.plugins.engines.tensorrt_llm.steps import StepReport

logger = logging.getLogger(__name__)

_REAP_GRACE_S = 30.0


class TransferHung(Exception):
    """A KV transfer did not end within its own deadline, nor when it was aborted: the executor is stuck."""


@dataclass(slots=True)
class _Live:
    request: Request
    is_cancelled: bool = False
    result: Any = None  # TensorRT-LLM's, once submitted
    is_moving: bool = False  # its KV is, or may be, under way
    reaper: asyncio.TimerHandle | None = None
    has_ended: bool = False  # its last output was told


class Generation:
    """Lives on the event loop that reads the results. The owner keeps the tasks that `run` is the body of.

    books: one for each attention-DP rank. transfer_s: by when TensorRT-LLM itself ends a transfer.
    """

    def __init__(
        self,
        llm: Any,
        library: Library,
        sampling: SamplingObjects,
        report: StepReport,
        books: Sequence[LoadBook],
        salts: Salts,
        *,
        moves_kv: bool,
        transfer_s: float,
        max_seq_len: int,
    ) -> None:
        self._llm = llm
        self._library = library
        self._sampling = sampling
        self._report = report
        self._books = books
        self._salts = salts
        self._moves_kv = moves_kv
        self._transfer_s = transfer_s
        self._live: dict[RequestId, _Live] = {}
        self._first_tokens = FirstTokens(max_seq_len)
        self._submissions: list[asyncio.Event] = []
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Fails when the executor is found to be stuck."""

    def submission(self) -> asyncio.Event:
        """A new event, the caller's to clear, that each submission sets: what TensorRT-LLM stopped telling for want of
        work is told again then."""
        self._submissions.append(asyncio.Event())
        return self._submissions[-1]

    def add(self, request: Request) -> None:
        """Count it from now on; `run` follows."""
        live = self._live[request.id] = _Live(request)
        self._books[self._rank(live)].submitted(request)
        self._salts.submitted(request.prompt, request.cache_salt)

    def cancel(self, request_id: RequestId) -> None:
        """As Engine.cancel. One that has ended is ignored: KV that it left is freed by being taken, or by the
        transceiver's own timeout."""
        live = self._live.get(request_id)
        if live is None or live.is_cancelled:
            return
        live.is_cancelled = True
        if live.is_moving:
            self._bound(live)
        elif live.result is not None:
            live.result.abort()

    def _bound(self, live: _Live) -> None:
        """From now on, it may take as long as any transfer."""
        if live.reaper is None:
            delay_s = self._transfer_s + _REAP_GRACE_S
            live.reaper = asyncio.get_running_loop().call_later(delay_s, self._reap, live)

    def _reap(self, live: _Live, is_last_try: bool = False) -> None:
        """A request whose KV has been under way for longer than any transfer may take, or which goes on although it was
        cancelled."""
        if not live.is_moving and not live.is_cancelled:
            return
        if is_last_try:
            error = TransferHung(f"request {live.request.id} did not end, {_REAP_GRACE_S:.0f} s after it was aborted")
            if not self.broken.done():
                self.broken.set_exception(error)
            return
        logger.warning("request %d: its KV is still under way; aborting it", live.request.id)
        live.reaper = asyncio.get_running_loop().call_later(_REAP_GRACE_S, self._reap, live, True)
        live.result.abort()

    def close(self) -> None:
        """Abort what may be aborted; the tasks of `run` are the owner's to end."""
        for live in self._live.values():
            if live.result is not None and not live.is_moving:
                live.result.abort()

    async def run(self, request_id: RequestId) -> str | None:
        """Returns what was wrong with the request, if anything. Raises what means that the executor is broken."""
        live = self._live[request_id]
        reader = ResultReader(live.request)
        error: BaseException | None = None
        lost = False
        try:
            if not live.is_cancelled:
                await self._generate(live, reader)
        except (self._library.request_error, RequestRefused, ResultNotUnderstood) as problem:
            # A decode that never gave a token may still be computed from its prompt, here.
            error, lost = problem, live.request.kv_handle is not None and not reader.num_tokens
            if live.result is not None and not live.result.finished:
                live.result.abort()  # nobody reads on
        finally:
            del self._live[request_id]
            if live.reaper is not None:
                live.reaper.cancel()
            self._books[self._rank(live)].ended(request_id)
        if not live.has_ended:
            self._report.output(_end(live, error, lost), self._rank(live))
        return None if error is None else str(error)

    async def _generate(self, live: _Live, reader: ResultReader) -> None:
        request = live.request
        is_prefill = self._moves_kv and request.keeps_kv
        live.is_moving = is_prefill or request.kv_handle is not None
        try:
            live.result = self._submit(live, is_prefill)
        except ValueError as error:  # from a result it would mean that the executor is broken
            raise RequestRefused(str(error)) from error
        for submission in self._submissions:
            submission.set()
        if is_prefill:
            await live.result.aresult()
            self._read_prefill(live, reader)
        elif request.kv_handle is None:
            async for result in live.result:
                self._read(live, reader, result)
        else:
            await self._decode(live, reader)

    # -------------------------------------------------------------- submission

    def _submit(self, live: _Live, is_prefill: bool) -> Any:
        request, keywords = live.request, self._library.generate_keywords
        given: dict[str, Any] = {"sampling_params": self._sampling.make(request), "streaming": not is_prefill}
        if request.cache_salt:
            if "cache_salt" not in keywords:
                raise RequestRefused(f"TensorRT-LLM {self._library.version} cannot keep caches apart by cache_salt.")
            given["cache_salt"] = request.cache_salt
        disaggregated = self._disaggregated(request, is_prefill)
        if disaggregated is not None:
            given["disaggregated_params"] = disaggregated
        if request.rank is not None and len(self._books) > 1:
            given["scheduling_params"] = self._scheduling(request.rank)
        prompt = request.prompt
        if request.kv_handle is not None:
            if not 0 < request.num_resumed < len(prompt):
                raise RequestRefused("KV was handed over without the tokens of its prefill.")
            prompt = prompt[: len(prompt) - request.num_resumed]
        return self._llm.generate_async({"prompt_token_ids": prompt.tolist()}, **given)

    def _rank(self, live: _Live) -> int:
        """Of its book and its reports."""
        rank = live.request.rank or 0
        return rank if 0 <= rank < len(self._books) else 0

    def _scheduling(self, rank: int) -> Any:
        make, fields = self._library.scheduling_params, self._library.scheduling_fields
        if make is None or not 0 <= rank < len(self._books):
            raise RequestRefused(f"There is no attention-DP rank {rank} that could be chosen here.")
        strictly = {"attention_dp_relax": False} if "attention_dp_relax" in fields else {}
        return make(attention_dp_rank=rank, **strictly)

    def _disaggregated(self, request: Request, is_prefill: bool) -> Any:
        make = self._library.disaggregated_params
        if not is_prefill and request.kv_handle is None:
            return None
        if make is None or not self._moves_kv:
            raise RequestRefused("This engine was not set up to take over KV.")
        if is_prefill:
            return make(**hand_over.context_keywords())
        assert request.kv_handle is not None
        return make(**hand_over.generation_keywords(request.kv_handle, self._library.disaggregated_fields))

    # -------------------------------------------------------------- results

    def _read(self, live: _Live, reader: ResultReader, result: Any) -> None:
        output = reader.read(result)
        if output is None:
            return
        if output.finish_reason is not None:
            passes = int(getattr(result, "decoding_iter", 0) or 0)
            speculation = self._books[self._rank(live)].speculated(reader.num_tokens, passes)
            output = replace(output, speculation=speculation)
        self._tell(live, reader, output)

    def _tell(self, live: _Live, reader: ResultReader, output: Output) -> None:
        if output.finish_reason is FinishReason.CANCELLED and not live.is_cancelled:
            text = "The engine gave this request up."  # a transfer that took too long, for one
            output = replace(output, finish_reason=FinishReason.ERROR, error=text)
        if output.finish_reason is FinishReason.ERROR and live.request.kv_handle is not None:
            output = replace(output, kv_lost=not reader.num_tokens)
        rank = self._rank(live)
        self._books[rank].generated(live.request.id, len(output.token_ids), output.cached_tokens)
        self._report.output(output, rank)
        live.has_ended = output.finish_reason is not None

    def _read_prefill(self, live: _Live, reader: ResultReader) -> None:
        output = reader.read(live.result)
        assert output is not None, "a result that has ended gives an output"
        live.is_moving = False
        if live.is_cancelled:
            output = replace(output, token_ids=(), logprobs=None, finish_reason=FinishReason.CANCELLED)
        elif output.finish_reason is FinishReason.LENGTH:
            params = live.result.outputs[0].disaggregated_params
            output = replace(output, kv_handle=None if params is None else self._handle(params))
        self._tell(live, reader, output)

    def _handle(self, params: Any) -> KVHandle:
        try:
            return hand_over.handle_of(params)
        except ValueError as error:
            raise ResultNotUnderstood(str(error)) from error

    async def _decode(self, live: _Live, reader: ResultReader) -> None:
        """The results of a generation phase, without the prefill's tokens where they are repeated."""
        self._bound(live)
        async for result in live.result:
            output = result.outputs[0]
            if live.is_moving and output.token_ids:
                reader.num_skipped = self._first_tokens.num_repeated(live.request, output.token_ids)
            if live.is_moving and (len(output.token_ids) > reader.num_skipped or result.finished):
                live.is_moving = False
                if live.is_cancelled and not result.finished:
                    live.result.abort()
            if not live.is_moving:
                self._read(live, reader, result)
        self._first_tokens.learn(live.request, live.result.outputs[0])


def _end(live: _Live, error: BaseException | None, lost: bool) -> Output:
    if live.is_cancelled:
        return Output(live.request.id, finish_reason=FinishReason.CANCELLED)
    text = str(error) if error is not None else "The engine ended this request without a result."
    return Output(
        live.request.id,
        finish_reason=FinishReason.ERROR,
        error=text,
        kv_lost=lost,
        is_refused=isinstance(error, RequestRefused),
    )
