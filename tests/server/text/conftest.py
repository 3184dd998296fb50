"""Tokenizers of the two families: the default model's byte-level one, and a small sentencepiece-like one."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from trtserve.server.model.folder import ModelFolder
from trtserve.server.text.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def default_folder(default_model):
    return ModelFolder(default_model, "default")


@pytest.fixture(scope="session")
def tokenizer(default_folder):
    return load_tokenizer(default_folder)


@pytest.fixture(scope="session")
def reference(default_folder):
    """`tokenizers` itself, for the default model."""
    return Tokenizer.from_file(str(default_folder.tokenizer_json))


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory):
    """A BPE with byte fallback that writes spaces as U+2581 and strips the first one, as Llama 2's."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *"abcdefgh",
        "\u2581a",
        "bc",
    ]
    vocabulary = {piece: token_id for token_id, piece in enumerate(pieces)}
    backend = Tokenizer(
        models.BPE(vocabulary, [("\u2581", "a"), ("b", "c")], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>")])
    backend.enable_truncation(5)
    folder = tmp_path_factory.mktemp("sentencepiece")
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}})
    )
    return ModelFolder(folder, "sentencepiece")


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(sentencepiece_folder):
    return load_tokenizer(sentencepiece_folder)
