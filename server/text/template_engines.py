"""Two engines for Jinja chat templates that keep the conventions of transformers' `apply_chat_template`.

minijinja is several times faster and has no Python to break out to; jinja2's immutable sandbox takes what minijinja
cannot. Conventions: block trimming on, no escaping, `tojson` as plain JSON, `raise_exception`, `strftime_now`, break
and continue, and ``{% generation %}`` (it marks training text) without effect.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

import minijinja

Render = Callable[..., str]
"""Called with the template's variables as keyword arguments."""

_GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")


class TemplateRefusal(Exception):
    """The template called `raise_exception`; the text is its author's, for whoever wrote the messages."""


def compile_minijinja(source: str) -> Render:
    """Raises minijinja.TemplateError if the template is outside of what minijinja knows."""
    environment = minijinja.Environment(
        filters={"tojson": _to_json},
        globals={"raise_exception": _raise_exception, "strftime_now": _strftime_now},
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # A name without an extension: minijinja escapes by extension.
    environment.add_template("chat", _without_generation_tags(source))

    def render(**variables: Any) -> str:
        return str(environment.render_template("chat", **variables))

    return render


def compile_jinja2(source: str) -> Render:
    """Raises jinja2.TemplateError if the template is wrong."""
    # Imported here: it costs 0.1 s and some MB, and after the comparison at load most models need it no more.
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment.from_string(_without_generation_tags(source)).render


def _without_generation_tags(source: str) -> str:
    """An `if true` in the place of each, so that trimming around it stays what it was."""
    return _GENERATION.sub(lambda tag: f"{tag[1]}{'endif' if tag[2] else 'if true'}{tag[3]}", source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> str:
    raise TemplateRefusal(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)
