"""Heads of requests that h11 has read once, to be recognised when a client sends the like again.

A client's heads differ in the length of the body only, and often not even in that. So a head is known by all its bytes
but the digits of its content-length, and a request is whole when exactly so many bytes follow.
"""

from __future__ import annotations

import h11
import msgspec

MOST_HEADS = 256
MOST_HEAD_BYTES = 4096

_END = b"\r\n\r\n"
_LENGTH_NAMES = (b"\r\nContent-Length: ", b"\r\ncontent-length: ")  # as clients write it
_MOST_DIGITS = 15  # h11 takes 20

_CHANGING = frozenset({b"upgrade", b"expect", b"transfer-encoding", b"http2-settings"})
"""Headers that make a connection, or a body, another one than the fast way is for."""

Header = tuple[bytes, bytes]


class Cut(msgspec.Struct, frozen=True, gc=False):
    """The beginning of what a connection has received."""

    key: bytes  # the head without the digits of its content-length
    digits: bytes
    num_bytes: int  # of the head


class KnownHead(msgspec.Struct, frozen=True):
    """What h11 made of a head."""

    method: str
    target: bytes
    headers: list[Header]
    place: int  # of the content-length in `headers`

    def headers_with(self, digits: bytes) -> list[Header]:
        headers = self.headers.copy()
        headers[self.place] = (b"content-length", digits)
        return headers


class RequestHeads:
    """Of HTTP/1.1 requests that have a body and leave the connection open. Where heads differ in more, by a request id
    say, they push each other out: so many are kept, then all are forgotten."""

    def __init__(self) -> None:
        self._known: dict[bytes, KnownHead] = {}

    def get(self, cut: Cut) -> KnownHead | None:
        return self._known.get(cut.key)

    def learn(self, cut: Cut, request: h11.Request, left_bytes: int, received_bytes: int) -> None:
        """What h11 made of `received_bytes` that begin with this head; `left_bytes` of them it has not read yet."""
        known = _known(cut, request)
        if known is not None and received_bytes - left_bytes == cut.num_bytes:
            if len(self._known) >= MOST_HEADS:
                self._known.clear()
            self._known[cut.key] = known


def cut_head(data: bytes) -> Cut | None:
    """None where the head is not all there, or has no content-length written as usual."""
    end = data.find(_END, 0, MOST_HEAD_BYTES)
    if end < 0:
        return None
    for name in _LENGTH_NAMES:
        place = data.find(name, 0, end)
        if place >= 0:
            begin = place + len(name)
            stop = data.index(b"\r\n", begin)
            digits = data[begin:stop]
            if not digits.isdigit() or len(digits) > _MOST_DIGITS:
                return None
            return Cut(data[:begin] + data[stop : end + 4], digits, end + 4)
    return None


def _known(cut: Cut, request: h11.Request) -> KnownHead | None:
    if cut.key.lower().count(b"content-length") != 1:
        return None  # h11 makes one of two that are equal, and refuses others
    headers = list(request.headers)
    places = [place for place, (name, _) in enumerate(headers) if name == b"content-length"]
    if request.http_version != b"1.1" or len(places) != 1 or headers[places[0]][1] != cut.digits:
        return None
    for name, value in headers:
        if name in _CHANGING or (name == b"connection" and value.lower() != b"keep-alive"):
            return None
    return KnownHead(request.method.decode("ascii").upper(), request.target, headers, places[0])
