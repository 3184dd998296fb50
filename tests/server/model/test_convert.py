"""The converted folder against what `gguf`, PyTorch, `tokenizers` and transformers make of the same file."""

import json
import struct

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from trtserve.server.model.convert import convert
from trtserve.server.model.folder import ModelFolder
from trtserve.server.model.gguf_file import read_gguf
from trtserve.server.model.llama_weights import to_bfloat16
from trtserve.server.model.manifest import find_damage


@pytest.fixture(scope="module")
def folder(tiny_gguf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    convert(tiny_gguf, folder, "a test")
    return folder


def test_metadata_and_tensors_are_what_the_gguf_package_reads(tiny_gguf):
    ours, theirs = read_gguf(tiny_gguf), gguf.GGUFReader(tiny_gguf)
    for name, value in ours.metadata.items():
        assert theirs.fields[name].contents() == value
    assert [tensor.name for tensor in ours.tensors] == [tensor.name for tensor in theirs.tensors]
    for tensor, reference in zip(ours.tensors, theirs.tensors, strict=True):
        expected = gguf.dequantize(reference.data, reference.tensor_type).reshape(tensor.shape)
        assert tensor.read().dtype == np.float32
        np.testing.assert_array_equal(tensor.read(), expected)


def test_weights_are_in_their_places(tiny_gguf, folder):
    weights = load_file(folder / "model.safetensors")
    source = {tensor.name: torch.from_numpy(tensor.read()) for tensor in read_gguf(tiny_gguf).tensors}
    assert len(weights) == len(source)
    assert torch.equal(weights["model.embed_tokens.weight"], source["token_embd.weight"].bfloat16())
    assert torch.equal(weights["model.layers.1.mlp.down_proj.weight"], source["blk.1.ffn_down.weight"].bfloat16())
    # A head of 16 rows: GGUF has pairs side by side, Hugging Face the halves apart.
    for name, target, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):
        rows = source[f"blk.0.{name}.weight"].reshape(heads, 16, 64)
        expected = torch.cat([rows[:, 0::2], rows[:, 1::2]], dim=1).reshape(heads * 16, 64)
        assert torch.equal(weights[f"model.layers.0.self_attn.{target}.weight"], expected.bfloat16())


@given(st.lists(st.floats(width=32, allow_nan=False).filter(lambda value: abs(value) < 3e38), min_size=1))
def test_rounding_is_that_of_pytorch(values):
    expected = torch.tensor(values, dtype=torch.float32).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(to_bfloat16(np.array(values, np.float32)), expected)


def test_transformers_loads_the_folder(folder):
    torch.set_num_threads(1)
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    config = model.config
    assert (config.max_position_embeddings, config.head_dim, config.eos_token_id) == (512, 16, 2)
    assert config.rope_parameters["rope_theta"] == 10000.0
    assert model.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        "<|im_end|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"


def test_the_tokenizer_merges_and_knows_its_special_tokens(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("ab ba<|im_end|>11").ids == [6, 5, 4, 3, 2, 7, 7]
    assert tokenizer.decode([6, 5, 4, 2], skip_special_tokens=True) == "ab b"


def test_the_manifest_comes_with_it(folder):
    assert find_damage(folder, "a test", verify=True) is None


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("general.architecture", "mamba", "architecture mamba; only llama"),
        ("tokenizer.ggml.pre", "other1", "tokenizer gpt2/other1 cannot"),
    ],
)
def test_what_is_not_known_is_refused(tiny_gguf, tmp_path, field, value, message):
    old = read_gguf(tiny_gguf).metadata[field]
    content = tiny_gguf.read_bytes()
    pattern = struct.pack("<Q", len(field)) + field.encode() + struct.pack("<IQ", 8, len(old)) + old.encode()
    changed = struct.pack("<Q", len(field)) + field.encode() + struct.pack("<IQ", 8, len(value)) + value.encode()
    assert content.count(pattern) == 1
    # The tensors move by less than the alignment only if the lengths agree; they are not read before the refusal.
    (tmp_path / "changed.gguf").write_bytes(content.replace(pattern, changed))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "changed.gguf", tmp_path, "a test")


def test_files_that_are_no_gguf_or_cut_off_are_refused(tiny_gguf, tmp_path):
    (tmp_path / "no.gguf").write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(ValueError, match="is no GGUF file"):
        read_gguf(tmp_path / "no.gguf")
    (tmp_path / "cut.gguf").write_bytes(tiny_gguf.read_bytes()[:-4000])
    with pytest.raises(ValueError, match="cut off"):
        read_gguf(tmp_path / "cut.gguf")


def test_the_default_model_is_what_it_should_be(default_model):
    config = json.loads((default_model / "config.json").read_text())
    assert config["max_position_embeddings"] == 8192
    assert (config["hidden_size"], config["num_hidden_layers"], config["head_dim"]) == (576, 30, 64)
    weights = load_file(default_model / "model.safetensors")
    assert len(weights) == 272
    assert sum(weight.numel() for weight in weights.values()) == 134_515_008
    assert all(weight.dtype is torch.bfloat16 for weight in weights.values())
    assert (default_model / "LICENSE").read_text().count("Apache License") > 0
    assert "dequantised to bfloat16" in (default_model / "NOTICE").read_text()
    defaults = ModelFolder(default_model, "default").generation_defaults()
    assert (defaults.eos_token_ids, defaults.temperature, defaults.top_p) == ((2,), 0.2, 0.9)
