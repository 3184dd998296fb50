"""A model's fingerprint: other weights are another model, at the price of a few reads for each tensor."""

import json
import struct

import pytest

from trtserve.plugins.fingerprint import SAMPLE_BYTES, model_fingerprint

TENSORS = {"norm": 48, "embed": 100_000, "layer": 1_000_000}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    entries, place = {"__metadata__": {"format": "pt"}}, 0
    for name, size in TENSORS.items():
        entries[name] = {"dtype": "U8", "shape": [size], "data_offsets": [place, place + size]}
        place += size
    header = json.dumps(entries).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(place))
    return tmp_path


def data_start(content):
    return 8 + int.from_bytes(content[:8], "little")


def test_it_is_the_same_for_the_same_content_under_any_path(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    assert model_fingerprint(folder) == model_fingerprint(other)
    assert len(model_fingerprint(folder)) == 16


@pytest.mark.parametrize("tensor", TENSORS)
def test_a_change_all_over_one_tensor_is_noticed(folder, tensor):
    """As a fine-tune makes it, even where it leaves nine numbers of ten as they were."""
    path = folder / "model.safetensors"
    before, content = model_fingerprint(folder), bytearray(path.read_bytes())
    names = list(TENSORS)
    start = data_start(content) + sum(TENSORS[name] for name in names[: names.index(tensor)])
    content[start : start + TENSORS[tensor] : 10] = b"\1" * len(range(0, TENSORS[tensor], 10))
    path.write_bytes(content)
    assert model_fingerprint(folder) != before


@pytest.mark.parametrize("place", ["first", "last"])
def test_both_ends_of_the_data_count(folder, place):
    path = folder / "model.safetensors"
    before, content = model_fingerprint(folder), bytearray(path.read_bytes())
    start = data_start(content) if place == "first" else len(content) - SAMPLE_BYTES
    content[start : start + SAMPLE_BYTES] = b"\1" * SAMPLE_BYTES
    path.write_bytes(content)
    assert model_fingerprint(folder) != before


def test_a_file_that_ends_early_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cut off"):
        model_fingerprint(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"a": 1}',
        b'{"a": {}}',
        b'{"a": {"data_offsets": [5, 1]}}',
        b'{"a": {"data_offsets": [1]}}',
    ],
)
def test_a_header_that_makes_no_sense_is_refused(folder, header):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match="no safetensors file"):
        model_fingerprint(folder)
