"""Reading a request's body within its limit, and answering with bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from starlette.requests import Request

from trtserve.server.api.asgi import Receive, Scope, Send
from trtserve.server.api.hypercorn_path import find_path
from trtserve.server.api.serving import HttpLimits
from trtserve.server.errors import BodyTooLarge, RequestCancelled, RequestTimedOut

_DRAIN_FACTOR = 8
_DRAIN_TIMEOUT_S = 5.0


class ClientGone(RequestCancelled):
    """Nobody is there to be told."""


async def read_body(scope: Scope, receive: Receive, send: Send, max_bytes: int) -> bytes:
    """The whole body. Raises BodyTooLarge past max_bytes, ClientGone when the client leaves meanwhile.

    What follows of a body that is too large is read and thrown away for a while, since hypercorn's queue would
    otherwise fill and hold up the connection; a client that goes on for too long is cut off.
    """
    parts: list[bytes] = []
    received = 0
    announced = next((int(value) for name, value in scope["headers"] if name == b"content-length"), 0)
    while announced <= max_bytes:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client left while sending its request")
        part = message.get("body", b"")
        received += len(part)
        if received > max_bytes:
            break
        if part:
            parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)
    await discard_body(receive, send, _DRAIN_FACTOR * max_bytes)
    raise BodyTooLarge(
        f"The request body has {max(announced, received)} bytes or more and the limit is {max_bytes}; send less, or "
        "start the server with a larger --max-body-mib."
    )


async def body_of(request: Request, limits: HttpLimits) -> bytes:
    """`read_body` for handlers of Starlette, which have no other limit of time. Raises RequestTimedOut, too."""
    try:
        async with asyncio.timeout(limits.request_timeout_s):
            scope, receive, send = dict(request.scope), request.receive, request._send
            return await read_body(scope, receive, send, limits.max_body_bytes)  # type: ignore[arg-type]
    except TimeoutError:
        raise RequestTimedOut(f"The request's body was not complete within {limits.request_timeout_s:g} s.") from None


async def discard_body(receive: Receive, send: Send, max_bytes: int) -> None:
    """Read what is left of a body that nobody wants, before answering with an error: hypercorn closes a connection
    whose request was not read to its end, which clients see as a broken one. A long or slow body is cut off.
    """
    received = 0
    try:
        async with asyncio.timeout(_DRAIN_TIMEOUT_S):
            while received <= max_bytes:
                message = await receive()
                received += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        pass
    if cut_off(send):
        while (await receive())["type"] != "http.disconnect":
            pass


def cut_off(send: Send) -> bool:
    """Close the connection at once, whatever is still to be sent; False where there is no way to it."""
    path = find_path(send)
    if path is not None:
        path.transport.abort()
    return path is not None


async def answer(
    send: Send,
    status: int,
    content: bytes,
    content_type: bytes = b"application/json",
    headers: Iterable[tuple[bytes, bytes]] = (),
) -> None:
    """A complete answer with a length."""
    head = [(b"content-type", content_type), (b"content-length", b"%d" % len(content)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": content, "more_body": False})
