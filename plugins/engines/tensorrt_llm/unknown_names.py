"""Finds names that TensorRT-LLM would refuse, each with the nearest one that there is."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from trtserve.plugins.engines.tensorrt_llm import fields


def unknown_names(arguments: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Problems, and notes about names that only some versions have. `arguments` are in 1.2's names."""
    problems, notes = _checked(arguments, "", fields.LLM, fields.LATER)
    for name, inner in arguments.items():
        if isinstance(inner, Mapping) and name in fields.NESTED:
            later = fields.NESTED_LATER.get(name, frozenset())
            more_problems, more_notes = _checked(inner, f"{name}.", fields.NESTED[name], later)
            problems += more_problems
            notes += more_notes
    problems += _speculative(arguments.get("speculative_config"))
    problems += _load_balancer(arguments.get("moe_config"))
    return problems, notes


def _checked(
    given: Iterable[str], prefix: str, known: frozenset[str], later: frozenset[str]
) -> tuple[list[str], list[str]]:
    problems = [_problem(prefix, str(name), known | later) for name in given if name not in known | later]
    notes = [f"{prefix}{name} is not in every TensorRT-LLM 1.2; it is passed on" for name in given if name in later]
    return problems, notes


def _problem(prefix: str, name: str, known: frozenset[str]) -> str:
    return f"{prefix}{name}: TensorRT-LLM 1.2 has no such argument{meant(name, known, prefix)}"


def meant(name: str, known: Iterable[str], prefix: str = "") -> str:
    """What to add to a text about an unknown name: the nearest known one, if any is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; is {prefix}{near[0]} meant?" if near else ""


def _speculative(config: Any) -> list[str]:
    if not isinstance(config, Mapping):
        return []
    kind = config.get("decoding_type")
    if kind is None:
        return ["speculative_config.decoding_type: is required, such as MTP or Eagle3"]
    known = {name.lower(): names for name, names in fields.SPECULATIVE.items()}.get(str(kind).lower())
    return [] if known is None else _checked(config, "speculative_config.", known, frozenset())[0]


def _load_balancer(moe: Any) -> list[str]:
    balancer = moe.get("load_balancer") if isinstance(moe, Mapping) else None
    if not isinstance(balancer, Mapping):
        return []
    return _checked(balancer, "moe_config.load_balancer.", fields.LOAD_BALANCER, frozenset())[0]
