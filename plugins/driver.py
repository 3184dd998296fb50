"""Makes an `Engine` out of any `StepEngine`: one thread of its own makes every call to it.

What other threads want goes through one inbox, in order, so a cancel can never overtake the submit it belongs to, and
what a call did is there for a request submitted after it. The inbox has no bound of its own: the server books at most
`max_num_seqs` requests a worker plus what its queue admits, an entry is a reference to a request that exists anyway,
and whoever makes calls waits for their futures.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from trtserve.plugins.api import (
    EngineInfo,
    EngineSink,
    FinishReason,
    Output,
    Request,
    RequestId,
    RequestRefused,
    StepEngine,
    StepOutputs,
    WorkerLoad,
)

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class _Call(Generic[_Result]):
    """A function to run between two steps, and where its result goes."""

    function: Callable[[], _Result]
    future: Future[_Result]

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self.function()
        except BaseException as error:
            # Whatever it is belongs to whoever waits for the future, and to nobody else.
            self.future.set_exception(error)
        else:
            self.future.set_result(result)

    def refuse(self) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(
                RuntimeError("The engine is not running, so nothing can be called on its thread: start it first.")
            )


_Message = Request | RequestId | _Call[Any] | None


class Driver:
    """An `Engine` around a `StepEngine`, which it owns: it starts, steps and closes it, all on the driver's thread.

    `interrupt`, where given, is called by the closing thread and makes a step that is under way return soon; without
    it a step that takes longer than `close_timeout_s` is left behind on its (daemon) thread and what it gives is
    dropped.
    """

    def __init__(
        self, engine: StepEngine, interrupt: Callable[[], None] | None = None, close_timeout_s: float = 5.0
    ) -> None:
        self._engine = engine
        self._interrupt = interrupt
        self._close_timeout_s = close_timeout_s
        self._inbox: SimpleQueue[_Message] = SimpleQueue()  # None wakes the thread and says nothing
        self._live: set[RequestId] = set()  # added, not ended and not aborted; the driver thread's
        self._load = WorkerLoad()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._has_ended = False  # the thread takes nothing out of the inbox any more
        # Held while something is handed to the sink, so that close() can promise that nothing follows it. Reentrant:
        # a sink may answer `fail` by closing the engine.
        self._delivery = threading.RLock()

    @property
    def engine(self) -> StepEngine:
        """The engine inside, whose methods are for functions given to `call`."""
        return self._engine

    def start(self, sink: EngineSink) -> EngineInfo:
        """Start the thread and, on it, the engine; raises what the engine's start raised."""
        if self._thread is not None or self._is_closed:
            raise RuntimeError("An engine starts once and never after close: make a new one instead.")
        started: Future[EngineInfo] = Future()
        self._thread = threading.Thread(target=self._run, args=(sink, started), name="engine-driver", daemon=True)
        self._thread.start()
        return started.result()

    def submit(self, request: Request) -> None:
        if self._thread is None or self._is_closed:
            raise RuntimeError(f"Request {request.id} was submitted to an engine that is not running: start it first.")
        self._inbox.put(request)

    def cancel(self, request_id: RequestId) -> None:
        self._inbox.put(request_id)

    def call(self, function: Callable[[], _Result]) -> Future[_Result]:
        """Run `function` on the driver's thread between two steps: after every submit, cancel and call made before it,
        before those made after it, and also when the engine is idle. It must be quick, as no step is made meanwhile.

        What it raises is the future's exception and leaves the engine alone; a future that is cancelled in time is not
        run. The future fails with RuntimeError where the engine was not started, failed or was closed; by the end of
        `close` it has a result or an exception, unless its own function is under way and does not end.
        """
        call = _Call(function, Future[_Result]())
        if self._thread is None:
            call.refuse()
            return call.future
        self._inbox.put(call)
        # Either the thread finds the call when it empties the inbox at its end, or it had ended before this line.
        if self._has_ended or self._is_closed:
            self._refuse_calls()
        return call.future

    def stats(self) -> WorkerLoad:
        return self._load

    def close(self) -> None:
        """Stop the thread and close the engine; takes at most `close_timeout_s` on top of a sink call under way."""
        with self._delivery:
            self._is_closed = True
        self._inbox.put(None)
        if self._interrupt is not None:
            self._interrupt()
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return
        thread.join(self._close_timeout_s)
        if thread.is_alive():
            logger.warning("the engine's step did not end within %.1f s of close", self._close_timeout_s)
        self._refuse_calls()

    def _run(self, sink: EngineSink, started: Future[EngineInfo]) -> None:
        try:
            try:
                info = self._engine.start(sink.progress)
                self._load = self._engine.stats()
            except BaseException as error:
                started.set_exception(error)
                return
            started.set_result(info)
            self._loop(sink)
        except Exception as error:
            # An edge of the program: the engine is a plugin's code, and whatever it raised has to reach the worker.
            self._fail(sink, error)
        finally:
            self._close_engine()
            self._has_ended = True
            self._refuse_calls()

    def _loop(self, sink: EngineSink) -> None:
        while not self._is_closed:
            if not self._engine.has_work():
                self._take(self._inbox.get(), sink)
            while not self._inbox.empty():
                self._take(self._inbox.get(), sink)
            if not self._is_closed and self._engine.has_work():
                self._deliver(sink, self._engine.step())

    def _take(self, message: _Message, sink: EngineSink) -> None:
        if isinstance(message, _Call):
            self._run_call(message)
        elif self._is_closed or message is None:
            return
        elif isinstance(message, Request):
            self._add(message, sink)
        elif message in self._live:
            # From here on the engine reports the end by itself, so a second cancel finds nothing.
            self._live.discard(message)
            self._engine.abort(message)

    def _run_call(self, call: _Call[Any]) -> None:
        if self._is_closed:
            call.refuse()
        else:
            call.run()

    def _refuse_calls(self) -> None:
        """Empty the inbox, of no use any more, and tell everybody who waits for a call."""
        while True:
            try:
                message = self._inbox.get_nowait()
            except Empty:
                break
            if isinstance(message, _Call):
                message.refuse()
        self._inbox.put(None)  # in place of one that was to wake the thread

    def _add(self, request: Request, sink: EngineSink) -> None:
        try:
            self._engine.add(request)
        except RequestRefused as refusal:
            output = Output(request.id, finish_reason=FinishReason.ERROR, error=str(refusal), is_refused=True)
            self._deliver(sink, StepOutputs((output,), self._engine.stats()))
        else:
            self._live.add(request.id)

    def _deliver(self, sink: EngineSink, step: StepOutputs) -> None:
        for output in step.outputs:
            if output.finish_reason is not None:
                self._live.discard(output.request_id)
        self._load = step.load
        with self._delivery:
            if not self._is_closed:
                sink.push(step)

    def _fail(self, sink: EngineSink, error: Exception) -> None:
        logger.debug("the engine failed", exc_info=error)
        with self._delivery:
            if not self._is_closed:
                sink.fail(error)

    def _close_engine(self) -> None:
        try:
            self._engine.close()
        except Exception:
            logger.exception("closing the engine failed")
