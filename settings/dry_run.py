"""What --dry-run prints of settings: YAML, so it can be used as --config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trtserve.settings.schema import Settings


def resolved_settings(settings: Settings, engine_options: Mapping[str, Any]) -> dict[str, Any]:
    """All that is set, with the engine's options in full and without secrets."""
    resolved = settings.model_dump(mode="json", exclude={"dry_run", "api_key", "worker_token"}, exclude_none=True)
    return resolved | {"engine_options": dict(engine_options)}


def yaml_lines(resolved: Mapping[str, Any]) -> list[str]:
    """One a setting."""
    return [f"{name}: {json.dumps(value)}" for name, value in resolved.items()]
