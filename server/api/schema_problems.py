"""From what pydantic has against a body to the one InvalidRequest that the client gets.

A client fixes one field at a time, so only the first bad field is told, with its dotted path, its value, what is
allowed there and what to send instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from trtserve.server.errors import InvalidRequest

_KINDS: Mapping[str, str] = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
}

_BOUNDS: Mapping[str, tuple[str, str]] = {
    "greater_than_equal": ("ge", "{0} or more"),
    "greater_than": ("gt", "more than {0}"),
    "less_than_equal": ("le", "{0} or less"),
    "less_than": ("lt", "less than {0}"),
}

# What the bound alone does not explain: by field, list indexes left out, and kind of problem.
_REASONS: Mapping[tuple[str, str], str] = {
    ("max_tokens", "greater_than_equal"): "a request generates at least one token",
    ("max_completion_tokens", "greater_than_equal"): "a request generates at least one token",
    ("top_k", "greater_than_equal"): "-1 and 0 turn it off",
    ("stop", "string_too_short"): "an empty stop string would match everywhere",
    ("messages.content.type", "literal_error"): "images, audio and files are not read by this server",
}
_INDEX = re.compile(r"\[\d+\]")


def invalid_request(error: ValidationError, body: object) -> InvalidRequest:
    """The InvalidRequest for the first bad field of `body`, the JSON value that pydantic refused."""
    problems = [
        (_path(problem["loc"], body, is_missing=problem["type"] == "missing"), problem)
        for problem in error.errors(include_url=False)
    ]
    first = problems[0][0]
    # A union complains once for each member; the deepest complaint is of the member that fits best.
    path = max((path for path, _ in problems if path.startswith((f"{first}.", f"{first}["))), key=len, default=first)
    here = [problem for other, problem in problems if other == path]
    # In a union, a member that complains about the value took the type.
    problem = next((each for each in here if each["type"] not in _KINDS), here[0])
    reason = _REASONS.get((_INDEX.sub("", path), problem["type"]))
    sentence, code = _sentence(path, problem, here)
    return InvalidRequest(f"{sentence}{f' ({reason})' if reason else ''}.", param=path, code=code)


def shown(value: object) -> str:
    """A value as a message names it: short whatever it is, and never a walk into deep nesting."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"{value:.6g}" if isinstance(value, float) else str(value)
    if isinstance(value, str):
        return f'the string "{value if len(value) <= 40 else value[:37] + "..."}"'
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "an object"


def _sentence(path: str, problem: ErrorDetails, problems: Sequence[ErrorDetails]) -> tuple[str, str]:
    """What is wrong with the field at `path`, and the error's code."""
    kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    if kind == "missing":
        return f"`{path}` is missing and this request needs it; send it", "missing_required_parameter"
    if kind in _KINDS:
        wanted = " or ".join(dict.fromkeys(_KINDS[each["type"]] for each in problems if each["type"] in _KINDS))
        return f"`{path}` is {shown(value)} and must be {wanted}", "invalid_type"
    return f"`{path}` {_value_problem(kind, value, context)}", "invalid_value"


def _value_problem(kind: str, value: object, context: Mapping[str, Any]) -> str:
    if kind in _BOUNDS:
        name, phrase = _BOUNDS[kind]
        bound = context[name]
        return f"is {shown(value)}; send {phrase.format(f'{bound:g}' if isinstance(bound, float) else bound)}"
    if kind == "literal_error":
        return f"is {shown(value)}; send {context['expected']}"
    if kind in ("too_long", "string_too_long"):
        length = len(value) if isinstance(value, str | list | dict) else "more"
        return f"has a length of {length}; send {context['max_length']} or less"
    if kind in ("too_short", "string_too_short"):
        return f"is empty; send at least {context['min_length']}"
    return f"is {shown(value)}, which is not allowed here"


def _path(location: Sequence[int | str], body: object, *, is_missing: bool) -> str:
    """The dotted path of a pydantic location. Members of unions are in a location too, but not in a body."""
    path = ""
    here: Any = body
    for position, step in enumerate(location):
        if isinstance(here, list) and isinstance(step, int):
            path += f"[{step}]"
            here = here[step]
        elif isinstance(here, dict) and isinstance(step, str):
            if step not in here and not (is_missing and position == len(location) - 1):
                continue
            path += f".{step[:64]}" if path else step
            here = here.get(step)
    return path
