"""The settings files that are shipped: `--config NAME` takes one by its name, such as ``deepseek_r1/disagg``."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

_SUFFIX = ".yaml"


@dataclass(frozen=True, slots=True)
class Profile:
    """One shipped file. Its first line is a comment that says what it is."""

    name: str
    text: str

    @property
    def summary(self) -> str:
        """Its first line, a comment."""
        return self.text.partition("\n")[0].lstrip("# ")


def profiles() -> list[Profile]:
    """By name."""
    return sorted(_below(files("trtserve.settings") / "profiles", ""), key=lambda profile: profile.name)


def find_profile(name: str) -> Profile | None:
    """By name, with or without .yaml; None: there is none."""
    return next((profile for profile in profiles() if profile.name == name.removesuffix(_SUFFIX)), None)


def nearest_names(name: str) -> list[str]:
    """Profiles that may have been meant."""
    return difflib.get_close_matches(name, [profile.name for profile in profiles()], n=3)


def _below(folder: Traversable, prefix: str) -> Iterator[Profile]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _below(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(_SUFFIX):
            yield Profile(prefix + entry.name.removesuffix(_SUFFIX), entry.read_text(encoding="utf-8"))
