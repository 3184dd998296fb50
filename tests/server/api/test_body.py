"""A body that never comes whole: the request ends all the same."""

import asyncio

import pytest
from starlette.requests import Request

from trtserve.server.api.body import body_of
from trtserve.server.api.serving import HttpLimits
from trtserve.server.errors import RequestTimedOut


def request_with(*pieces):
    """One whose body comes in these pieces, the last of them None where no more come."""
    left = list(pieces)

    async def receive():
        piece = left.pop(0)
        if piece is None:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": piece, "more_body": bool(left)}

    return Request({"type": "http", "method": "POST", "path": "/tokenize", "headers": []}, receive)


async def test_a_body_in_pieces():
    assert await body_of(request_with(b"a", b"", b"bc"), HttpLimits(100, 100, 10.0)) == b"abc"


async def test_a_body_that_stops_in_the_middle():
    with pytest.raises(RequestTimedOut, match=r"not complete within 0.05 s"):
        await body_of(request_with(b"a", None), HttpLimits(100, 100, 0.05))
