import json

import pytest

from trtserve.server.model.errors import ModelError
from trtserve.server.model.folder import GenerationDefaults, ModelConfig, ModelFolder


@pytest.fixture
def folder(tmp_path):
    def make(**files):
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return ModelFolder(tmp_path, "some")

    return make


def test_config_of_a_text_model_and_of_the_text_part(folder):
    plain = {"max_position_embeddings": 10, "vocab_size": 20}
    assert folder(config=plain).config() == ModelConfig(10, 20)
    assert folder(config={"vocab_size": 1, "text_config": plain}).config() == ModelConfig(10, 20)
    assert folder(config={}).config() == ModelConfig(None, None)


def test_generation_defaults(folder):
    assert folder(config={}).generation_defaults() == GenerationDefaults()
    assert folder(config={"eos_token_id": 3}).generation_defaults().eos_token_ids == (3,)
    assert folder(config={"text_config": {"eos_token_id": [4, 5]}}).generation_defaults().eos_token_ids == (4, 5)
    generation = {"eos_token_id": [1, 2], "temperature": 1, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1}
    expected = GenerationDefaults((1, 2), 1.0, 0.9, 40, 1.1)
    assert folder(generation_config=generation).generation_defaults() == expected
    greedy = folder(generation_config={**generation, "do_sample": False}).generation_defaults()
    assert greedy == GenerationDefaults((1, 2), repetition_penalty=1.1)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config", '{"vocab_size"', "cannot be read as JSON"),
        ("config", "[]", "holds a list, not a JSON object"),
        ("config", {"vocab_size": "many"}, "vocab_size in .* is 'many'; it must be a number"),
        ("config", {"vocab_size": 1.5}, "is 1.5; it must be a number"),
        ("generation_config", {"eos_token_id": ["x"]}, r"eos_token_id in .* is \['x'\]"),
        ("generation_config", {"top_p": True}, "top_p in .* is True"),
    ],
)
def test_files_that_make_no_sense_are_named(folder, file, content, message):
    model = folder(**{"config": {}, file: content})
    with pytest.raises(ModelError, match=message):
        model.config()
        model.generation_defaults()


def test_small_files_that_may_be_missing(folder):
    model = folder(config={})
    assert model.tokenizer_config() == {}
    assert model.chat_template_file() is None
    (model.path / "chat_template.jinja").write_text("é")
    assert model.chat_template_file() == "é"
    (model.path / "chat_template.jinja").write_bytes(b"\xe9")
    with pytest.raises(ModelError, match=r"chat_template.jinja cannot be read"):
        model.chat_template_file()


def test_fingerprints_follow_the_files(folder):
    model = folder(config={"a": 1}, tokenizer={"b": 2})
    first = model.fingerprints()
    assert len(first.model) == len(first.tokenizer) == 16
    assert model.fingerprints() == first

    header = json.dumps({"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    weights = model.path / "model.safetensors"
    weights.write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    second = model.fingerprints()
    assert second.model != first.model and second.tokenizer == first.tokenizer
    weights.write_bytes(len(header).to_bytes(8, "little") + header + b"5678")
    assert model.fingerprints().model != second.model, "other weights, the same shapes"
    (model.path / "tokenizer.json").write_text("{}")
    assert model.fingerprints().tokenizer != second.tokenizer


@pytest.mark.parametrize("content", [b"", b"123", (10).to_bytes(8, "little") + b"{}", b"\xff" * 8 + b"{}"])
def test_a_weights_file_that_is_cut_off_is_named(folder, content):
    model = folder(config={}, tokenizer={})
    (model.path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors is cut off or is no safetensors file"):
        model.fingerprints()


def test_a_missing_tokenizer_has_no_fingerprint(folder):
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        folder(config={}).fingerprints()
