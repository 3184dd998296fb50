"""TensorRT-LLM's PyTorch-backend `LLM` as an engine.

The LLM object, its results and its side channels belong to one thread with an event loop of its own; the worker's other
threads hand requests over to it. TensorRT-LLM is imported on that thread, so in the worker process only.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future

from trtserve.plugins.api import EngineConfig, EngineInfo, EngineSink, Request, RequestId, WorkerLoad
from trtserve.plugins.engines.tensorrt_llm.executor import Executor, load_executor
from trtserve.plugins.engines.tensorrt_llm.serving import Serving

logger = logging.getLogger(__name__)

_CLOSE_S = 30.0


class TensorRTLLMEngine:
    """Implements `Engine`. Not on `Driver`, whose engines are stepped: this one steps itself."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._serving: Serving | None = None
        self._closing: asyncio.Event | None = None
        self._is_closed = False

    def start(self, sink: EngineSink) -> EngineInfo:
        if self._thread is not None or self._is_closed:
            raise RuntimeError("An engine starts once and never after close: make a new one instead.")
        started: Future[EngineInfo] = Future()
        self._thread = threading.Thread(target=self._run, args=(sink, started), name="tensorrt-llm", daemon=True)
        self._thread.start()
        return started.result()

    def submit(self, request: Request) -> None:
        serving = self._serving
        if serving is None or self._is_closed:
            raise RuntimeError(f"Request {request.id} was submitted to an engine that is not running: start it first.")
        self._call(lambda: serving.submit(request))

    def cancel(self, request_id: RequestId) -> None:
        serving = self._serving
        if serving is not None:
            self._call(lambda: serving.cancel(request_id))

    def stats(self) -> WorkerLoad:
        return WorkerLoad() if self._serving is None else self._serving.load()

    def close(self) -> None:
        """Takes half a minute at most; an executor that has not ended by then ends with the process."""
        self._is_closed = True
        self._call(lambda: None if self._closing is None else self._closing.set())
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return
        thread.join(_CLOSE_S)
        if thread.is_alive():
            logger.warning("TensorRT-LLM did not shut down within %.0f s", _CLOSE_S)

    # -------------------------------------------------------------- the engine's own thread

    def _call(self, function: Callable[[], None]) -> None:
        """Run it on the loop, in the order of the calls; nothing happens where the loop has ended."""
        loop = self._loop
        if loop is None:
            return
        try:
            loop.call_soon_threadsafe(function)
        except RuntimeError:  # closed meanwhile: what ran there has ended
            logger.debug("a call came after the engine's end")

    def _run(self, sink: EngineSink, started: Future[EngineInfo]) -> None:
        executor: Executor | None = None
        try:
            # Outside of any loop, as TensorRT-LLM's own server does it; its queues find theirs with the first request.
            executor = load_executor(self._config, sink.progress)
            asyncio.run(self._serve(executor, sink, started))
        except BaseException as error:
            self._failed(_first(error), sink, started)
        finally:
            if executor is not None:
                executor.shutdown()

    async def _serve(self, executor: Executor, sink: EngineSink, started: Future[EngineInfo]) -> None:
        self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        async with asyncio.TaskGroup() as group:
            serving = Serving(executor, sink, group)
            info = await serving.warm_up(sink.progress)
            self._serving = serving
            started.set_result(info)
            group.create_task(serving.broken())
            if not self._is_closed:
                await self._closing.wait()
            serving.close()
            raise _Closed

    def _failed(self, error: BaseException, sink: EngineSink, started: Future[EngineInfo]) -> None:
        if not started.done():
            started.set_exception(error)
        elif not self._is_closed:
            sink.fail(error)


class _Closed(Exception):
    """Ends the task group with all that runs in it."""


def _first(error: BaseException) -> BaseException:
    """The one that the others followed from."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
