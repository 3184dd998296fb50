"""POST /v1/chat/completions and /v1/completions: one request from its body to the last byte of its answer.

Both are plain ASGI applications, since Starlette's request and response objects cost more than the rest of a small
request. What differs between them is how prompts come from the body (`Prompts`) and how objects look (`Shape`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from trtserve.plugins.api import Request, TokenIds
from trtserve.server.api.asgi import Headers, Receive, Scope, Send
from trtserve.server.api.body import ClientGone, answer, cut_off, discard_body, read_body
from trtserve.server.api.choice import Choice, Emit
from trtserve.server.api.explanation import Explanation, is_wanted
from trtserve.server.api.hypercorn_path import find_path
from trtserve.server.api.parameters import GenerationParams, ignored_header, max_tokens_for, to_sampling_params
from trtserve.server.api.rendering import DONE, ChunkRenderer, Envelope, Shape, StreamEmitter, Usage, WholeAnswer
from trtserve.server.api.serving import Serving, request_id_of
from trtserve.server.api.stream import DisconnectWatch, EventStream, no_late_headers, open_stream
from trtserve.server.errors import Internal, Overloaded, ServeError, body
from trtserve.server.instruments import Counter
from trtserve.server.requests import LiveRequest
from trtserve.server.text.text_stream import TextStream

logger = logging.getLogger(__name__)


class Prepared(msgspec.Struct, frozen=True):
    """A parsed body with its prompts as tokens."""

    params: GenerationParams
    prompts: Sequence[TokenIds]
    shape: Shape


Prepare = Callable[[bytes, Serving], Awaitable[Prepared]]


class GenerationEndpoint:
    """An ASGI application for one path."""

    def __init__(self, serving: Serving, name: str, id_prefix: str, prepare: Prepare) -> None:
        """`name` labels the metrics; `prepare` turns a body into prompts."""
        self._serving = serving
        self._name = name
        self._id_prefix = id_prefix
        self._prepare = prepare
        self._ended: dict[int, Counter] = {}  # by status: looking a label up costs more than counting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started_s = time.monotonic()
        request_id = request_id_of(scope)
        headers = [(b"x-request-id", request_id.encode())]
        status = 499
        try:
            status = await self._guarded(scope, receive, send, request_id, headers)
        except ServeError as error:
            status = error.status
            if isinstance(error, ClientGone):
                self._serving.metrics.disconnects.inc()
            else:
                await answer_error(send, error, headers)
        finally:
            self._count(status, time.monotonic() - started_s)

    def _count(self, status: int, duration_s: float) -> None:
        metrics = self._serving.metrics
        ended = self._ended.get(status)
        if ended is None:
            ended = self._ended[status] = metrics.requests.labels(self._name, str(status))
        ended.inc()
        metrics.duration.observe(duration_s)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send, request_id: str, headers: Headers) -> int:
        """Turns everything that can go wrong into a ServeError; returns the status of an answer that was sent."""
        serving = self._serving
        try:
            await self._admit(scope, receive, send)
            with serving.live.enter(request_id) as live:
                try:
                    raw = await read_body(scope, receive, send, serving.limits.max_body_bytes)
                    async with DisconnectWatch(
                        receive, send, lambda: live.cancel(ClientGone("the client left"))
                    ) as watch:
                        explanation = Explanation(serving.cluster) if is_wanted(scope) else None
                        return await self._answer(raw, request_id, send, headers, live, watch, explanation)
                except asyncio.CancelledError:
                    raise _reason_of(live) from None
        except ServeError:
            raise
        except Exception as error:
            logger.exception("request %s failed", request_id)
            raise Internal() from error

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises what is wrong before the body is looked at."""
        serving = self._serving
        try:
            serving.keys.check(scope)
            serving.live.check_open()
        except ServeError as error:
            if isinstance(error, Overloaded):
                serving.metrics.rejections.labels(error.code).inc()
            await discard_body(receive, send, serving.limits.max_body_bytes)
            raise

    async def _answer(
        self,
        raw: bytes,
        request_id: str,
        send: Send,
        headers: Headers,
        live: LiveRequest,
        watch: DisconnectWatch,
        explanation: Explanation | None,
    ) -> int:
        prepared = await self._prepare(raw, self._serving)
        if prepared.params.ignored:
            names = ignored_header(prepared.params.ignored)
            logger.warning("request %s: ignored unknown parameters: %s", request_id, names)
            headers.append((b"x-trtserve-ignored-params", names.encode()))
        identifier = f"{self._id_prefix}{request_id}"
        envelope = Envelope.new(identifier, self._serving.model.name, prepared.params.service_tier)
        generation = Generation(self._serving, prepared, live, explanation)
        try:
            return await self._run(generation, envelope, send, headers, watch)
        finally:
            generation.release()

    async def _run(
        self, generation: Generation, envelope: Envelope, send: Send, headers: Headers, watch: DisconnectWatch
    ) -> int:
        prepared = generation.prepared
        if not prepared.params.stream:
            whole = WholeAnswer(envelope, prepared.shape)
            await generation.run(whole, _ignore_end)
            watch.stop()
            content = whole.body(generation.choices, generation.usage())
            await _answer_whole(send, content, [*headers, *generation.late_headers()], generation.live)
            return 200
        return await self._stream(envelope, generation, send, headers, watch)

    async def _stream(
        self, envelope: Envelope, generation: Generation, send: Send, headers: Headers, watch: DisconnectWatch
    ) -> int:
        params = generation.prepared.params
        usage_so_far = generation.usage if params.continuous_usage_stats else None
        renderer = ChunkRenderer(envelope, generation.prepared.shape, params.include_usage, usage_so_far)
        stream = open_stream(
            send,
            [*_SSE_HEADERS, *headers],
            generation.too_slow,
            self._serving.limits.max_buffered_bytes,
            generation.late_headers if generation.is_explained else no_late_headers,
        )
        async with stream:
            status, last = 200, [b""]
            try:
                await generation.run(StreamEmitter(renderer, stream), generation.end_writer(stream, renderer, last))
            except asyncio.CancelledError:
                status, last = _as_event(stream, _reason_of(generation.live))
            except ServeError as error:
                status, last = _as_event(stream, error)
            watch.stop()
            await stream.end(*last)
        return status


