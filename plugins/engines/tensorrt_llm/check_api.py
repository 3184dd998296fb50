"""`python -m trtserve.plugins.engines.tensorrt_llm.check_api [--source CHECKOUT]`: do our names exist over there?

Reads the TensorRT-LLM that is installed, or a checkout of its repository, and looks up every argument, keyword, field
and event key that this engine uses (`emitted_names`). Needs no GPU and none of TensorRT-LLM's libraries: names are read
from the source's text, and argument values are given to its real pydantic classes with everything native stubbed.

Exit code 0: all there. 1: something is not. 3: there is no TensorRT-LLM to look at.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trtserve.plugins.api import Role
from trtserve.plugins.engines.tensorrt_llm import emitted_names
from trtserve.plugins.engines.tensorrt_llm.source_reading import (
    FILES,
    LLM_FILE,
    Field,
    NotFoundInSource,
    Source,
    find_package,
)
from trtserve.plugins.engines.tensorrt_llm.values_check import ArgumentValues

NOTHING_THERE = 3


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that was looked up. `state` is ok, missing, refused or skipped."""

    what: str
    state: str
    detail: str = ""


def main(arguments: list[str] | None = None) -> int:
    """Print the table; returns the exit code. docs/first_gpu_run.md has both."""
    parser = argparse.ArgumentParser(prog="check_api", description="Look every name of ours up in TensorRT-LLM.")
    parser.add_argument("--source", type=Path, metavar="CHECKOUT", help="a checkout; default: what is installed")
    given = parser.parse_args(arguments)
    package = find_package(given.source)
    if package is None:
        print(f"no TensorRT-LLM at {given.source}" if given.source else "no TensorRT-LLM is installed", file=sys.stderr)
        return NOTHING_THERE
    source = Source(package)
    rows = list(check(source))
    print(f"TensorRT-LLM {source.version} in {package}")
    width = max(len(row.what) for row in rows)
    for row in rows:
        print(f"{row.state:8} {row.what:{width}} {row.detail}".rstrip())
    return int(any(row.state in ("missing", "refused") for row in rows))


def check(source: Source) -> Iterator[Row]:
    """Every row, in the order of the table."""
    yield from _profiles(source)
    for name, keywords in emitted_names.GIVEN.items():
        yield _names(name, keywords, emitted_names.GIVEN_IF_THERE.get(name, ()), partial(_keywords, source, name))
    for name, attributes in emitted_names.READ.items():
        optional = emitted_names.READ_IF_THERE.get(name, ())
        yield _names(name, attributes, optional, partial(source.attributes, name))
    yield _names("LLM's methods", emitted_names.LLM_METHODS, (), partial(source.functions, LLM_FILE))
    yield _names("KV events", emitted_names.EVENT_TEXTS, (), partial(source.texts, "KVCacheEventSerializer"))
    yield Row("executor.utils.RequestError", "ok" if source.has_class("RequestError") else "missing")


def _keywords(source: Source, name: str) -> Iterable[str]:
    """Of a dataclass or of a method of the LLM."""
    owner, _, method = name.partition(".")
    return source.keywords(method) if method else source.fields(owner)


def _profiles(source: Source) -> Iterator[Row]:
    values = ArgumentValues(source.package)
    everything = emitted_names.ProfileArguments("(all options)", Role.DECODE, emitted_names.most_arguments())
    if values.problem:
        yield Row("argument values", "skipped", values.problem)
    for profile in [*emitted_names.profile_arguments(), everything]:
        what = f"{profile.name} {profile.role}"
        try:
            unknown = sorted(unknown_arguments(source, profile.arguments.merged()))
        except NotFoundInSource as error:
            yield Row(what, "missing", str(error))
            continue
        refusals = [] if unknown else values.refusals(profile.arguments)
        state = "missing" if unknown else "refused" if refusals else "ok"
        yield Row(what, state, "; ".join(unknown or refusals))


def unknown_arguments(source: Source, arguments: Mapping[str, Any]) -> Iterator[str]:
    """Names in the arguments, also inside of blocks, that the source's classes do not have: `block.name`."""
    known = source.fields("TorchLlmArgs")
    for name, value in arguments.items():
        if name not in known:
            yield name
        elif name == "speculative_config" and isinstance(value, Mapping):
            yield from _unknown_speculation(source, value)
        elif isinstance(value, Mapping):
            yield from (f"{name}.{inner}" for inner in _unknown_inside(source, known[name], value))


def _unknown_speculation(source: Source, block: Mapping[str, Any]) -> Iterator[str]:
    """`decoding_type` chooses the class; it is a field of it since 1.3 only."""
    file = FILES["DecodingBaseConfig"]
    wanted = str(block.get("decoding_type", "")).replace("_", "").lower()
    for name in source.subclasses("DecodingBaseConfig"):
        where = source.file_of(name, file) or file
        if (source.constant(name, where, "decoding_type") or "").replace("_", "").lower() == wanted:
            known = source.fields(name, where)
            yield from (
                f"speculative_config.{inner}" for inner in block if inner not in known and inner != "decoding_type"
            )
            return
    yield f"speculative_config.decoding_type = {block.get('decoding_type')}"


def _unknown_inside(source: Source, field: Field, block: Mapping[str, Any]) -> Iterator[str]:
    """Names that none of the classes in the field's annotation has; nothing where it names no class of the source."""
    files = {name: source.file_of(name, FILES["TorchLlmArgs"]) for name in sorted(field.type_names)}
    known = [source.fields(name, file) for name, file in files.items() if file is not None]
    if known:
        yield from (name for name in block if not any(name in fields for fields in known))


def _names(what: str, ours: Iterable[str], optional: Iterable[str], theirs: Callable[[], Iterable[str]]) -> Row:
    try:
        there = set(theirs())
    except NotFoundInSource as error:
        return Row(what, "missing", str(error))
    missing, absent = sorted(set(ours) - there), sorted(set(optional) - there)
    if missing:
        return Row(what, "missing", ", ".join(missing))
    without = f"; without {', '.join(absent)}, which the engine looks for first" if absent else ""
    return Row(what, "ok", f"{len({*ours, *optional} & there)} names{without}")


if __name__ == "__main__":
    sys.exit(main())
