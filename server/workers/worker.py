"""The worker process's end of the wire: one thread owns the socket, the engine lives in threads of its own.

Life: hello → welcome → start the engine → one warm-up token → ready → submit/cancel in, steps out → shutdown. An
engine that breaks, a server that goes away or a refusal end the process with an exit code that says which.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from array import array
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import recv_monitor_message

from trtserve.plugins.api import (
    Engine,
    EngineInfo,
    FinishReason,
    Request,
    RequestId,
    SamplingParams,
    StepOutputs,
    WorkerLoad,
)
from trtserve.server.workers import wire

logger = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_REFUSED = 3
EXIT_SERVER_GONE = 4
EXIT_ENGINE_FAILED = 70

_HEARTBEAT_S = 1.0
_OUTBOX_LIMIT = 10_000
_WARM_UP_ID = RequestId(0)  # the server's ids begin at 1


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """Who this worker is and where its server listens."""

    hello: wire.Hello
    endpoint: str
    connect_timeout_s: float


class Outbox:
    """Encoded messages on their way from engine threads to the thread that owns the socket.

    Bounded: when the server does not read, the engine waits, for at most a minute, and then counts as broken.
    """

    def __init__(self) -> None:
        self._queue: queue.Queue[bytes] = queue.Queue(_OUTBOX_LIMIT)
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def put(self, data: bytes) -> None:
        self._queue.put(data, timeout=60)
        os.eventfd_write(self.descriptor, 1)

    def take(self) -> bytes | None:
        try:
            return self._queue.get_nowait()
        except queue.Empty:
            return None

    def reset(self) -> None:
        """Call before taking: later puts wake the poller again."""
        try:
            os.eventfd_read(self.descriptor)
        except BlockingIOError:
            pass


class WireSink:
    """The EngineSink of a worker: packs each step in the engine's thread."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self.steps = 0
        self.load = WorkerLoad()
        self._events = 0
        self.warm = threading.Event()
        self.error: str | None = None
        self.failed = threading.Event()

    def push(self, step: StepOutputs) -> None:
        if not self.warm.is_set():
            self._look_for_warm_up(step)
        self.steps += 1
        self.load = step.load
        message = wire.step_of(self.steps, self._events, step)
        self._events += len(step.events)
        self._outbox.put(wire.encode(message))

    def _look_for_warm_up(self, step: StepOutputs) -> None:
        for output in step.outputs:
            if output.request_id == _WARM_UP_ID and output.finish_reason is not None:
                if output.finish_reason is FinishReason.ERROR:
                    self.error = f"the warm-up request failed: {output.error}"
                self.warm.set()

    def fail(self, error: BaseException) -> None:
        if not self.failed.is_set():
            logger.error("the engine failed", exc_info=error)
            self.error = f"{type(error).__name__}: {error}"
            self.failed.set()
            self.warm.set()
            self._outbox.put(wire.encode(wire.Failed(self.error)))

    def progress(self, phase: str) -> None:
        logger.info("%s", phase)
        self._outbox.put(wire.encode(wire.Progress(phase)))


