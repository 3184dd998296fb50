"""The worker process's end of the wire: one thread owns the socket, the engine lives in threads of its own.

Life: hello → welcome → start the engine → warm-up → ready → submit/cancel in, steps out → shutdown. An engine that
breaks, a server that goes away or a refusal end the process with an exit code that says which.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import recv_monitor_message

from trtserve.plugins.api import Engine
from trtserve.server.workers import wire
from trtserve.server.workers.kv_exchange import ExchangeOptions, KVExchange
from trtserve.server.workers.warm_up import WarmUp, WarmUpWatch
from trtserve.server.workers.wire_sink import OUTBOX_LIMIT, Outbox, WireSink
from trtserve.settings.errors import SettingsError

logger = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_REFUSED = 3
EXIT_SERVER_GONE = 4
EXIT_ENGINE_FAILED = 70

_HEARTBEAT_S = 1.0

_LEAST_PAUSE_S = 0.0003
"""What is said so soon after the last message waits for the rest of that time: steps that follow each other more
quickly than any GPU makes them, or come from several ranks at once, then cost the server one message."""

_POLLIN, _EVENTS = int(zmq.POLLIN), int(zmq.EVENTS)
_SERVER_SILENCE_MS = 30_000
"""A server that is silent for longer is gone. One that dies is noticed at once, by its parent-watch or the end of the
connection: this is for machines and networks that vanish. A server may be stopped or starved for some seconds, and
loading a model anew takes longer than waiting for it."""


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """Who this worker is and where its server listens."""

    hello: wire.Hello
    endpoint: str
    connect_timeout_s: float


class Worker:
    """Runs the process; `run` returns the exit code.

    `make_engine` is called after the server said welcome. warm_up_s: how long after its first token the engine may go
    on with the warm-up's probes (`warm_up.WarmUp`). kv: how it takes part in the KV hand-over; None if it does not.
    `settle` is called when all is loaded, before the server hears that the worker is ready.
    """

    def __init__(
        self,
        identity: WorkerIdentity,
        make_engine: Callable[[], Engine],
        warm_up_s: float = 10.0,
        kv: ExchangeOptions | None = None,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self._identity = identity
        self._make_engine = make_engine
        self._warm_up_s = warm_up_s
        self._settle = settle
        self._outbox = Outbox()
        self._watch = WarmUpWatch()
        # Nothing of the hand-over waits for room: it answers the server, which gets no answers while it does not read.
        self._kv = KVExchange(kv, lambda message: self._outbox.put_at_once(lambda: message))
        self._sink = WireSink(self._outbox, self._watch, self._kv.after_step)
        self._engine: Engine | None = None
        self._starting: threading.Thread | None = None
        self._exit_code: int | None = None
        self._is_told_to_stop = False
        self._next_heartbeat_s = 0.0
        self._sent_s = 0.0

    def stop(self) -> None:
        """Ask `run` to end; safe in a signal handler."""
        self._is_told_to_stop = True
        self._exit_code = EXIT_OK
        os.eventfd_write(self._outbox.descriptor, 1)

    def run(self) -> int:
        """The exit code. Raises SettingsError where the server's address cannot be one."""
        context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        hello = self._identity.hello
        socket.setsockopt(zmq.ROUTING_ID, f"{hello.worker_id}#{hello.incarnation:x}".encode())
        socket.setsockopt(zmq.LINGER, 1000)  # the last words get a second to leave
        socket.setsockopt(zmq.SNDHWM, OUTBOX_LIMIT)
        socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _SERVER_SILENCE_MS)
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        try:
            socket.connect(self._identity.endpoint)
        except zmq.ZMQError as error:
            context.destroy(linger=0)
            where = self._identity.endpoint
            raise SettingsError(f"--connect {where}: cannot be used: {zmq.strerror(error.errno or 0)}") from error
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
            if socket in ready or monitor in ready:
                self._receive(socket)  # before the monitor: a server's last word may be Shutdown
            if self._exit_code is None and monitor in ready and _says_disconnected(monitor):
                logger.warning("the server is gone")
                return EXIT_SERVER_GONE
            if self._starting is None and time.monotonic() > welcome_deadline_s:
                logger.error("no answer from the server at %s", self._identity.endpoint)
                return EXIT_SERVER_GONE
            if self._outbox.descriptor in ready:
                self._outbox.reset()  # only now: that nothing is there costs an exception, in the way of a request
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
        now_s = time.monotonic()
        if self._outbox:
            if now_s - self._sent_s < _LEAST_PAUSE_S:
                time.sleep(_LEAST_PAUSE_S - (now_s - self._sent_s))
            while (data := self._outbox.take()) is not None:
                socket.send(data)  # blocks when the server does not read; its parent-watch ends us if it is dead
            now_s = self._sent_s = time.monotonic()
        if self._starting is not None and now_s >= self._next_heartbeat_s:
            self._next_heartbeat_s = now_s + _HEARTBEAT_S
            socket.send(wire.encode(wire.Heartbeat(self._sink.steps, self._sink.load, self._kv.usage())))

    def _receive(self, socket: zmq.Socket[bytes]) -> None:
        is_resync_due = False  # one answer serves all who asked in one turn
        while socket.getsockopt(_EVENTS) & _POLLIN:  # type: ignore[operator]  # asked, as in `Link`
            message = wire.decode_to_worker(socket.recv(zmq.NOBLOCK))
            if isinstance(message, wire.Resync):
                is_resync_due = True
            else:
                self._handle(message)
        if is_resync_due:
            self._sink.push_blocks()

    def _handle(self, message: wire.ToWorker) -> None:
        match message:
            case wire.Submit():
                self._submit(message)
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
            case wire.Resync():
                self._sink.push_blocks()
            case _:
                self._kv.handle(message)

    def _submit(self, message: wire.Submit) -> None:
        engine, request = self._running_engine(), wire.request_of(message)
        if message.keep_kv:
            self._kv.expect(request)
        engine.submit(request)

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
            self._sink.progress("warming up")
            WarmUp(engine, info, self._watch, self._warm_up_s).run()
            port = self._kv.start(engine, info)
            self._settle()
        except BaseException as error:
            if self._exit_code is None:  # else the engine was closed under the warm-up, on purpose
                self._sink.fail(error)
            return
        if not self._sink.failed.is_set():
            self._outbox.put(lambda: wire.Ready(info, port))

    def _close_engine(self) -> None:
        if self._engine is not None and not self._sink.failed.is_set():
            self._engine.close()
        self._kv.close()  # only now: the engine writes to the rows


def _says_disconnected(monitor: zmq.Socket[bytes]) -> bool:
    return bool(recv_monitor_message(monitor)["event"] == zmq.EVENT_DISCONNECTED)
