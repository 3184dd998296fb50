"""Which tokens the simulated model says: a pure function of a seed and of all tokens before.

    digest   = XXH3-64(prompt and generated token ids so far, as int32 little-endian; seeded)
    token id = first + (low 32 bits of digest) * (last - first + 1) / 2^32

The digest is a streaming one, so a token costs the same however long its sequence is. Because nothing else enters, two
workers continue a prompt alike, and a request whose prompt is another one's prompt + output goes on exactly where that
one stopped. Temperature, penalties and logit biases change nothing; a request's `seed` is used where its temperature is
above 0, and the engine's seed otherwise.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from math import log
from typing import Protocol

from xxhash import xxh3_64

from trtserve.plugins.api import Request, TokenIds, TokenLogprob

_MASK_64 = (1 << 64) - 1


class Tokens(Protocol):
    """What one sequence says, one token after the other."""

    @property
    def draw(self) -> int:
        """16 bits that the choice of the last token did not use."""

    def next(self, may_end: bool) -> int:
        """The next token's id. An end or stop token only if `may_end`."""

    def take(self, count: int) -> TokenIds:
        """The next `count` tokens of a sequence that no token can end: as so many calls of `next`."""

    def logprob(self, token_id: int, num_top: int) -> TokenLogprob:
        """Log probabilities of the token that `next` gave last."""


class TokenSource(Protocol):
    """A model, as far as the scheduler needs one."""

    def stream(self, request: Request) -> Tokens:
        """The tokens that follow the request's prompt."""


@dataclass(frozen=True, slots=True)
class TokenModel:
    """The simulated model: ordinary tokens are the ids from first to last, both included."""

    first_token_id: int
    last_token_id: int
    seed: int = 0
    eos_probability: float = 0.0  # that a token is the request's first end-of-sequence id

    @property
    def num_tokens(self) -> int:
        return self.last_token_id - self.first_token_id + 1

    def stream(self, request: Request) -> TokenStream:
        """The tokens that follow the request's prompt."""
        return TokenStream(self, request)


class TokenStream:
    """The tokens of one sequence, one after the other."""

    __slots__ = ("_banned", "_banned_at_first", "_digest", "_eos", "_first", "_hash", "_num_tokens", "_threshold")

    def __init__(self, model: TokenModel, request: Request) -> None:
        sampling = request.sampling
        has_own_seed = sampling.seed is not None and sampling.temperature > 0
        seed = sampling.seed if has_own_seed and sampling.seed is not None else model.seed
        self._hash = xxh3_64(request.prompt.tobytes(), seed=seed & _MASK_64)
        self._digest = 0
        self._first = model.first_token_id
        self._num_tokens = model.num_tokens
        self._eos = request.eos_token_ids[0] if request.eos_token_ids else None
        self._threshold = int(model.eos_probability * 65536)
        # An end-of-sequence id is said on purpose only, never as an ordinary token.
        self._banned = frozenset(request.eos_token_ids)
        self._banned_at_first = self._banned | frozenset(sampling.stop_token_ids)

    @property
    def draw(self) -> int:
        """16 bits that the choice of the last token did not use; equal for equal tokens before."""
        return self._digest >> 48

    def next(self, may_end: bool) -> int:
        """The next token's id. An end or stop token only if `may_end`."""
        digest = self._digest = self._hash.intdigest()
        if may_end and self._eos is not None and (digest >> 32 & 0xFFFF) < self._threshold:
            token_id = self._eos
        else:
            place = (digest & 0xFFFFFFFF) * self._num_tokens >> 32
            banned = self._banned if may_end else self._banned_at_first
            token_id = self._first + place
            if token_id in banned:
                token_id = self._next_allowed(place, banned)
        self._hash.update(token_id.to_bytes(4, "little"))
        return token_id

    def take(self, count: int) -> TokenIds:
        """The next `count` tokens of a sequence that no token can end."""
        return array("i", [self.next(True) for _ in range(count)])

    def logprob(self, token_id: int, num_top: int) -> TokenLogprob:
        """Likely-looking log probabilities of the token that `next` gave last: it comes first among the `num_top`
        most likely ones, the k-th after it has 1/2^k of what it leaves. num_top < the model's ordinary tokens."""
        chosen = 0.5 + 0.49 * self.draw / 65536
        place = token_id - self._first
        top = [(token_id, log(chosen))]
        for rank in range(1, num_top):
            other = self._first + (place + rank) % self._num_tokens
            top.append((other, log(1 - chosen) - rank * log(2)))
        return TokenLogprob(token_id, log(chosen), tuple(top[:num_top]))

    def _next_allowed(self, place: int, banned: frozenset[int]) -> int:
        # One try more than there are banned ids finds one, unless a request bans every token there is.
        for step in range(1, len(banned) + 2):
            token_id = self._first + (place + step) % self._num_tokens
            if token_id not in banned:
                return token_id
        return self._first + place
