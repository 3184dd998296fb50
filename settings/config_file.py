"""Settings from a YAML file, with the flags' names as keys, or from a profile that is shipped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trtserve.settings.catalog import find_profile, nearest_names
from trtserve.settings.errors import SettingsError
from trtserve.settings.names import field_name
from trtserve.settings.schema import SECTIONS


def read_config(path: str) -> dict[str, Any]:
    """A YAML file's mapping, or a shipped profile's where there is no such file, with fields' names as keys. Raises
    SettingsError."""
    profile = None if Path(path).is_file() else find_profile(path)
    try:
        content = yaml.load(Path(path).read_text() if profile is None else profile.text, _Loader)
    except OSError as error:
        meant = f", and no profile; `trtserve profiles` lists them{_or_meant(path)}"
        raise SettingsError(f"--config {path}: {error.strerror}{meant}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path}: not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"--config {path}: must hold a mapping of settings, not a {type(content).__name__}")
    settings = _named(content, path, "")
    for section in SECTIONS & settings.keys():
        if isinstance(settings[section], dict):
            settings[section] = _named(settings[section], path, f"{section.replace('_', '-')}.")
    return settings


def _named(content: Mapping[Any, Any], path: str, section: str) -> dict[str, Any]:
    """By the fields' names."""
    settings: dict[str, Any] = {}
    for key, value in content.items():
        name = field_name(str(key))
        if name in settings:
            dashed = name.replace("_", "-")
            raise SettingsError(f"--config {path}: {section}{key} sets {section}{dashed}, which it has set before")
        settings[name] = value
    return settings


def _or_meant(name: str) -> str:
    names = nearest_names(name)
    return f" (perhaps {', '.join(names)})" if names else ""


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice. YAML forbids it, and PyYAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        "while reading a mapping",
                        node.start_mark,
                        f"the key {key.value} is there twice",
                        key.start_mark,
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)
