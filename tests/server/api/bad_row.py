"""A row of the table of bad input, and short ways to write one."""

from __future__ import annotations

from typing import Any, NamedTuple

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
TOKENIZE = "/tokenize"
DETOKENIZE = "/detokenize"
VOCAB_SIZE = 1000
MODEL = "sim"


class BadInput(NamedTuple):
    """body: bytes go out as they are, all else as JSON."""

    endpoint: str
    body: Any
    status: int
    param: str | None
    code: str

    @property
    def label(self) -> str:
        text = repr(self.body)
        return f"{self.endpoint} {text if len(text) <= 70 else text[:67] + '...'} -> {self.param}"


VALUE = "invalid_value"
TYPE = "invalid_type"
MISSING = "missing_required_parameter"
UNSUPPORTED = "unsupported_parameter"
JSON = "invalid_json"

HELLO = [{"role": "user", "content": "Hello"}]


def bad_chat(fields: dict[str, Any], param: str | None, code: str = VALUE) -> BadInput:
    return BadInput(CHAT, {"model": MODEL, "messages": HELLO} | fields, 400, param, code)


def bad_messages(messages: Any, param: str, code: str = VALUE) -> BadInput:
    return BadInput(CHAT, {"model": MODEL, "messages": messages}, 400, param, code)


def bad_completion(fields: dict[str, Any], param: str | None, code: str = VALUE) -> BadInput:
    return BadInput(COMPLETIONS, {"model": MODEL, "prompt": "Hello"} | fields, 400, param, code)


def calling(arguments: Any) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": arguments}}]},
    ]
