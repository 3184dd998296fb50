"""Which tokens come: a pure function of all tokens before, so that any worker goes on where another one stopped.

A state is the CRC-32 of the token ids as int32; 64 mixed bits of it choose the token. Sequence k of a request with
n > 1 mixes k in, and where a request samples its seed. Temperatures and penalties change nothing; a bias does.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

from .environment import Environment
from .model_folder import ModelFolder

_MASK = (1 << 64) - 1
_CANDIDATES = 20  # that a bias or `logprobs` can see; each is 1.0 less likely than the one before
_OTHERS = -60.0  # logit of a token that is no candidate


def mixed(value: int) -> int:
    """64 well-mixed bits of a number (splitmix64's finalizer)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def digest(token_ids: list[int]) -> int:
    """What a prompt's KV is recognised by."""
    return crc32(array("i", token_ids).tobytes())


@dataclass(slots=True)
class TokenStream:
    """One sequence: `next` gives the token after all those before. `state` is the digest of them."""

    model: ModelFolder
    environment: Environment
    state: int
    sequence_index: int = 0
    bias: dict[int, float] = field(default_factory=dict)
    generated: int = 0
    seed: int = 0  # of a request that samples

    def next(self, end_id: int | None) -> int:
        """The next token; `end_id` where the sequence would end now and the caller allows an end (it is not None)."""
        draw = mixed(self.state ^ (self.sequence_index << 40) ^ (mixed(self.seed) if self.seed else 0))
        token = end_id if end_id is not None and self._ends(draw) else self._chosen(draw)
        self.advance(token)
        return token

    def advance(self, token: int) -> None:
        """Take a token as said, whoever said it."""
        self.state = crc32(array("i", [token]).tobytes(), self.state)
        self.generated += 1

    def top(self, token: int, count: int) -> dict[int, float]:
        """Log probabilities of the last token and of the `count` likeliest, the last token among them. The likeliest
        is the token itself, the others are made up."""
        alternatives = {token: -0.25}
        draw = mixed(self.state ^ token)
        while len(alternatives) < count:
            draw = mixed(draw)
            alternatives.setdefault(self._ordinary(draw), -1.5 - len(alternatives))
        return alternatives

    def _ends(self, draw: int) -> bool:
        if self.environment.length == "never":
            return False
        if self.environment.length == "natural":
            return (draw >> 32) % 64 == 0
        return self.generated >= int(self.environment.length)

    def _chosen(self, draw: int) -> int:
        if not self.bias:
            return self._ordinary(draw)
        logits = {token: _OTHERS + bias for token, bias in self.bias.items()}
        for rank in range(_CANDIDATES):
            token = self._ordinary(mixed(draw + rank) if rank else draw)
            logits[token] = max(logits.get(token, -1e9), -rank + self.bias.get(token, 0.0))
        return max(logits, key=lambda token: (logits[token], -token))

    def _ordinary(self, draw: int) -> int:
        first, last = self.environment.tokens or (0, self.model.vocab_size - 1)
        while True:
            token = first + (draw & 0xFFFFFFFF) % (last - first + 1)
            if token not in self.model.special_ids:
                return token
            draw = mixed(draw)


def bias_entries(embedding_bias: Any, vocab_size: int) -> dict[int, float]:
    """The entries of a float32 vector of the vocabulary's size that are not zero. ValueError where it is none."""
    if embedding_bias is None:
        return {}
    shape = tuple(embedding_bias.shape) if hasattr(embedding_bias, "shape") else (len(embedding_bias),)
    if shape != (vocab_size,):
        raise ValueError(f"embedding_bias has shape {shape}, not ({vocab_size},)")
    if "float32" not in str(getattr(embedding_bias, "dtype", "float32")):
        raise ValueError(f"embedding_bias is {embedding_bias.dtype}, not float32")
    values = embedding_bias.tolist() if hasattr(embedding_bias, "tolist") else embedding_bias
    return {token: float(value) for token, value in enumerate(values) if value}
