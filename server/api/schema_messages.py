"""Chat messages: their shape in a body, and the plain form that chat templates take.

Validation keeps only the keys named here, so what reaches a template is known. Content given as text parts becomes
one string, and the arguments of an earlier tool call become an object, because templates expect both so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field

# pydantic cannot read typing's TypedDict before Python 3.12, and both names must be from one place.
from typing_extensions import NotRequired, TypedDict  # noqa: UP035

from trtserve.server.errors import InvalidRequest
from trtserve.server.text.content import flatten_content


class TextPart(TypedDict):
    """A piece of a message's content. Images, audio and files are not read by this server."""

    type: Literal["text"]
    text: str


class FunctionCall(TypedDict):
    """Which function an assistant called, and with what: a JSON object, or a string that holds one."""

    name: str
    arguments: str | dict[str, Any]


class ToolCall(TypedDict):
    """A call that an assistant made earlier in the conversation."""

    id: NotRequired[str | None]
    type: NotRequired[Literal["function"]]
    function: FunctionCall


class Message(TypedDict):
    """One message of a conversation. `content` may be null or absent only where an assistant called tools."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: NotRequired[str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)] | None]
    name: NotRequired[str | None]
    tool_calls: NotRequired[Annotated[list[ToolCall], Field(fail_fast=True)] | None]
    tool_call_id: NotRequired[str | None]
    reasoning_content: NotRequired[str | None]
    reasoning: NotRequired[str | None]  # the same as some servers name it; templates know the other name


def normalise_messages(messages: list[Message]) -> tuple[Message, ...]:
    """Messages with string content (None beside tool calls) and object arguments. The dicts are changed in place.

    Raises InvalidRequest for content that is missing where it must not be, and for arguments that are not an object.
    """
    for index, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list):
            message["content"] = flatten_content(content)
        elif content is None:
            _check_silent(message, index)
        reasoning = message.pop("reasoning", None)
        if reasoning is not None and message.get("reasoning_content") is None:
            message["reasoning_content"] = reasoning
        if message.get("tool_calls"):
            _parse_arguments(message["tool_calls"] or (), index)
    return tuple(messages)


def _check_silent(message: Message, index: int) -> None:
    if message["role"] == "assistant" and message.get("tool_calls"):
        message["content"] = None
        return
    raise InvalidRequest(
        f"`messages[{index}].content` is missing or null in a message of role {message['role']}; give a string. "
        "Only an assistant message with tool_calls can do without.",
        param=f"messages[{index}].content",
        code="missing_required_parameter" if "content" not in message else "invalid_type",
    )


def _parse_arguments(calls: Sequence[ToolCall], index: int) -> None:
    for position, call in enumerate(calls):
        arguments = call["function"]["arguments"]
        if isinstance(arguments, dict):
            continue
        try:
            parsed = orjson.loads(arguments) if arguments.strip() else {}
        except orjson.JSONDecodeError:
            parsed = None
        if not isinstance(parsed, dict):
            path = f"messages[{index}].tool_calls[{position}].function.arguments"
            raise InvalidRequest(
                f"`{path}` is not a JSON object in a string; send the arguments as the model's answer had them.",
                param=path,
            )
        call["function"]["arguments"] = parsed
