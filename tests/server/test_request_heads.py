"""Which heads are known again, and which never are."""

import h11
import pytest

from trtserve.server.request_heads import MOST_HEAD_BYTES, MOST_HEADS, RequestHeads, cut_head

HEAD = b"POST /a?b HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nX-Y:  z\r\n\r\n"


def learn(heads, data):
    """Have h11 read what begins with a head."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(data)
    request, cut = connection.next_event(), cut_head(data)
    heads.learn(cut, request, len(connection.trailing_data[0]), len(data))
    return cut


def test_a_head_is_known_with_another_length():
    heads = RequestHeads()
    learn(heads, HEAD + b"12345")
    cut = cut_head(HEAD.replace(b"5", b"1234567") + b"12")
    known = heads.get(cut)
    assert (cut.digits, cut.num_bytes) == (b"1234567", len(HEAD) + 6)
    assert (known.method, known.target) == ("POST", b"/a?b")
    assert known.headers_with(cut.digits) == [(b"host", b"x"), (b"content-length", b"1234567"), (b"x-y", b"z")]
    assert heads.get(cut_head(HEAD.replace(b"z", b"zz"))) is None


@pytest.mark.parametrize(
    "head",
    [
        HEAD[:-1],  # not all there
        HEAD.replace(b"Content-Length", b"X-Length"),
        HEAD.replace(b"Content-Length: 5", b"content-Length: 5"),  # not as clients write it
        HEAD.replace(b": 5", b": 5 "),
        HEAD.replace(b": 5", b": +5"),
        HEAD.replace(b": 5", b": "),
        HEAD.replace(b": 5", b": " + b"5" * 16),
        HEAD.replace(b"z", b"z" * MOST_HEAD_BYTES),
    ],
)
def test_what_is_not_cut(head):
    assert cut_head(head) is None


@pytest.mark.parametrize(
    "head",
    [
        HEAD.replace(b"HTTP/1.1", b"HTTP/1.0"),
        HEAD.replace(b"X-Y:  z", b"Connection: close"),
        HEAD.replace(b"X-Y:  z", b"connection: upgrade"),
        HEAD.replace(b"X-Y:  z", b"Upgrade: h2c"),
        HEAD.replace(b"X-Y:  z", b"HTTP2-Settings: AAMAAABkAAQAAP__"),
        HEAD.replace(b"X-Y:  z", b"Expect: 100-continue"),
        HEAD.replace(b"X-Y:  z", b"Transfer-Encoding: chunked"),
        HEAD.replace(b"X-Y:  z", b"content-length: 5"),  # h11 makes one of them, but not of different ones
        HEAD.replace(b"z\r\n", b"z\n"),  # ends before the blank line that was looked for
    ],
)
def test_what_is_never_known(head):
    heads = RequestHeads()
    assert heads.get(learn(heads, head + b"12345\r\n\r\n")) is None


def test_so_many_are_kept():
    heads = RequestHeads()
    cuts = [learn(heads, HEAD.replace(b"z", b"%d" % number)) for number in range(MOST_HEADS + 1)]
    assert [number for number, cut in enumerate(cuts) if heads.get(cut)] == [MOST_HEADS]
