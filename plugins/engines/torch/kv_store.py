"""The memory behind the KV blocks, and the one order in which blocks travel."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from xxhash import xxh3_64_hexdigest


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
    blocks that a batch gathers are already in the order of a batched matrix product. The tensors live as long as
    the store; on the CPU a page of memory is taken when it is first written.
    """

    def __init__(
        self, layers: Sequence[LayerShape], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layers = tuple(layers)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.device = device
        slots = num_blocks * block_size
        self.keys = [_zeros((layer.kv_heads, slots, layer.key_dim), dtype, device) for layer in self.layers]
        self.values = [_zeros((layer.kv_heads, slots, layer.value_dim), dtype, device) for layer in self.layers]

    @staticmethod
    def block_bytes(layers: Sequence[LayerShape], block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers."""
        return block_size * dtype.itemsize * sum(layer.width for layer in layers)

    @property
    def layout(self) -> str:
        """Fingerprint of what `export_blocks` gives; two stores with the same one can exchange blocks."""
        shapes = ",".join(f"{layer.kv_heads}x{layer.key_dim}+{layer.value_dim}" for layer in self.layers)
        kind = str(self.dtype).removeprefix("torch.")
        return f"kv1-{kind}-{self.block_size}-{len(self.layers)}-{xxh3_64_hexdigest(shapes.encode())}"

    def export_blocks(self, block_ids: Sequence[int]) -> Tensor:
        """A contiguous copy, [len(block_ids), numbers of a block], on the store's device.

        Each row is one block in the order [layer][keys, values][head][token][dim].
        """
        ids = torch.tensor(block_ids, dtype=torch.long, device=self.device)
        parts = [part.index_select(1, ids).transpose(0, 1).flatten(1) for part in self._by_block()]
        return torch.cat(parts, dim=1)

    def import_blocks(self, block_ids: Sequence[int], data: Tensor) -> None:
        """Write what `export_blocks` of a store with the same layout gave; raises ValueError on another size."""
        width = self.block_size * sum(layer.width for layer in self.layers)
        if data.shape != (len(block_ids), width) or data.dtype != self.dtype:
            raise ValueError(
                f"{len(block_ids)} KV blocks of layout {self.layout} are {self.dtype}[{len(block_ids)}, {width}], "
                f"not {data.dtype}{list(data.shape)}: exchange blocks between workers with the same layout only"
            )
        ids = torch.tensor(block_ids, dtype=torch.long, device=self.device)
        start = 0
        for part in self._by_block():
            heads, _, numbers = part.shape
            rows = data[:, start : start + heads * numbers].to(self.device)
            part.index_copy_(1, ids, rows.view(-1, heads, numbers).transpose(0, 1).contiguous())
            start += heads * numbers

    def clear_blocks(self, block_ids: Sequence[int]) -> None:
        """Set blocks to zero. For contents with NaN, which would spread to whoever reads the block's unused slots."""
        ids = torch.tensor(block_ids, dtype=torch.long, device=self.device)
        for part in self._by_block():
            part.index_fill_(1, ids, 0)

    def _by_block(self) -> Iterator[Tensor]:
        """Views [kv_heads, num_blocks, block_size * dim]: keys, then values, layer by layer."""
        for keys, values in zip(self.keys, self.values, strict=True):
            yield keys.view(keys.shape[0], self.num_blocks, -1)
            yield values.view(values.shape[0], self.num_blocks, -1)


def _zeros(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros would write every page now; anonymous memory is zero without being touched
    heads, slots, dim = shape
    return torch.frombuffer(mmap.mmap(-1, heads * slots * dim * dtype.itemsize), dtype=dtype).view(shape)
