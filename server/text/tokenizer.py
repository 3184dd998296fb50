"""Text to token ids and back, for one model.

fastokens encodes: it is several times faster than `tokenizers`, and lets other threads run meanwhile. Of the prompts
that it has seen a thread keeps the last one at most, or, for patterns that fastokens has a scanner for (GPT-2's,
Llama 3's, Qwen's), words up to some 70 MiB. It is compared with `tokenizers` on `PROBES` when a model is loaded; where
the two differ, `tokenizers` encodes, through `encode_batch_fast` (its plain `encode` holds the GIL for the whole call).
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import fastokens
import tokenizers

from trtserve.plugins.api import TokenIds
from trtserve.server.errors import InvalidRequest
from trtserve.server.memory import return_free_memory
from trtserve.server.model.errors import ModelError
from trtserve.server.model.folder import ModelFolder
from trtserve.server.text.detokenizer import (
    MAX_CONTEXT_TOKENS,
    ByteDetokenizer,
    Detokenizer,
    StreamDetokenizer,
)
from trtserve.server.text.numeral_split import faster_form
from trtserve.server.text.probes import PROBES
from trtserve.server.text.special_tokens import special_tokens
from trtserve.server.text.token_bytes import Spelling, TokenBytes, spelling_of

_log = logging.getLogger(__name__)

INLINE_CHARACTERS = 4000  # about 0.2 ms with fastokens, 1 ms with tokenizers

Encode = Callable[[str, bool], TokenIds]


class Vocabulary(Protocol):
    """Tokens as the vocabulary spells them, added ones included."""

    def id_to_token(self, token_id: int, /) -> str | None: ...

    def token_to_id(self, token: str, /) -> int | None: ...


class Tokenizer:
    """Made by `load_tokenizer`. Every method may be called from any thread; none keeps anything of its arguments."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        encode: Encode | None,
        named: Mapping[str, str],
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """encode: a faster way to encode that agrees with the backend's. named: ``eos_token`` and the like.
        vocabulary: the same one elsewhere; with it the backend is not kept where bytes can be joined instead."""
        self._backend: tokenizers.Tokenizer | None = backend
        self._encode = encode or _slow_encode(backend)
        self.is_fast = encode is not None
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self.named_special_tokens = named
        spelling = spelling_of(backend)
        self._know(backend, spelling)
        self._joins_bytes = spelling is Spelling.BYTE_LEVEL and self._decodes_alike(backend)
        if vocabulary is not None and self._joins_bytes and _is_same(backend, vocabulary, self.vocab_size):
            self._know(vocabulary, spelling)
            self._backend = None  # 7 MiB and more for 49,000 tokens

    def _know(self, vocabulary: Vocabulary, spelling: Spelling) -> None:
        self._vocabulary = vocabulary
        token_of, size = vocabulary.id_to_token, self.vocab_size
        self._bytes = TokenBytes(token_of, spelling, size)
        self._bytes_without_special = TokenBytes(token_of, spelling, size, silent=self.special_ids)

    @property
    def eos_token_id(self) -> int | None:
        """The id of tokenizer_config.json's ``eos_token``."""
        return self.token_id(self.named_special_tokens.get("eos_token", ""))

    def token_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it."""
        token_id = self._vocabulary.token_to_id(token)
        return None if token_id is None else int(token_id)

    def encode_inline(self, text: str, add_special_tokens: bool) -> TokenIds:
        """int32[num_tokens]. On the event loop only for short texts: 0.05 ms for 1,000 characters.

        Raises InvalidRequest for a text that is no Unicode (a lone surrogate).
        """
        try:
            return self._encode(text, add_special_tokens)
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"The text has a lone surrogate ({error.object[error.start]!a}) at character {error.start}, which "
                "has no UTF-8; send the character itself or its whole surrogate pair."
            ) from error

    async def encode(self, text: str, add_special_tokens: bool) -> TokenIds:
        """As `encode_inline`; texts over `INLINE_CHARACTERS` are encoded in a thread, which lets the loop run."""
        if len(text) <= INLINE_CHARACTERS:
            return self.encode_inline(text, add_special_tokens)
        return await asyncio.to_thread(self.encode_inline, text, add_special_tokens)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """All tokens at once; incomplete UTF-8 becomes U+FFFD."""
        if self._backend is not None:
            return self._backend.decode(list(token_ids), skip_special_tokens)
        detokenizer = self.detokenizer(skip_special_tokens)
        return detokenizer.push(token_ids) + detokenizer.finish()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, a part of a character perhaps; b"" for an id without a token."""
        return self._bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, with U+FFFD for what is no whole character."""
        return self._bytes[token_id].decode(errors="replace")

    def detokenizer(self, skip_special_tokens: bool, prompt: Sequence[int] = ()) -> Detokenizer:
        """A detokenizer for what follows `prompt`. A prompt that ends in a special token is no context."""
        if self._backend is None or self._joins_bytes:
            return ByteDetokenizer(self._bytes_without_special if skip_special_tokens else self._bytes)
        context = list(prompt[-MAX_CONTEXT_TOKENS:])
        if context and context[-1] in self.special_ids:
            context = []
        return StreamDetokenizer(self._backend, skip_special_tokens, context)

    def _decodes_alike(self, backend: tokenizers.Tokenizer) -> bool:
        """Whether joining the tokens' bytes gives what the backend decodes."""
        samples = [list(_slow_encode(backend)(text, False)) for text in PROBES] + [sorted(self.special_ids)]
        for ids in samples:
            for skip, bytes_of in ((False, self._bytes), (True, self._bytes_without_special)):
                detokenizer = ByteDetokenizer(bytes_of)
                if detokenizer.push(ids) + detokenizer.finish() != backend.decode(ids, skip):
                    return False
        return True


