"""Writes answers past ASGI, straight to the transport of an HTTP/1.1 connection of hypercorn.

The way is there behind ASGI's `send`: `HTTPStream` → `Http1Protocol` → `TCPServer`. Heads are those that h11 has
rendered once; the protocol is told of the beginning and the end of an answer, in the terms of h11. Its writer of chunks
keeps no state between data events, so they never disagree.

Knows the insides of hypercorn 0.18 and h11 0.16.
"""

from __future__ import annotations

import asyncio
from typing import TypeAlias

import h11
import msgspec
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.protocol.events import StreamClosed
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream

from trtserve.server.api.asgi import Headers, Send
from trtserve.server.http1 import Http1Protocol

_PER_REQUEST = (b"x-request-id", b"x-trtserve-ignored-params", b"x-trtserve-explain")
"""Headers whose values differ from answer to answer. We make them ourselves, of characters that a header may have."""

_CHUNKED = b"Transfer-Encoding: chunked"
"""What h11 puts behind our headers."""

_LENGTH = b"content-length: "

_NO_CONTENT = h11.Response(status_code=200, headers=[(b"content-length", b"0")])
"""For h11's books, in the place of a whole response that it need not see: the states are the same."""

_CHUNKED_HEADER = (b"transfer-encoding", b"chunked")

_MOST_HEADS = 64


class HypercornPath(msgspec.Struct, frozen=True):
    """The objects between ASGI's `send` and the socket."""

    stream: HTTPStream
    protocol: Http1Protocol
    transport: asyncio.WriteTransport
    writer: asyncio.StreamWriter  # of that transport

    def known_head(self, headers: Headers) -> Head | None:
        """Of a response that `begin` would begin now; None where h11 has to render it."""
        known = _heads.get(_shared(headers)) if self._keeps_open() else None
        return None if known is None else Head(known.response, _with_own(known.rendered, headers))

    def begin(self, headers: Headers, body: bytes, head: Head | None = None) -> None:
        """Write the response's head and the first bytes of its body; h11 and hypercorn move on as if ASGI had started
        the response. head: that of `known_head`, if asked for already. Raises RuntimeError, having moved on, where
        uvloop closed the transport."""
        self._respond(headers)
        if head is None:
            head = self.known_head(headers)
        if head is None:
            self.transport.write(_with_own(self._render(_shared(headers)), headers) + body)
            return
        try:
            self.transport.write(head.rendered + body)
        finally:
            self.protocol.responded(head.response)  # the client does not wait for that

    async def whole(self, headers: Headers, content: bytes) -> None:
        """Write a whole response with its length, and wait until the client has read enough of it."""
        self._respond(headers)
        shared = _shared(headers)
        known = _whole_heads.get(shared) if self._keeps_open() else None
        if known is None:
            head, response = self._render_whole(shared, len(content)), None
        else:
            head, response = b"%bcontent-length: %d\r\n%b" % (known[0], len(content), known[1]), _NO_CONTENT
        try:
            self.transport.write(_with_own(head, headers, _LENGTH) + content)
            await self.writer.drain()
        except (ConnectionError, RuntimeError):
            pass  # the client is gone, and hypercorn hears of that when it reads
        if response is None:
            self.protocol.connection.send(h11.Data(content))
        else:
            self.protocol.responded(response)
        await self.close()

    def _respond(self, headers: Headers) -> None:
        """Tell hypercorn's stream."""
        self.stream.response = {"type": "http.response.start", "status": 200, "headers": headers}
        self.stream.state = ASGIHTTPState.RESPONSE

    def _keeps_open(self) -> bool:
        """If not, h11 answers with a connection header of its own."""
        headers = self.stream.scope["headers"]
        return self.protocol.keeps_open or all(
            name != b"connection" or value.lower() == b"keep-alive" for name, value in headers
        )

    def _render_whole(self, shared: _Shared, num_bytes: int) -> bytes:
        """As `_render`, of a response with a length."""
        length = (b"content-length", b"%d" % num_bytes)
        rendered = self.protocol.render(self._response(shared, length))
        before, line, after = rendered.partition(b"content-length: %d\r\n" % num_bytes)
        if line and b"\r\nConnection:" not in rendered and len(_whole_heads) < _MOST_HEADS:
            _whole_heads[shared] = before, after
        return rendered

    def _response(self, shared: _Shared, framing: tuple[bytes, bytes]) -> h11.Response:
        own = self.protocol.config.response_headers("h11")
        return h11.Response(status_code=200, headers=[*shared, *own, framing])

    def _render(self, shared: _Shared) -> bytes:
        """By h11, which moves on; to be known next time where the connection stays open."""
        response = self._response(shared, _CHUNKED_HEADER)
        rendered = self.protocol.render(response)
        if b"\r\nConnection:" not in rendered and len(_heads) < _MOST_HEADS:
            _heads[shared] = Head(response, rendered)
        return rendered

    async def close(self) -> None:
        """As hypercorn does after a complete answer: the connection is ready for the next request, or closes."""
        self.protocol.answered()
        self.stream.state = ASGIHTTPState.CLOSED
        await self.stream.send(StreamClosed(stream_id=self.stream.stream_id))


_Shared: TypeAlias = tuple[tuple[bytes, bytes], ...]


class Head(msgspec.Struct, frozen=True):
    """Of answers on connections that stay open."""

    response: h11.Response
    rendered: bytes  # by h11


_heads: dict[_Shared, Head] = {}
"""By the headers that answers share. h11 checks each header by regular expression: most of the time of a head."""

_whole_heads: dict[_Shared, tuple[bytes, bytes]] = {}
"""The same of whole answers: what comes before their length, and behind it."""


def _shared(headers: Headers) -> _Shared:
    """Those that are alike in other responses."""
    return tuple([header for header in headers if header[0] not in _PER_REQUEST])


def _with_own(rendered: bytes, headers: Headers, framing: bytes = _CHUNKED) -> bytes:
    own = b"".join([b"%b: %b\r\n" % header for header in headers if header[0] in _PER_REQUEST])
    place = rendered.index(framing)
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
    return HypercornPath(stream, protocol, server.writer.transport, server.writer)
