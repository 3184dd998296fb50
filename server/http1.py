"""hypercorn's HTTP/1.1, but for requests that look like earlier ones: those do not go through h11.

h11 is a state machine in Python, which took a fifth of a small request. Where a whole request is there at once behind a
known head, and nothing else is under way, the states that it would go through are known, too: the application has the
request at once, and if a `HypercornPath` answers it (server/api/hypercorn_path.py), h11 never hears of either. As soon
as anything else happens (an answer by plain ASGI, more data, an end of the connection in between), h11 is told what it
has missed, and all goes on as ever.

Knows the insides of hypercorn 0.18 and h11 0.16.
"""

from __future__ import annotations

from typing import Any

import h11
import hypercorn.protocol
from hypercorn.events import Event, RawData, Updated
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.events import Request, StreamClosed
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol
from hypercorn.protocol.http_stream import HTTPStream

from trtserve.server.request_heads import Cut, KnownHead, RequestHeads, cut_head

_END = h11.EndOfMessage()


class Http1Protocol(H11Protocol):
    """One connection."""

    heads = RequestHeads()
    """Shared by all connections."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._cut: Cut | None = None  # of what h11 is reading
        self._received_bytes = 0
        # What h11 has not been told:
        self._missed: tuple[bytes, int] | None = None  # the head of the request under way, and bytes of its body
        self._response: h11.Response | None = None  # whose head was written
        self._is_answered = False

    @property
    def is_http11(self) -> bool:
        """Whether the request under way is of that version."""
        return self._missed is not None or self.connection.their_http_version == b"1.1"  # type: ignore[union-attr]

    @property
    def keeps_open(self) -> bool:
        """Whether the request under way is known to leave the connection as it is."""
        return self._missed is not None

    # -------------------------------------------------------------- from the connection

    async def handle(self, event: Event) -> None:
        if type(event) is RawData:
            if self._missed is not None:
                self._catch_up()
            elif self.stream is None and await self._took(event.data):
                return
        await super().handle(event)

    async def _took(self, data: bytes) -> bool:
        """Whether this was a whole request with a known head, which the application has now."""
        cut = self._cut = cut_head(data) if self._is_idle() else None
        if cut is None:
            return False
        known = self.heads.get(cut)
        if known is None or len(data) - cut.num_bytes != int(cut.digits):
            self._received_bytes = len(data)
            return False
        self._cut = None
        self._missed = data[: cut.num_bytes], len(data) - cut.num_bytes
        await self._begin(known, cut, data[cut.num_bytes :])
        return True

    def _is_idle(self) -> bool:
        connection = self.connection
        return (
            connection.our_state is h11.IDLE and connection.their_state is h11.IDLE and not connection.trailing_data[0]
        )

    async def _begin(self, known: KnownHead, cut: Cut, body: bytes) -> None:
        """As `H11Protocol._handle_events` and `_create_stream` do."""
        await self.send(Updated(idle=False))
        stream = self.stream = HTTPStream(
            self.app, self.config, self.context, self.task_group, self.ssl, self.client, self.server,
            self.stream_send, STREAM_ID,
        )  # fmt: skip
        headers = known.headers_with(cut.digits)
        await stream.handle(Request(STREAM_ID, headers, "1.1", known.method, known.target, self.connection_state))
        self.keep_alive_requests += 1
        await self.context.mark_request()
        if not stream.closed:
            await stream.app_put({"type": "http.request", "body": body, "more_body": False})

    async def _create_stream(self, request: h11.Request) -> None:
        cut, self._cut = self._cut, None
        if cut is not None:
            left_bytes = len(self.connection.trailing_data[0])
            self.heads.learn(cut, request, left_bytes, self._received_bytes)
        await super()._create_stream(request)

    # -------------------------------------------------------------- from the application

    def responded(self, response: h11.Response) -> None:
        """The head of this response was written to the transport."""
        if self._missed is not None:
            self._response = response
        else:
            # What `send` does but for making the bytes again, which takes four times as long.
            self.connection._process_event(h11.SERVER, response)  # type: ignore[union-attr]

    def answered(self) -> None:
        """The end of the response was written, too."""
        if self._missed is not None:
            self._is_answered = True
        else:
            self.connection.send(_END)

    def render(self, response: h11.Response) -> bytes:
        """The head of a response as h11 makes it, to be written to the transport."""
        self._catch_up()
        rendered = self.connection.send(response)
        assert rendered is not None
        return rendered

    async def stream_send(self, event: StreamEvent) -> None:
        if self._missed is not None:
            if type(event) is StreamClosed:
                await self._close_stream()
                if self._missed is not None and self._is_answered and not self.context.terminated.is_set():
                    self._forget_missed()
                    await self.send(Updated(idle=True))
                    return
            self._catch_up()
        await super().stream_send(event)

    def _catch_up(self) -> None:
        """Tell h11 what it has missed."""
        if self._missed is None:
            return
        (head, body_bytes), response, is_answered = self._missed, self._response, self._is_answered
        self._forget_missed()
        self.connection.receive_data(head + bytes(body_bytes))
        while type(self.connection.next_event()) is not h11.EndOfMessage:
            pass
        if response is not None:
            self.connection.send(response)
        if is_answered:
            self.connection.send(_END)

    def _forget_missed(self) -> None:
        self._missed = self._response = None
        self._is_answered = False


def install() -> None:
    """Have hypercorn use it for connections from now on."""
    hypercorn.protocol.H11Protocol = Http1Protocol  # type: ignore[attr-defined, assignment]
