"""How the events of one answer reach the socket, and how a client that leaves is noticed.

Under hypercorn's HTTP/1.1 the transport is there, behind ASGI's `send`: `HTTPStream` → `Http1Protocol` → `TCPServer`.
`DirectStream` writes heads that h11 has rendered, and each event as one chunk of the chunked transfer coding, straight
to that transport, without a task, a lock or an event object per token. The protocol is told of the beginning and the
end of an answer; h11's chunked writer keeps no state between data events, so they never disagree. Wherever that path is
not found (HTTP/1.0, HTTP/2, another ASGI server, a test client) `AsgiStream` does the same with plain ASGI. Knows the
insides of hypercorn 0.18 and h11 0.16.

A client that reads too slowly fills the transport's buffer; past `max_buffered_bytes` its request is given up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NamedTuple, Protocol, TypeAlias

import h11
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.protocol.events import StreamClosed
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream

from trtserve.server.http1 import Http1Protocol

_PER_REQUEST = (b"x-request-id", b"x-trtserve-ignored-params", b"x-trtserve-explain")
"""Headers whose values differ from answer to answer. We make them ourselves, of characters that a header may have."""

_CHUNKED = b"Transfer-Encoding: chunked"
"""What h11 puts behind our headers."""

_CHUNKED_HEADER = (b"transfer-encoding", b"chunked")

_LAST_CHUNK = b"0\r\n\r\n"

_MOST_HEADS = 64

Message: TypeAlias = dict[str, Any]
Scope: TypeAlias = dict[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Headers: TypeAlias = list[tuple[bytes, bytes]]
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
        self.started = False

    def _begin(self, body: bytes) -> None:
        """Write the head with the first bytes of the body. Raises RuntimeError where uvloop closed the transport."""
        self.started = True
        self._path.begin([*self._headers, *self._late_headers()], body)

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


class HypercornPath(NamedTuple):
    """The objects between ASGI's `send` and the socket."""

    stream: HTTPStream
    protocol: Http1Protocol
    transport: asyncio.WriteTransport

    def begin(self, headers: Headers, body: bytes) -> None:
        """Write the response's head and the first bytes of its body; h11 and hypercorn move on as if ASGI had started
        the response. Raises RuntimeError, having moved on, where uvloop closed the transport."""
        self.stream.response = {"type": "http.response.start", "status": 200, "headers": headers}
        self.stream.state = ASGIHTTPState.RESPONSE
        shared = tuple(header for header in headers if header[0] not in _PER_REQUEST)
        known = _heads.get(shared) if self._keeps_open() else None
        if known is None:
            self.transport.write(_with_own(self._render(shared), headers) + body)
            return
        try:
            self.transport.write(_with_own(known.rendered, headers) + body)
        finally:
            self.protocol.responded(known.response)  # the client does not wait for that

    def _keeps_open(self) -> bool:
        """If not, h11 answers with a connection header of its own."""
        headers = self.stream.scope["headers"]
        return self.protocol.keeps_open or all(
            name != b"connection" or value.lower() == b"keep-alive" for name, value in headers
        )

    def _render(self, shared: _Shared) -> bytes:
        """By h11, which moves on; to be known next time where the connection stays open."""
        response = h11.Response(
            status_code=200, headers=[*shared, *self.protocol.config.response_headers("h11"), _CHUNKED_HEADER]
        )
        rendered = self.protocol.render(response)
        if b"\r\nConnection:" not in rendered and len(_heads) < _MOST_HEADS:
            _heads[shared] = _Head(response, rendered)
        return rendered

    async def close(self) -> None:
        """As hypercorn does after a complete answer: the connection is ready for the next request, or closes."""
        self.protocol.answered()
        self.stream.state = ASGIHTTPState.CLOSED
        await self.stream.send(StreamClosed(stream_id=self.stream.stream_id))


_Shared: TypeAlias = tuple[tuple[bytes, bytes], ...]


class _Head(NamedTuple):
    """Of answers on connections that stay open."""

    response: h11.Response
    rendered: bytes  # by h11


_heads: dict[_Shared, _Head] = {}
"""By the headers that answers share. h11 checks each header by regular expression: most of the time of a head."""


def _with_own(rendered: bytes, headers: Headers) -> bytes:
    own = b"".join([b"%b: %b\r\n" % header for header in headers if header[0] in _PER_REQUEST])
    place = rendered.index(_CHUNKED)
    return rendered[:place] + own + rendered[place:]


def find_path(send: Send) -> HypercornPath | None:
    """The way to the transport, or None where this is not hypercorn 0.18 speaking HTTP/1.1 with chunked bodies."""
    stream = getattr(send, "__self__", None)
    if type(stream) is not HTTPStream:
        return None
    protocol = getattr(stream.send, "__self__", None)
    if type(protocol) is not Http1Protocol or type(protocol.connection) is not h11.Connection:
        return None
    if not protocol.is_http11 or stream.scope["method"] == "HEAD":
        return None
    server = getattr(protocol.send, "__self__", None)
    if type(server) is not TCPServer:
        return None
    return HypercornPath(stream, protocol, server.writer.transport)


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
