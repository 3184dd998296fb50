"""The KV store: what travels has one order, whatever the store's own."""

from __future__ import annotations

import pytest
import torch

from trtserve.plugins.engines.torch.kv_store import KVStore, LayerShape

CPU = torch.device("cpu")
LAYERS = (LayerShape(2, 6, 4), LayerShape(1, 8, 8))
SIZE = 4


def filled(num_blocks=5, dtype=torch.float32, layers=LAYERS):
    store = KVStore(layers, num_blocks, SIZE, dtype, CPU)
    generator = torch.Generator().manual_seed(0)
    for part in store.keys + store.values:
        part.copy_(torch.randn(part.shape, generator=generator))
    return store


def test_a_row_is_layer_then_keys_and_values_then_head_token_dim():
    store = filled()
    (row,) = store.export_blocks([3])
    slots = slice(3 * SIZE, 4 * SIZE)
    wanted = [part[:, slots].flatten() for pair in zip(store.keys, store.values, strict=True) for part in pair]
    assert torch.equal(row, torch.cat(wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_survive_the_journey_to_other_ids(dtype):
    source, target = filled(dtype=dtype), KVStore(LAYERS, 9, SIZE, dtype, CPU)
    assert source.layout == target.layout
    data = source.export_blocks([4, 0, 2])
    assert data.is_contiguous()
    assert data.nbytes == 3 * KVStore.block_bytes(LAYERS, SIZE, dtype)
    target.import_blocks([8, 1, 5], data)
    assert torch.equal(target.export_blocks([8, 1, 5]), data)
    assert not target.export_blocks([0, 2, 3, 4, 6, 7]).any()


def test_layouts_differ_where_the_bytes_would():
    layouts = {
        KVStore(layers, 2, size, dtype, CPU).layout
        for layers in (LAYERS, LAYERS[:1], (LayerShape(2, 4, 6), LAYERS[1]))
        for size in (4, 8)
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert len(layouts) == 12
    assert KVStore(LAYERS, 2, 4, torch.float32, CPU).layout == KVStore(LAYERS, 7, 4, torch.float32, CPU).layout


def test_data_of_another_size_is_refused():
    store = filled()
    with pytest.raises(ValueError, match="same layout"):
        store.import_blocks([0], torch.zeros(1, 3))
    with pytest.raises(ValueError, match="same layout"):
        store.import_blocks([0], store.export_blocks([1]).bfloat16())


def test_cleared_blocks_are_zero_and_others_untouched():
    store = filled()
    others = store.export_blocks([0, 2, 4])
    store.clear_blocks([1, 3])
    assert not store.export_blocks([1, 3]).any()
    assert torch.equal(store.export_blocks([0, 2, 4]), others)


def test_nothing_moves_for_no_blocks():
    store = filled()
    assert store.export_blocks([]).shape == (0, SIZE * sum(layer.width for layer in LAYERS))
    store.import_blocks([], store.export_blocks([]))
