"""Message content as a client sends it, as the text that a chat template takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trtserve.server.errors import InvalidRequest

_TEXT_TYPES = ("text", "input_text", "output_text")


def flatten_content(content: str | Sequence[Mapping[str, Any]] | None, param: str = "messages") -> str:
    """A string as it is, nothing as '', the texts of a list of parts joined with newlines.

    param: where the content stands in the request, for the error. Raises InvalidRequest for images, audio and the like.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "\n".join(_part_text(part, f"{param}[{i}]") for i, part in enumerate(content))


def _part_text(part: Mapping[str, Any], param: str) -> str:
    kind = part.get("type")
    if kind not in _TEXT_TYPES:
        raise InvalidRequest(
            f"Content of type {str(kind)[:50]!r} is not served: only text is; send parts of type 'text'.",
            param=param,
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidRequest("A part of type 'text' needs its 'text', a string.", param=param)
    return text