_SSE_HEADERS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

OnEnd = Callable[[Choice, bool], None]
"""Called for each choice that ended; the flag says that it was the last one."""


class Generation:
    """The sequences of one request: every choice of every prompt, run at once."""

    def __init__(
        self, serving: Serving, prepared: Prepared, live: LiveRequest, explanation: Explanation | None = None
    ) -> None:
        self.serving = serving
        self._explanation = explanation
        self.prepared = prepared
        self.live = live
        self.choices: list[Choice] = []
        self._arrival_s = time.monotonic()

    async def run(self, emit: Emit, on_end: OnEnd) -> None:
        """Run them all to their end. Raises a ServeError, having cancelled the others, when one fails."""
        requests = await self._requests()
        self.choices = [self._choice(index, request, emit) for index, request in enumerate(requests)]
        # In the next turn of the loop, when an idle worker has the request already and this process nothing to do.
        asyncio.get_running_loop().call_soon(emit.prepare, len(requests))
        try:
            if len(requests) == 1:
                await self._run_one(requests[0], self.choices[0], on_end)
            else:
                await self._run_many(requests, on_end)
        finally:
            self._over(requests)
            self._count()

    def _over(self, requests: Sequence[Request]) -> None:
        for request, choice in zip(requests, self.choices, strict=True):
            cancelled_s = self.live.cancelled_s if choice.finish_reason is None else None
            self.serving.cluster.over(request.id, cancelled_s, choice.num_tokens > 0)

    async def _run_many(self, requests: Sequence[Request], on_end: OnEnd) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for request, choice in zip(requests, self.choices, strict=True):
                    group.create_task(self._run_one(request, choice, on_end))
        except ExceptionGroup as failures:
            raise next(
                (error for error in failures.exceptions if isinstance(error, ServeError)), failures.exceptions[0]
            ) from failures

    async def _run_one(self, request: Request, choice: Choice, on_end: OnEnd) -> None:
        finish = await self.serving.mode.run(request, choice, self.serving.cluster)
        if finish.speculation is not None:
            drafted, accepted = finish.speculation
            self.serving.cluster.note(request.id, drafted_tokens=drafted, accepted_tokens=accepted)
        choice.end(finish)
        self.serving.metrics.finished[choice.finish_reason or ""].inc()
        on_end(choice, all(other.finish_reason is not None for other in self.choices))

    def end_writer(self, stream: EventStream, renderer: ChunkRenderer, last: list[bytes]) -> OnEnd:
        """Writes a choice's last event. The very last one, with what ends the stream, is left in `last` instead, to
        go out together with the end of the body."""

        def write(choice: Choice, is_last: bool) -> None:
            data = renderer.end(choice)
            if not is_last:
                stream.write(data)
                return
            usage = renderer.usage(self.usage()) if self.prepared.params.include_usage else b""
            last[0] = data + usage + DONE

        return write

    def release(self) -> None:
        """The request is over."""
        for choice in self.choices:
            choice.release()
        if self._explanation is not None:
            self._explanation.close()

    def too_slow(self) -> None:
        self.live.cancel(ClientGone("the client did not read its answer"))

    def usage(self) -> Usage:
        """Tokens so far."""
        n = self.prepared.params.n
        return Usage(
            sum(map(len, self.prepared.prompts)),
            sum(choice.num_tokens for choice in self.choices),
            sum(choice.cached_tokens for choice in self.choices[::n]),
        )

    @property
    def is_explained(self) -> bool:
        """Whether there are `late_headers`."""
        return self._explanation is not None

    def late_headers(self) -> Headers:
        """What is known of the answer only when it begins."""
        return [] if self._explanation is None else self._explanation.headers()

    async def _requests(self) -> list[Request]:
        params, model, live = self.prepared.params, self.serving.model, self.serving.live
        limits = self.serving.cluster.context_limits()
        requests = []
        for prompt in self.prepared.prompts:
            max_tokens = max_tokens_for(params, len(prompt), limits.max_seq_len, limits.max_prompt_tokens)
            hashes = await self.serving.cluster.hash_prompt(prompt, params.cache_salt)
            for index in range(params.n):
                sampling = to_sampling_params(params, model.defaults, model.vocab_size, max_tokens, index)
                requests.append(
                    Request(
                        live.new_sequence_id(),
                        prompt,
                        sampling,
                        model.eos_token_ids,
                        block_hashes=hashes,
                        cache_salt=params.cache_salt,
                        arrival_s=self._arrival_s,
                    )
                )
        if self._explanation is not None:
            for request in requests:
                self._explanation.watch(request.id)
        return requests

    def _choice(self, index: int, request: Request, emit: Emit) -> Choice:
        params = self.prepared.params
        end_token_ids = {*request.sampling.stop_token_ids}
        if not params.ignore_eos:
            end_token_ids.update(request.eos_token_ids)
        text = TextStream(
            self.serving.tokenizer,
            stops=params.stop,
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            end_token_ids=end_token_ids,
            prompt=request.prompt,
        )
        return Choice(
            index,
            text,
            self.serving.flusher,
            emit,
            stop=lambda: self.serving.cluster.stop(request.id),
            fail=self.live.cancel,
            stop_token_ids=params.stop_token_ids,
        )

    def _count(self) -> None:
        metrics, usage = self.serving.metrics, self.usage()
        metrics.prompt_tokens.inc(usage.prompt_tokens)
        metrics.cached_tokens.inc(usage.cached_tokens)
        metrics.generation_tokens.inc(usage.completion_tokens)
        for choice in self.choices:
            if choice.first_token_s:
                metrics.ttft.observe(choice.first_token_s - self._arrival_s)
            if choice.num_tokens > 1:
                metrics.tpot.observe((choice.last_token_s - choice.first_token_s) / (choice.num_tokens - 1))


