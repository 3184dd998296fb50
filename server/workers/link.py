"""The server's one ZeroMQ socket: a ROUTER that all workers connect to.

The raw socket is read from the event loop's reader callback until it is empty, which costs less than zmq.asyncio's
future per message. ZeroMQ's file descriptor is edge-triggered: it says "something changed", once. So whoever touches
the socket, to send as well, must look afterwards whether messages are waiting; `_drain_soon` does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

import zmq

from trtserve.server.workers import wire
from trtserve.server.workers.ipc_socket import IpcSocket

logger = logging.getLogger(__name__)

_MESSAGES_PER_TURN = 256
"""After so many messages other tasks get their turn."""

# As plain numbers: pyzmq's enumerations cost more than the calls that take them.
_NOBLOCK, _POLLIN, _EVENTS, _RCVMORE = int(zmq.NOBLOCK), int(zmq.POLLIN), int(zmq.EVENTS), int(zmq.RCVMORE)
_FIRST = int(zmq.SNDMORE | zmq.NOBLOCK)  # of two frames; if it is refused, so is the message, as ROUTER drops neither

_SEND_QUEUE = 10_000
"""Messages ZeroMQ holds for one worker. It is full only when the worker has stopped reading; `send` then says so."""


_LAST_WORDS_MS = 500
"""How long closing waits for messages on their way, such as Shutdown to workers that are no children of ours."""


class EndpointError(Exception):
    """The workers' address cannot be used; the text names it."""


class Link:
    """Owns the socket. Use as a context manager inside the loop that is to read it.

    `on_message(identity, message)` and then, once per wake-up, `on_drained()` are called on the loop, and
    `before_last()` before the last message of a wake-up; the identity is what ZeroMQ calls the peer and what `send`
    takes. An `on_message` that raises is logged, and costs none of the messages behind.
    """

    def __init__(
        self,
        endpoint: str,
        on_message: Callable[[bytes, wire.FromWorker], None],
        on_drained: Callable[[], None],
        before_last: Callable[[], None] = lambda: None,
    ) -> None:
        """`endpoint`: a ZeroMQ address to bind, ipc:// or tcp:// (port ``*`` for any)."""
        self._on_message = on_message
        self._on_drained = on_drained
        self._before_last = before_last
        self._endpoint = endpoint
        self._file = IpcSocket(endpoint)
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)

    def __enter__(self) -> Self:
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.setsockopt(zmq.SNDHWM, _SEND_QUEUE)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
        self._bind()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self._drain)
        return self

    def _bind(self) -> None:
        """Raises EndpointError."""
        problem = self._file.check()
        if problem is None:
            try:
                self._socket.bind(self._endpoint)
            except zmq.ZMQError as error:
                problem = zmq.strerror(error.errno or 0)
        if problem is not None:
            self._context.destroy(linger=0)
            raise EndpointError(f"workers cannot connect to {self._endpoint}: {problem}")
        self._file.bound()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close(linger=_LAST_WORDS_MS)
        self._context.term()
        self._file.remove()

    @property
    def endpoint(self) -> str:
        """The address to connect to, with the port that was chosen."""
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def send(self, identity: bytes, message: wire.ToWorker) -> bool:
        """False when the worker is not connected or has stopped reading: it is as good as dead."""
        try:
            self._socket.send(identity, _FIRST)
            self._socket.send(wire.encode(message), _NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        finally:
            self._drain_soon()
        return True

    def _drain_soon(self) -> None:
        if int(self._socket.getsockopt(_EVENTS)) & _POLLIN:
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        if self._socket.closed:
            return
        received, is_empty = self._receive()
        try:
            if received:
                last = received.pop()
                self._hand_on(received)
                self._before_last()
                self._hand_on((last,))
                self._on_drained()
        finally:
            if not is_empty:
                self._loop.call_soon(self._drain)

    def _hand_on(self, received: Iterable[tuple[bytes, wire.FromWorker]]) -> None:
        take = self._on_message
        for identity, message in received:
            try:
                take(identity, message)
            except Exception:  # of others, which must not pay for it
                logger.exception("a message of %r could not be handled", identity)

    def _receive(self) -> tuple[list[tuple[bytes, wire.FromWorker]], bool]:
        """The messages that are there, up to a turn's number of them and the rest of a batch; whether that was all."""
        received: list[tuple[bytes, wire.FromWorker]] = []
        receive, ask = self._socket.recv, self._socket.getsockopt
        for _ in range(_MESSAGES_PER_TURN):
            try:
                # Two frames of every worker that knows the wire. `recv_multipart` would take twice as long.
                identity, frame = receive(_NOBLOCK), receive(_NOBLOCK, copy=False)
            except zmq.Again:  # whoever calls has seen that something is there, and is rarely wrong
                return received, True
            if frame.more:
                self._drop_rest()
            else:
                self._decode(identity, frame.bytes, received)
            # Asked, as an exception at each end would cost more. The descriptor signals what comes after a no; whatever
            # sends meanwhile asks again.
            if not ask(_EVENTS) & _POLLIN:  # type: ignore[operator]
                return received, True
            if len(received) >= _MESSAGES_PER_TURN:
                break
        return received, False

    def _drop_rest(self) -> None:
        logger.warning("dropped a message of more than one frame")
        while self._socket.getsockopt(_RCVMORE):
            self._socket.recv(_NOBLOCK)

    @staticmethod
    def _decode(identity: bytes, payload: bytes, received: list[tuple[bytes, wire.FromWorker]]) -> None:
        try:
            messages = wire.decode_from_worker(payload)
        except wire.WireError as error:
            logger.warning("dropped a message that does not decode: %s", error)
            return
        received += [(identity, message) for message in messages]
