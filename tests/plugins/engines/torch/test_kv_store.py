"""The KV store: what travels has one order, whatever the store's own."""

from __future__ import annotations

import pytest
import torch

from trtserve.plugins.engines.torch.kv_store import KVStore, LayerShape

CPU = torch.device("cpu")
UNLIKE = (LayerShape(2, 6, 4), LayerShape(1, 4, 8), LayerShape(1, 8, 8))
ALIKE = (LayerShape(2, 6, 6), LayerShape(1, 6, 6))
WIDE = (LayerShape(170, 64, 64), LayerShape(150, 64, 64))  # more than is copied at once
SIZE = 4


def filled(num_blocks=5, dtype=torch.float32, layers=UNLIKE, block_size=SIZE):
    store = KVStore(layers, num_blocks, block_size, dtype, CPU)
    generator = torch.Generator().manual_seed(0)
    for part in store.keys + store.values:
        part.copy_(torch.randn(part.shape, generator=generator))
    return store


def rows_of(store, block_ids):
    """The rows of these blocks, in their order."""
    memory = torch.zeros(len(block_ids), store.row_width, dtype=store.dtype)
    store.copy_out(block_ids, memory, range(len(block_ids)))
    return memory


@pytest.mark.parametrize("layers", [UNLIKE, ALIKE, WIDE])
def test_a_row_is_layer_then_keys_and_values_then_head_token_dim(layers):
    store = filled(layers=layers)
    (row,) = rows_of(store, [3])
    slots = slice(3 * SIZE, 4 * SIZE)
    wanted = [part[:, slots].flatten() for pair in zip(store.keys, store.values, strict=True) for part in pair]
    assert torch.equal(row, torch.cat(wanted))


@pytest.mark.parametrize("layers", [UNLIKE, ALIKE])
def test_keys_and_values_of_layers_share_no_memory(layers):
    store = KVStore(layers, 5, SIZE, torch.float32, CPU)
    parts = store.keys + store.values
    for number, part in enumerate(parts, 1):
        assert part.is_contiguous() and not part.any()
        part.fill_(number)
    assert [float(part.mean()) for part in parts] == list(range(1, len(parts) + 1))


@pytest.mark.parametrize("layers", [UNLIKE, ALIKE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_survive_the_journey_to_other_ids(dtype, layers):
    source, target = filled(dtype=dtype, layers=layers), KVStore(layers, 9, SIZE, dtype, CPU)
    assert source.layout == target.layout
    memory = torch.full((7, source.row_width), 5, dtype=dtype)
    source.copy_out([4, 0, 2], memory, [6, 1, 3])
    assert memory[1:4:2].nbytes == 2 * KVStore.block_bytes(layers, SIZE, dtype)
    assert torch.equal(memory[[6, 1, 3]], rows_of(source, [4, 0, 2]))
    assert (memory[[0, 2, 4, 5]] == 5).all()
    target.copy_in([8, 1, 5], memory, [6, 1, 3])
    assert torch.equal(rows_of(target, [8, 1, 5]), rows_of(source, [4, 0, 2]))
    assert not rows_of(target, [0, 2, 3, 4, 6, 7]).any()


def test_rows_of_an_odd_number_of_bytes_travel_too():
    layers = (LayerShape(1, 3, 5), LayerShape(3, 1, 1))
    source = filled(dtype=torch.bfloat16, layers=layers, block_size=1)
    target = KVStore(layers, 5, 1, torch.bfloat16, CPU)
    rows = rows_of(source, [2, 4])
    assert rows.shape == (2, 14)
    target.copy_in([0, 3], rows, [1, 0])
    assert torch.equal(rows_of(target, [3, 0]), rows)
    slots = [
        torch.cat([part[:, 4].flatten() for part in pair]) for pair in zip(source.keys, source.values, strict=True)
    ]
    assert torch.equal(rows[1], torch.cat(slots))


def test_layouts_differ_where_the_bytes_would():
    layouts = {
        KVStore(layers, 2, size, dtype, CPU).layout
        for layers in (UNLIKE, UNLIKE[:1], (LayerShape(2, 4, 6), *UNLIKE[1:]))
        for size in (4, 8)
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert len(layouts) == 12
    assert KVStore(UNLIKE, 2, 4, torch.float32, CPU).layout == KVStore(UNLIKE, 7, 4, torch.float32, CPU).layout


@pytest.mark.parametrize("memory", [torch.zeros(1, 3), torch.zeros(2, 192, dtype=torch.bfloat16), torch.zeros(192)])
def test_rows_of_another_size_are_refused(memory):
    store = filled()
    assert store.row_width == 192
    with pytest.raises(ValueError, match="same layout"):
        store.copy_in([0], memory, [0])
    with pytest.raises(ValueError, match="same layout"):
        store.copy_out([0], memory, [0])


def test_cleared_blocks_are_zero_and_others_untouched():
    store = filled()
    others = rows_of(store, [0, 2, 4])
    store.clear_blocks([1, 3])
    assert not rows_of(store, [1, 3]).any()
    assert torch.equal(rows_of(store, [0, 2, 4]), others)


def test_nothing_moves_for_no_blocks():
    store = filled()
    before = rows_of(store, range(5))
    store.copy_in([], torch.ones(2, store.row_width), [])
    assert torch.equal(rows_of(store, range(5)), before)