def _ignore_end(choice: Choice, is_last: bool) -> None:
    pass


def _reason_of(live: LiveRequest) -> BaseException:
    """What a cancelled request's client is told; the cancellation itself where it came from outside."""
    if live.reason is None:
        return asyncio.CancelledError()
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()
    return live.reason


def _as_event(stream: EventStream, error: BaseException) -> tuple[int, list[bytes]]:
    """After the first byte an error is the last event; before it, it is the answer's status. Re-raises what is not
    for the stream."""
    if not isinstance(error, ServeError) or isinstance(error, ClientGone) or not stream.started:
        raise error
    return error.status, [b"data: " + body(error) + b"\n\n" + DONE]


async def _answer_whole(send: Send, content: bytes, headers: Headers, live: LiveRequest) -> None:
    """A large answer waits here for a client that does not read. Cancelled then, it can no longer become an error."""
    try:
        path = find_path(send)
        if path is not None:
            await path.whole([(b"content-type", b"application/json"), *headers], content)
        else:
            await answer(send, 200, content, headers=headers)
    except asyncio.CancelledError:
        reason = _reason_of(live)
        cut_off(send)
        if isinstance(reason, ServeError):
            raise ClientGone("the client did not read its answer") from None
        raise


async def answer_error(send: Send, error: ServeError, headers: Headers) -> None:
    extra = [(name.encode(), value.encode()) for name, value in error.headers.items()]
    await answer(send, error.status, body(error), headers=[*headers, *extra])
