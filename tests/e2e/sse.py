"""Reading server-sent events as a client does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON of every event up to [DONE], which must be the last one."""
    for line in lines:
        if not line:
            continue
        assert line.startswith("data: "), line
        if line == "data: [DONE]":
            assert not [rest for rest in lines if rest], "something follows [DONE]"
            return
        yield json.loads(line.removeprefix("data: "))
    raise AssertionError("the stream ended without [DONE]")


def stream(client: httpx.Client, path: str, body: dict[str, Any], **headers: str) -> list[dict[str, Any]]:
    """All events of a streamed answer."""
    with client.stream("POST", path, json=body | {"stream": True}, headers=headers) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        return list(events(response.iter_lines()))


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    """The joined text of one choice, chat or completion."""
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") if "delta" in choice else choice["text"] for choice in choices)


def finish_of(chunks: list[dict[str, Any]], index: int = 0) -> list[str]:
    """Every finish_reason of one choice; a good stream gives one."""
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return [choice["finish_reason"] for choice in choices if choice["finish_reason"] is not None]