class Worker:
    """Runs the process; `run` returns the exit code. `make_engine` is called after the server said welcome."""

    def __init__(self, identity: WorkerIdentity, make_engine: Callable[[], Engine]) -> None:
        self._identity = identity
        self._make_engine = make_engine
        self._outbox = Outbox()
        self._sink = WireSink(self._outbox)
        self._engine: Engine | None = None
        self._starting: threading.Thread | None = None
        self._exit_code: int | None = None
        self._is_told_to_stop = False
        self._next_heartbeat_s = 0.0

    def stop(self) -> None:
        """Ask `run` to end; safe in a signal handler."""
        self._is_told_to_stop = True
        self._exit_code = EXIT_OK
        os.eventfd_write(self._outbox.descriptor, 1)

    def run(self) -> int:
        context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        hello = self._identity.hello
        socket.setsockopt(zmq.ROUTING_ID, f"{hello.worker_id}#{hello.incarnation:x}".encode())
        socket.setsockopt(zmq.LINGER, 1000)  # the last words get a second to leave
        socket.setsockopt(zmq.SNDHWM, _OUTBOX_LIMIT)
        socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 10_000)
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        socket.connect(self._identity.endpoint)
        socket.send(wire.encode(hello))
        try:
            return self._loop(socket, monitor)
        finally:
            self._close_engine()
            socket.disable_monitor()
            monitor.close()  # term waits for every socket of the context
            socket.close()
            context.term()

    # -------------------------------------------------------------- the socket's thread

    def _loop(self, socket: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> int:
        poller = zmq.Poller()
        for readable in (socket, monitor, self._outbox.descriptor):
            poller.register(readable, zmq.POLLIN)
        welcome_deadline_s = time.monotonic() + self._identity.connect_timeout_s
        while self._exit_code is None:
            ready = dict(poller.poll(int(_HEARTBEAT_S * 1000)))
            if monitor in ready and recv_monitor_message(monitor)["event"] == zmq.EVENT_DISCONNECTED:
                logger.warning("the server is gone")
                return EXIT_SERVER_GONE
            if socket in ready:
                self._receive(socket)
            if self._starting is None and time.monotonic() > welcome_deadline_s:
                logger.error("no answer from the server at %s", self._identity.endpoint)
                return EXIT_SERVER_GONE
            self._send(socket)
            if self._sink.failed.is_set():
                self._send(socket)
                return EXIT_ENGINE_FAILED
        if self._is_told_to_stop:
            # The server would otherwise learn of it from silence only, where no process of its own ended.
            with suppress(zmq.Again):
                socket.send(wire.encode(wire.Failed("it was told to end")), zmq.NOBLOCK)
        return self._exit_code

    def _send(self, socket: zmq.Socket[bytes]) -> None:
        self._outbox.reset()
        while (data := self._outbox.take()) is not None:
            socket.send(data)  # blocks when the server does not read; its parent-watch ends us if it is dead
        now_s = time.monotonic()
        if self._starting is not None and now_s >= self._next_heartbeat_s:
            self._next_heartbeat_s = now_s + _HEARTBEAT_S
            socket.send(wire.encode(wire.Heartbeat(self._sink.steps, self._sink.load)))

    def _receive(self, socket: zmq.Socket[bytes]) -> None:
        while True:
            try:
                message = wire.decode_to_worker(socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            self._handle(message)

    def _handle(self, message: wire.ToWorker) -> None:
        match message:
            case wire.Submit():
                self._running_engine().submit(wire.request_of(message))
            case wire.Cancel():
                self._running_engine().cancel(message.request_id)
            case wire.Welcome():
                self._starting = threading.Thread(target=self._start_engine, name="engine-start", daemon=True)
                self._starting.start()
            case wire.Refused():
                logger.error("refused by the server: %s", message.reason)
                self._exit_code = EXIT_REFUSED
            case wire.Shutdown():
                self._exit_code = EXIT_OK

    def _running_engine(self) -> Engine:
        if self._engine is None:
            raise wire.WireError("the server sent a request before this worker was ready")
        return self._engine

    # -------------------------------------------------------------- start and end of the engine

    def _start_engine(self) -> None:
        try:
            engine = self._make_engine()
            info = engine.start(self._sink)
            self._engine = engine
            self._warm_up(engine, info)
        except BaseException as error:
            self._sink.fail(error)
            return
        if not self._sink.failed.is_set():
            self._outbox.put(wire.encode(wire.Ready(info)))

    def _warm_up(self, engine: Engine, info: EngineInfo) -> None:
        """Ready means that a real token came out."""
        self._sink.progress("warming up")
        prompt = array("i", [token_id % info.vocab_size for token_id in range(1, 9)])
        sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        engine.submit(Request(_WARM_UP_ID, prompt, sampling))
        self._sink.warm.wait()  # the server ends a worker whose start takes too long
        if self._sink.error is not None:
            raise RuntimeError(self._sink.error)

    def _close_engine(self) -> None:
        if self._engine is not None and not self._sink.failed.is_set():
            self._engine.close()
