"""How the events of one answer reach the socket, and how a client that leaves is noticed.

`DirectStream` writes each event as one chunk of the chunked transfer coding straight to the connection's transport,
without a task, a lock or an event object per token. Wherever there is no `HypercornPath` to it (HTTP/1.0, HTTP/2,
another ASGI server, a test client) `AsgiStream` does the same with plain ASGI.

A client that reads too slowly fills the transport's buffer; past `max_buffered_bytes` its request is given up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeAlias

from hypercorn.protocol.http_stream import HTTPStream

from trtserve.server.api.asgi import Headers, Message, Receive, Send
from trtserve.server.api.hypercorn_path import Head, HypercornPath, find_path

_LAST_CHUNK = b"0\r\n\r\n"

LateHeaders: TypeAlias = Callable[[], Headers]
"""Asked once, when the head is written: headers that are not known before the first piece of the body."""


def no_late_headers() -> Headers:
    return []


class DisconnectWatch:
    """Calls `left` once when the client goes away inside the `async with` block, until `stop`.

    The request's body must have been read. Under hypercorn this costs no task: its queue's `put` is stood in for.
    """

    def __init__(self, receive: Receive, send: Send, left: Callable[[], None]) -> None:
        self._receive = receive
        self._left: Callable[[], None] | None = left
        stream = getattr(send, "__self__", None)
        self._stream: Any = stream if type(stream) is HTTPStream else None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> DisconnectWatch:
        if self._stream is None:
            self._task = asyncio.create_task(self._wait_for_disconnect())  # owned: cancelled and awaited below
        else:
            self._app_put = self._stream.app_put
            self._stream.app_put = self._put
            if self._stream.closed:
                self._gone()
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.stop()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        elif self._stream is not None:
            self._stream.app_put = self._app_put
        self._stream = None  # nothing is left that refers to itself, so nothing waits for the garbage collector

    def stop(self) -> None:
        """From here on the client's leaving is no news: hypercorn says so after every complete answer too."""
        self._left = None

    def _gone(self) -> None:
        left, self._left = self._left, None
        if left is not None:
            left()

    async def _put(self, message: Message) -> None:
        if message["type"] == "http.disconnect":
            self._gone()
        await self._app_put(message)

    async def _wait_for_disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone()


class EventStream(Protocol):
    """One answer of status 200 whose body comes in pieces. Use as an async context manager."""

    started: bool
    """Whether anything was written: from then on the status cannot change."""

    def prepare(self) -> None:
        """Have ready what the first piece needs. To be called while there is nothing else to do, or not at all."""

    def write(self, data: bytes) -> None:
        """Send a piece of the body now; the head goes first. Never blocks, never raises."""

    def framed(self, prefix: bytes, suffix: bytes) -> Callable[[bytes], None]:
        """A faster `write` for many pieces between the same bytes, to be used once something was written."""

    async def end(self, last: bytes = b"") -> None:
        """Send the last piece and end the body; nothing happens if there is neither that nor a started body."""

    async def __aenter__(self) -> EventStream: ...

    async def __aexit__(self, *exception: object) -> None: ...