def _is_same(one: Vocabulary, other: Vocabulary, size: int) -> bool:
    """Takes 70 ms for 49,000 tokens."""
    for token_id in range(size):
        token = one.id_to_token(token_id)
        if other.id_to_token(token_id) != token:
            return False
        if token is not None and other.token_to_id(token) != one.token_to_id(token):
            return False
    return True


def load_tokenizer(folder: ModelFolder) -> Tokenizer:
    """Load tokenizer.json; takes about half a second. Raises ModelError if it cannot be used."""
    path = str(folder.tokenizer_json)
    backend = _backend(path)
    fast, encode = _fast_encode(path, backend)
    named = special_tokens(folder.tokenizer_config())
    tokenizer = Tokenizer(backend, encode, named, fast)
    del backend
    return_free_memory()  # what parsing the vocabulary left: 30 MiB for 49,000 tokens
    return tokenizer


def _backend(path: str) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{path} is no tokenizer.json that this release of `tokenizers` reads: {error}") from error
    # What a file asks for in training is not wanted here: prompts are never cut or filled up.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _slow_encode(backend: tokenizers.Tokenizer) -> Encode:
    def encode(text: str, add_special_tokens: bool) -> TokenIds:
        text.encode()  # says what is wrong with a text that is no Unicode; the library's TypeError does not
        return array("i", backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    return encode


def _fast_encode(path: str, backend: tokenizers.Tokenizer) -> tuple[fastokens.Tokenizer | None, Encode | None]:
    """fastokens' tokenizer and way to encode; none where it gives other ids for this model."""
    try:
        form = faster_form(backend)
        if form is not None:
            fast = fastokens.Tokenizer.from_json_str(form)
            encode = _encode_with(fast)
            if _first_difference(encode, backend) is None:
                return fast, encode
            del fast
        fast = fastokens.Tokenizer.from_file(path)
        encode = _encode_with(fast)
        different = _first_difference(encode, backend)
    except Exception as error:  # the library raises plain Exception
        _log.warning("fastokens cannot encode with %s (%s); encoding with tokenizers, which is slower", path, error)
        return None, None
    if different is not None:
        _log.warning("fastokens encodes %a of %s otherwise; encoding with tokenizers", different, path)
        return None, None
    return fast, encode


def _encode_with(fast: fastokens.Tokenizer) -> Encode:
    fast.no_truncation()
    fast.no_padding()

    def encode(text: str, add_special_tokens: bool) -> TokenIds:
        ids, _ = fast.encode_batch_flat([text], add_special_tokens)
        return array("i", ids)  # uint32 bytes; no vocabulary reaches the sign bit

    return encode


def _first_difference(encode: Encode, backend: tokenizers.Tokenizer) -> str | None:
    """A text of `PROBES` that they encode differently."""
    slow = _slow_encode(backend)
    return next((text for text in PROBES for add in (False, True) if encode(text, add) != slow(text, add)), None)
