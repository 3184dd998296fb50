"""Short fingerprints of a model folder, so that a server and its workers can tell that they serve the same thing.

Both read little: the weights themselves are never touched. Two folders with the same architecture, tensor names, shapes
and file layout but other weights have the same model fingerprint; it guards against a wrong folder, not an attacker.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

_LENGTH = 16  # hex digits kept: 64 bits
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format


def model_fingerprint(folder: Path) -> str:
    """16 hex digits over config.json and the header of every ``*.safetensors``, in the order of their names.

    Folders without weights have one too. Raises FileNotFoundError without a config.json, ValueError if a file is no
    safetensors file.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode())
        digest.update(_safetensors_header(path))
    return digest.hexdigest()[:_LENGTH]


def tokenizer_fingerprint(folder: Path) -> str:
    """16 hex digits over tokenizer.json. Raises FileNotFoundError without one."""
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()[:_LENGTH]


def _safetensors_header(path: Path) -> bytes:
    """The 8-byte little-endian length and the JSON header that it counts."""
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        header = file.read(length) if length <= _MAX_HEADER_BYTES else b""
    if len(prefix) < 8 or not header or len(header) < length:
        raise ValueError(f"{path} is cut off or is no safetensors file: its header cannot be read; fetch it again")
    return prefix + header
