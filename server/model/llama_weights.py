"""The weights of a Llama-shaped GGUF file as one bfloat16 safetensors file with the names of Hugging Face.

GGUF keeps the rows of the query and key projections in the order of the original rotary code (pairs side by side);
the Hugging Face classes want the halves apart, so those rows are put back. Rounding to bfloat16 is to nearest, ties to
even, as PyTorch's cast. Format: the safetensors README (8-byte length, JSON header, tensors without gaps).

Imports numpy: for the conversion process only, never for the server.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trtserve.server.model.gguf_file import Float32s, GGUFFile, GGUFTensor

_MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_weights(source: GGUFFile, path: Path, progress: Callable[[int, int], None]) -> None:
    """Write the safetensors file, one tensor in memory at a time. progress: tensors written, tensors in all."""
    named = [
        (_hugging_face_name(tensor.name), tensor) for tensor in source.tensors if tensor.name != "rope_freqs.weight"
    ]
    header = _header((name, tensor.shape) for name, tensor in named)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for written, (_, tensor) in enumerate(named):
            progress(written, len(named))
            file.write(to_bfloat16(_in_our_order(tensor, source.metadata)).data)
    progress(len(named), len(named))


def to_bfloat16(values: Float32s) -> npt.NDArray[np.uint16]:
    """The bits of the nearest bfloat16s, ties to even. values: finite float32 of any shape; it is used up."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    bits += 0x7FFF + (bits >> 16 & 1)
    return np.ascontiguousarray(bits.view(np.uint16)[..., 1::2])


def _in_our_order(tensor: GGUFTensor, metadata: Mapping[str, Any]) -> Float32s:
    weight = tensor.read()
    if tensor.name.endswith("attn_q.weight"):
        return _apart(weight, metadata["llama.attention.head_count"])
    if tensor.name.endswith("attn_k.weight"):
        return _apart(weight, metadata["llama.attention.head_count_kv"])
    return weight


def _apart(weight: Float32s, num_heads: int) -> Float32s:
    """float32[num_heads * head_dim, hidden]: rows 0, 1, 2, 3 … of a head become 0, 2, 4 …, 1, 3, 5 …"""
    rows, hidden = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, hidden).swapaxes(1, 2).reshape(rows, hidden)


def _hugging_face_name(name: str) -> str:
    parts = name.split(".")
    try:
        if parts[0] == "blk":
            return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
        return f"{_MODEL_NAMES[parts[0]]}.{parts[1]}"
    except (KeyError, IndexError):
        raise ValueError(f"tensor {name} has no place in a Llama model") from None


def _header(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        begin, end = end, end + 2 * int(np.prod(shape))
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)
