"""A list of a folder's files with sizes and hashes, written last: a folder is whole when it agrees with its list."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

MANIFEST_NAME = "manifest.json"


def write_manifest(folder: Path, source: str) -> None:
    """List every file of the folder (not its subfolders). source: what the files were made from, checked later."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST_NAME
    }
    text = json.dumps({"source": source, "files": files}, indent=2)
    (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def find_damage(folder: Path, source: str, verify: bool = False) -> str | None:
    """What is wrong with the folder, in a few words, or None if it is whole.

    Presence and sizes are always looked at; `verify` hashes the content too (a second for a few hundred megabytes).
    """
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        if manifest["source"] != source:
            return f"made from {manifest['source']}, not from {source}"
        entries = sorted(manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"no readable {MANIFEST_NAME}"
    for name, entry in entries:
        damage = _file_damage(folder / name, entry, verify)
        if damage is not None:
            return f"{name} {damage}"
    return None


def file_sha256(path: Path) -> str:
    """The hash of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_damage(path: Path, entry: Any, verify: bool) -> str | None:
    try:
        size = path.stat().st_size
        if size != entry["size"]:
            return f"has {size} bytes, not {entry['size']}"
        if verify and file_sha256(path) != entry["sha256"]:
            return "has other content than was written"
    except (OSError, KeyError, TypeError):
        return "is missing"
    return None
