"""The memory behind the KV blocks, and the one order in which blocks travel."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from math import gcd

import torch
from torch import Tensor
from xxhash import xxh3_64_hexdigest

_WORDS = (torch.int64, torch.int32, torch.int16)  # what bytes are copied as, whatever they mean
_MADV_POPULATE_WRITE = 23  # of Linux; Python has no name for it
_SERIAL_WORDS = 32_767  # torch copies as many with one thread and more with all of them (at::internal::GRAIN_SIZE)


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer stores for a token: `kv_heads` keys of `key_dim` and values of `value_dim` numbers."""

    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def width(self) -> int:
        """Numbers for one token, keys and values together."""
        return self.kv_heads * (self.key_dim + self.value_dim)


class KVStore:
    """Keys and values of all layers for `num_blocks` blocks, zero at first.

    `keys[layer]` is [kv_heads, num_blocks * block_size, key_dim], `values[layer]` likewise: head-major, so that the
    blocks that a batch gathers are already in the order of a batched matrix product. `pairs[layer]` is both as one view
    [2 * kv_heads, ...], or None where they differ in dim. `slabs`, [heads, num_blocks * block_size, dim], hold all of
    them; stores of the same layers have the same heads in each. The tensors live as long as the store; on the CPU all
    their memory is taken at once, with `is_lazy` as it is first written, a huge page at a time.

    A block travels as a row of `row_width` numbers in the order [layer][keys, values][head][token][dim]. Heads of equal
    dim that follow one another in this order lie in one piece of memory, so that a row of nearly all models is a few
    strided copies. On the CPU each is small enough for one thread: it copies at the speed of memory, while waiting for
    more threads many times in a row costs far more where others keep the cores busy. On a CUDA device, where it's the
    launch that costs, all blocks go at once, by way of a temporary copy.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        is_lazy: bool = False,
    ) -> None:
        self.layers = tuple(layers)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.device = device
        self.row_width = block_size * sum(layer.width for layer in self.layers)
        parts = [(layer.kv_heads, dim) for layer in self.layers for dim in (layer.key_dim, layer.value_dim)]
        word = _word(gcd(*(block_size * dim * dtype.itemsize for _, dim in parts)))
        self.slabs: list[Tensor] = []
        self._pieces: list[Tensor] = []  # each [heads, num_blocks, words of a block], in the order of a row
        views: list[Tensor] = []
        for dim, run in groupby(parts, key=lambda part: part[1]):
            heads = [kv_heads for kv_heads, _ in run]
            slab = _zeros((sum(heads), num_blocks * block_size, dim), dtype, device, is_lazy)
            self.slabs.append(slab)
            views += torch.split(slab, heads)
            words = slab.view(slab.shape[0], num_blocks, -1).view(word)
            at_once = _SERIAL_WORDS // words.shape[2] if device.type == "cpu" else words.shape[0]
            self._pieces += torch.split(words, max(1, at_once))
        self.keys, self.values = views[::2], views[1::2]
        self.pairs = [_pair(key, value) for key, value in zip(self.keys, self.values, strict=True)]

    @staticmethod
    def block_bytes(layers: Sequence[LayerShape], block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers."""
        return block_size * dtype.itemsize * sum(layer.width for layer in layers)

    @property
    def layout(self) -> str:
        """Fingerprint of what a row is; two stores with the same one can exchange rows."""
        shapes = ",".join(f"{layer.kv_heads}x{layer.key_dim}+{layer.value_dim}" for layer in self.layers)
        kind = str(self.dtype).removeprefix("torch.")
        return f"kv1-{kind}-{self.block_size}-{len(self.layers)}-{xxh3_64_hexdigest(shapes.encode())}"

    @torch.inference_mode()
    def copy_out(self, block_ids: Sequence[int], memory: Tensor, rows: Sequence[int]) -> None:
        """Copy each block into a row of `memory`, [rows there are, row_width] of the store's dtype.

        On a CUDA device the copies are only queued.
        """
        for part, slab in self._parts_of(memory):
            if self.device.type == "cpu":
                for block_id, row in zip(block_ids, rows, strict=True):
                    part[row].copy_(slab[:, block_id])
            else:
                blocks = slab.index_select(1, self._index(block_ids)).transpose(0, 1)
                part.index_copy_(0, self._index(rows), blocks)

    @torch.inference_mode()
    def copy_in(self, block_ids: Sequence[int], memory: Tensor, rows: Sequence[int]) -> None:
        """The way back: what `copy_out` of a store with the same layout put into these rows becomes these blocks."""
        for part, slab in self._parts_of(memory):
            if self.device.type == "cpu":
                for block_id, row in zip(block_ids, rows, strict=True):
                    slab[:, block_id].copy_(part[row])
            else:
                blocks = part.index_select(0, self._index(rows)).transpose(0, 1)
                slab.index_copy_(1, self._index(block_ids), blocks)

    def clear_blocks(self, block_ids: Sequence[int]) -> None:
        """Set blocks to zero. For contents with NaN, which would spread to whoever reads the block's unused slots."""
        for slab in self._pieces:
            slab.index_fill_(1, self._index(block_ids), 0)

    def _index(self, places: Sequence[int]) -> Tensor:
        return torch.tensor(places, dtype=torch.long, device=self.device)

    def _parts_of(self, memory: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views [rows there are, heads, words of a block] of rows, each with the slab whose contents it takes."""
        if memory.dim() != 2 or memory.shape[1] != self.row_width or memory.dtype != self.dtype:
            raise ValueError(
                f"rows of layout {self.layout} are {self.dtype}[…, {self.row_width}], not "
                f"{memory.dtype}{list(memory.shape)}: exchange KV between workers with the same layout only"
            )
        start = 0
        flat = memory.view(torch.uint8)
        for slab in self._pieces:
            heads, _, words = slab.shape
            num_bytes = heads * words * slab.itemsize
            yield flat[:, start : start + num_bytes].view(slab.dtype).view(-1, heads, words), slab
            start += num_bytes


def _pair(key: Tensor, value: Tensor) -> Tensor | None:
    """Keys and values that follow one another in a slab, as one view."""
    if key.shape[2] != value.shape[2]:
        return None
    return key.as_strided((2 * key.shape[0], *key.shape[1:]), key.stride())


def _word(num_bytes: int) -> torch.dtype:
    """The widest that so many bytes are a whole number of."""
    return next((word for word in _WORDS if num_bytes % word.itemsize == 0), torch.uint8)


def _zeros(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, is_lazy: bool) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    heads, slots, dim = shape
    # private: for shared memory, mmap's default, Linux has huge pages only where an administrator allows it
    memory = mmap.mmap(-1, heads * slots * dim * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _advise(memory, getattr(mmap, "MADV_HUGEPAGE", None))
    if not is_lazy:
        # a page that is first touched by a request costs it some microseconds: KV that another worker has computed is
        # then written at a tenth of memory's speed
        _advise(memory, _MADV_POPULATE_WRITE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _advise(memory: mmap.mmap, advice: int | None) -> None:
    if advice is not None:
        with suppress(OSError):  # a kernel without it, older than 5.14 say, gives small pages as they are touched
            memory.madvise(advice)