class DirectStream:
    """Writes chunks to the connection's transport. `too_slow` is called once when the client does not read."""

    def __init__(
        self,
        path: HypercornPath,
        headers: Headers,
        too_slow: Callable[[], None],
        max_buffered_bytes: int,
        late_headers: LateHeaders = no_late_headers,
    ) -> None:
        self._path = path
        self._transport = path.transport
        self._headers = headers
        self._late_headers = late_headers
        self._too_slow = too_slow
        self._max_buffered_bytes = max_buffered_bytes
        self._is_open = True
        self._head: Head | None = None
        self.started = False

    def prepare(self) -> None:
        if self._is_open and not self.started and self._late_headers is no_late_headers:
            self._head = self._path.known_head(self._headers)

    def _begin(self, body: bytes) -> None:
        """Write the head with the first bytes of the body. Raises RuntimeError where uvloop closed the transport."""
        self.started = True
        self._path.begin([*self._headers, *self._late_headers()], body, self._head)

    async def __aenter__(self) -> DirectStream:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._is_open = False

    def write(self, data: bytes) -> None:
        if not self._is_open or not data:  # a chunk of no bytes would end the body
            return
        chunk = b"%x\r\n%b\r\n" % (len(data), data)
        try:
            if self.started:
                self._transport.write(chunk)
            else:
                self._begin(chunk)
        except RuntimeError:
            self._lost()
            return
        if self._transport.get_write_buffer_size() > self._max_buffered_bytes:
            self._give_up()

    def framed(self, prefix: bytes, suffix: bytes) -> Callable[[bytes], None]:
        """Hot: runs once per token, so it keeps what it needs in its own cells."""
        transport_write, buffer_size = self._transport.write, self._transport.get_write_buffer_size
        frame_bytes, end, limit = len(prefix) + len(suffix), suffix + b"\r\n", self._max_buffered_bytes

        def write(piece: bytes) -> None:
            if self._is_open:
                try:
                    transport_write(b"%x\r\n%b%b%b" % (frame_bytes + len(piece), prefix, piece, end))
                except RuntimeError:
                    self._lost()
                    return
                if buffer_size() > limit:
                    self._give_up()

        return write

    def _lost(self) -> None:
        """uvloop has closed the transport already: the client is gone, and the watch is about to hear of it."""
        self._is_open = False

    def _give_up(self) -> None:
        self._is_open = False
        # The answer cannot be completed, and the client must not take it for complete.
        self._transport.abort()
        self._too_slow()

    async def end(self, last: bytes = b"") -> None:
        if self._is_open and (self.started or last):
            self._is_open = False
            chunk = b"%x\r\n%b\r\n" % (len(last), last) if last else b""
            try:
                if self.started:
                    self._transport.write(chunk + _LAST_CHUNK)
                else:
                    self._begin(chunk + _LAST_CHUNK)
            except RuntimeError:
                self._lost()
            await self._path.close()


class AsgiStream:
    """The same by ASGI alone: a task sends what `write` left for it."""

    def __init__(
        self,
        send: Send,
        headers: Headers,
        too_slow: Callable[[], None],
        max_buffered_bytes: int,
        late_headers: LateHeaders = no_late_headers,
    ) -> None:
        self._send = send
        self._headers = headers
        self._late_headers = late_headers
        self._too_slow = too_slow
        self._max_buffered_bytes = max_buffered_bytes
        self._buffer: list[bytes] = []
        self._buffered_bytes = 0
        self._wake = asyncio.Event()
        self._ending = False
        self._is_open = True
        self.started = False

    def prepare(self) -> None:
        pass

    async def __aenter__(self) -> AsgiStream:
        self._pump = asyncio.create_task(self._send_buffered())  # owned: cancelled and awaited below
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._is_open = False
        self._pump.cancel()
        await asyncio.wait({self._pump})

    def write(self, data: bytes) -> None:
        if not self._is_open:
            return
        self.started = True
        self._buffer.append(data)
        self._buffered_bytes += len(data)
        self._wake.set()
        if self._buffered_bytes > self._max_buffered_bytes:
            self._is_open = False
            self._pump.cancel()
            self._too_slow()

    def framed(self, prefix: bytes, suffix: bytes) -> Callable[[bytes], None]:
        return lambda piece: self.write(prefix + piece + suffix)

    async def end(self, last: bytes = b"") -> None:
        if last:
            self.write(last)
        if self._is_open and self.started:
            self._is_open = False
            self._ending = True
            self._wake.set()
            await self._pump

    async def _send_buffered(self) -> None:
        await self._wake.wait()
        headers = [*self._headers, *self._late_headers()]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        while not self._ending or self._buffer:
            await self._wake.wait()
            self._wake.clear()
            data, self._buffer = b"".join(self._buffer), []
            if data:
                await self._send({"type": "http.response.body", "body": data, "more_body": True})
            self._buffered_bytes -= len(data)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


def open_stream(
    send: Send,
    headers: Iterable[tuple[bytes, bytes]],
    too_slow: Callable[[], None],
    max_buffered_bytes: int,
    late_headers: LateHeaders = no_late_headers,
) -> EventStream:
    """The fastest stream that this connection allows."""
    path = find_path(send)
    if path is not None:
        return DirectStream(path, list(headers), too_slow, max_buffered_bytes, late_headers)
    return AsgiStream(send, list(headers), too_slow, max_buffered_bytes, late_headers)
