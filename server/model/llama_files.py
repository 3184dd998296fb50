"""The JSON files of a Hugging Face folder, made from the metadata of a Llama-shaped GGUF file.

Plain dictionaries in, plain dictionaries out; nothing is imported that the server may not import.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Metadata = Mapping[str, Any]
Json = dict[str, Any]

_CONTROL = 3  # GGUF token type of special tokens

_SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
"""The GGUF file does not say how to sample, and at temperature 1 a model so small wanders off."""


def model_config(metadata: Metadata, has_own_head: bool) -> Json:
    """config.json. has_own_head: the file has an output matrix apart from the embedding."""
    rope_theta = float(metadata["llama.rope.freq_base"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "max_position_embeddings": metadata["llama.context_length"],
        # GGUF keeps it as float32; ten digits of that are what was meant.
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": rope_theta,  # read by transformers 4 and by most engines
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},  # transformers 5
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": not has_own_head,
        **_special_ids(metadata),
    }


def generation_config(metadata: Metadata) -> Json:
    """generation_config.json: what ends a sequence, and how to sample where a client does not say."""
    return {**_SAMPLING, **_special_ids(metadata)}


def tokenizer(metadata: Metadata) -> Json:
    """tokenizer.json of a byte-level BPE that splits digits one by one (llama.cpp's pre-tokenizer ``smollm``)."""
    kind, split = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre")
    if (kind, split) != ("gpt2", "smollm"):
        raise ValueError(f"a GGUF tokenizer {kind}/{split} cannot be converted; gpt2/smollm can")
    tokens = metadata["tokenizer.ggml.tokens"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token_id, **_added(tokens[token_id])} for token_id in _control_ids(metadata)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
        },
    }


def tokenizer_config(metadata: Metadata) -> Json:
    """tokenizer_config.json, with the chat template."""
    tokens = metadata["tokenizer.ggml.tokens"]
    named = {
        f"{name}_token": tokens[metadata[f"tokenizer.ggml.{field}_token_id"]]
        for name, field in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{field}_token_id" in metadata
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": metadata.get("tokenizer.ggml.add_space_prefix", False),
        "added_tokens_decoder": {str(token_id): _added(tokens[token_id]) for token_id in _control_ids(metadata)},
        "chat_template": metadata["tokenizer.chat_template"],
        **named,
    }


def _special_ids(metadata: Metadata) -> Json:
    fields = (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    ids = {f"{name}_token_id": metadata.get(f"tokenizer.ggml.{field}_token_id") for name, field in fields}
    return {name: token_id for name, token_id in ids.items() if token_id is not None}


def _control_ids(metadata: Metadata) -> list[int]:
    return [token_id for token_id, kind in enumerate(metadata["tokenizer.ggml.token_type"]) if kind == _CONTROL]


def _added(content: str) -> Json:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"content": content, **flags}
