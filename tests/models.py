"""A model folder without weights for the simulated engine: 1,000 tokens, a chat template, a context of 4,096."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

VOCAB_SIZE = 1000
EOS_TOKEN_ID = 2
MAX_SEQ_LEN = 4096
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_model(folder: Path, chat_template: str = CHAT_TEMPLATE) -> Path:
    """Fill `folder`, which is made if need be. Loads in milliseconds; another template makes another model of it."""
    folder.mkdir(parents=True, exist_ok=True)
    _tokenizer().save(str(folder / "tokenizer.json"))
    config = {"architectures": ["TinyForCausalLM"], "vocab_size": VOCAB_SIZE, "max_position_embeddings": MAX_SEQ_LEN}
    named = {"bos_token": SPECIAL_TOKENS[1], "eos_token": SPECIAL_TOKENS[2], "chat_template": chat_template}
    for name, content in {
        "config.json": config,
        "tokenizer_config.json": named,
        "generation_config.json": {"eos_token_id": EOS_TOKEN_ID},
    }.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def _tokenizer() -> Tokenizer:
    """Every byte is a token, so any text can be encoded; the rest are words that only the engine says."""
    pieces = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [f"Ġw{token_id}" for token_id in range(len(pieces), VOCAB_SIZE)]
    tokenizer = Tokenizer(models.BPE({piece: token_id for token_id, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer
