"""Short fingerprints of a model folder, so that a server and its workers can tell that they serve the same thing.

Both read little. Of the weights themselves some bytes of every tensor count, so that two fine-tunes of one model, whose
KV must never be exchanged, do not look alike. A change of a few numbers that lie between the samples is not noticed:
this guards against a wrong folder, not an attacker.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

_LENGTH = 16  # hex digits kept: 64 bits
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format

SAMPLES = 4
SAMPLE_BYTES = 256
"""So many places of each tensor, spread evenly from its first byte to its last, and so much at each. In bfloat16 that
is 512 numbers: a training step with a small learning rate leaves many of them as they were, and not all."""


def model_fingerprint(folder: Path) -> str:
    """16 hex digits over config.json and, for every ``*.safetensors`` in the order of their names, its name, size,
    header and samples of its tensors.

    Folders without weights have one too. Raises FileNotFoundError without a config.json, ValueError if a file is no
    whole safetensors file.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode())
        digest.update(path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb", buffering=0) as file:
            for piece in _pieces(file, path):
                digest.update(piece)
    return digest.hexdigest()[:_LENGTH]


def tokenizer_fingerprint(folder: Path) -> str:
    """16 hex digits over tokenizer.json. Raises FileNotFoundError without one."""
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()[:_LENGTH]


def _pieces(file: BinaryIO, path: Path) -> Iterable[bytes]:
    header = _safetensors_header(file, path)
    yield header
    for start, end in _tensors(header, path):
        step = max(0, end - start - SAMPLE_BYTES) // (SAMPLES - 1)
        for place in dict.fromkeys(start + number * step for number in range(SAMPLES)):
            size = min(SAMPLE_BYTES, end - place)
            file.seek(place)
            sample = file.read(size)
            if len(sample) < size:
                raise ValueError(f"{path} is cut off: its tensors go beyond its end; fetch it again")
            yield sample


def _safetensors_header(file: BinaryIO, path: Path) -> bytes:
    """The 8-byte little-endian length and the JSON header that it counts."""
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    header = file.read(length) if length <= _MAX_HEADER_BYTES else b""
    if len(prefix) < 8 or not header or len(header) < length:
        raise ValueError(f"{path} is cut off or is no safetensors file: its header cannot be read; fetch it again")
    return prefix + header


def _tensors(header: bytes, path: Path) -> list[tuple[int, int]]:
    """Where each tensor's bytes begin and end in the file, in order."""
    try:
        entries = json.loads(header[8:])
        offsets = [entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"]
        places = [(len(header) + int(start), len(header) + int(end)) for start, end in offsets]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is cut off or is no safetensors file: its header makes no sense ({error})") from error
    if any(start < len(header) or end < start for start, end in places):
        raise ValueError(f"{path} is no safetensors file: a tensor of its header ends before it begins")
    return sorted(places)
