"""The settings of one role: the sections `prefill` and `decode` laid over the settings that all workers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from trtserve.settings.schema import RoleSettings, Settings

AnySettings = TypeVar("AnySettings", bound=Settings)

_CACHE_SIZES = frozenset({"num_blocks", "kv_cache_gib"})


def for_role(settings: AnySettings, role: str) -> AnySettings:
    """The settings as an engine of this role has them. What a section says comes before the setting of the same name,
    wherever either was given; engine options are laid over each other name by name."""
    section = {"prefill": settings.prefill, "decode": settings.decode}.get(role, RoleSettings())
    given = {name: value for name in RoleSettings.model_fields if (value := getattr(section, name)) is not None}
    if _CACHE_SIZES & given.keys():
        # The two exclude each other: a section that gives one puts the other aside.
        given = {name: given.get(name) for name in _CACHE_SIZES} | given
    given["engine_options"] = laid_over(settings.engine_options, section.engine_options)
    return settings.model_copy(update=given)


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Name by name; where both have a mapping, the names in it too, and no deeper."""
    together = {**below, **above}
    for name in below.keys() & above.keys():
        if isinstance(below[name], Mapping) and isinstance(above[name], Mapping):
            together[name] = {**below[name], **above[name]}
    return together
