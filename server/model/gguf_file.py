"""A reader of GGUF files: metadata as plain values, tensors as float32 arrays.

Source: the GGUF specification (docs/gguf.md of ggml-org/ggml), versions 2 and 3, little-endian, and the block layouts
of ggml-common.h. Only the block types that the shipped model needs are read. The parser walks the bytes with `struct`,
which for a vocabulary of 50,000 strings takes a tenth of a second, where the general `gguf` package takes seconds.

Imports numpy: for the conversion process only, never for the server.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Float32s = npt.NDArray[np.float32]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
# GGUF value type -> struct format
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A stored tensor. shape: outermost first, as in PyTorch (the file has it the other way round)."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Float32s]  # dequantised; a new float32[shape] each call


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """metadata: ``general.architecture`` and the like -> int, float, bool, str or list of those."""

    metadata: Mapping[str, Any]
    tensors: tuple[GGUFTensor, ...]


def read_gguf(path: Path) -> GGUFFile:
    """Read the metadata and lay out the tensors; their bytes stay in the file, memory-mapped, until they are read.

    Raises ValueError if the file is no GGUF file that this reader knows.
    """
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(data)
    if data[:4] != _MAGIC:
        raise ValueError(f"{path} is no GGUF file: it begins with {data[:4]!r}, not {_MAGIC!r}")
    cursor.offset = 4
    version = cursor.scalar("<I")
    if version not in _VERSIONS:
        raise ValueError(f"{path} is GGUF version {version}; versions {_VERSIONS} are read")
    num_tensors, num_fields = cursor.scalar("<Q"), cursor.scalar("<Q")
    metadata = {cursor.string(): cursor.value(cursor.scalar("<I")) for _ in range(num_fields)}
    infos = [_tensor_info(cursor) for _ in range(num_tensors)]
    alignment = int(metadata.get("general.alignment", _DEFAULT_ALIGNMENT))
    start = -(-cursor.offset // alignment) * alignment
    return GGUFFile(metadata, tuple(_tensor(data, start, *info) for info in infos))


class _Cursor:
    """Walks over the header."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.offset = 0

    def scalar(self, layout: str) -> Any:
        (value,) = struct.unpack_from(layout, self.data, self.offset)
        self.offset += struct.calcsize(layout)
        return value

    def string(self) -> str:
        length = self.scalar("<Q")
        self.offset += length
        return self.data[self.offset - length : self.offset].decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            element, count = self.scalar("<I"), self.scalar("<Q")
            return [self.value(element) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"GGUF value type {kind} at byte {self.offset} is unknown")
        return self.scalar(_SCALARS[kind])


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    num_dimensions = cursor.scalar("<I")
    shape = tuple(cursor.scalar("<Q") for _ in range(num_dimensions))[::-1]
    return name, shape, cursor.scalar("<I"), cursor.scalar("<Q")


def _tensor(data: mmap.mmap, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
    if kind not in _BLOCKS:
        known = ", ".join(block.name for block in _BLOCKS.values())
        raise ValueError(f"tensor {name} has GGUF type {kind}; the types {known} are read")
    block = _BLOCKS[kind]
    num_elements = int(np.prod(shape))
    num_bytes = num_elements // block.num_elements * block.num_bytes
    if start + offset + num_bytes > len(data):
        raise ValueError(f"the GGUF file is cut off: tensor {name} ends past its last byte; fetch it again")

    def read() -> Float32s:
        raw = np.frombuffer(data, np.uint8, num_bytes, start + offset).reshape(-1, block.num_bytes)
        return block.dequantise(raw).reshape(shape)

    return GGUFTensor(name, shape, read)


def _float32(raw: npt.NDArray[np.uint8]) -> Float32s:
    return raw.reshape(-1).view(np.float32).copy()


def _float16(raw: npt.NDArray[np.uint8]) -> Float32s:
    return raw.reshape(-1).view(np.float16).astype(np.float32)


def _q4_1(raw: npt.NDArray[np.uint8]) -> Float32s:
    """A half-precision scale and minimum, then 32 nibbles: the low ones are the first 16 values."""
    scale = raw[:, 0:2].view(np.float16).astype(np.float32)
    minimum = raw[:, 2:4].view(np.float16).astype(np.float32)
    values = np.empty((len(raw), 32), np.float32)
    values[:, :16] = raw[:, 4:] & 15
    values[:, 16:] = raw[:, 4:] >> 4
    values *= scale
    values += minimum
    return values


def _q8_0(raw: npt.NDArray[np.uint8]) -> Float32s:
    """A half-precision scale, then 32 signed bytes."""
    values = raw[:, 2:].view(np.int8).astype(np.float32)
    values *= raw[:, 0:2].view(np.float16).astype(np.float32)
    return values


@dataclass(frozen=True, slots=True)
class _Block:
    name: str
    num_elements: int
    num_bytes: int
    dequantise: Callable[[npt.NDArray[np.uint8]], Float32s]


_BLOCKS = {
    0: _Block("F32", 1, 4, _float32),
    1: _Block("F16", 1, 2, _float16),
    3: _Block("Q4_1", 32, 20, _q4_1),
    8: _Block("Q8_0", 32, 34, _q8_0),
}
