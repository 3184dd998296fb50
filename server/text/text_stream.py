"""The text of one answer as its tokens arrive: the one way to text, for streamed and whole answers alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set

from trtserve.server.text.stop_strings import StopStrings
from trtserve.server.text.tokenizer import Tokenizer


class TextStream:
    """Detokenizes, keeps ending tokens out of the text, and stops at stop strings.

    `push` every token of the sequence in order, then `finish` once; the texts they return, joined, are the answer, and
    however the tokens are cut into pushes it is the same. Not thread-safe; a push costs well under 1 µs a token where
    there are no stop strings.
    """

    __slots__ = ("_decode", "_detokenizer", "_end_token_ids", "_ended", "_stops", "is_plain", "num_tokens_used")

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        end_token_ids: Set[int] = frozenset(),
        prompt: Sequence[int] = (),
    ) -> None:
        """stops: strings that end the text, kept out of it unless `include_stop`. end_token_ids: tokens that end the
        sequence (end-of-sequence unless ignored, the client's stop tokens), kept out likewise. prompt: for the
        vocabularies where a token's text depends on the one before. Raises ValueError for an empty stop string.
        """
        hidden = frozenset() if include_stop else frozenset(end_token_ids)
        self._end_token_ids = hidden - tokenizer.special_ids if skip_special_tokens else hidden
        self._stops = StopStrings(stops, include_stop) if stops else None
        self.is_plain = self._stops is None and not self._end_token_ids
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens, prompt)
        self._decode = self._detokenizer.push
        self._ended = False
        self.num_tokens_used = 0  # tokens up to the end of the text, the one that completed a stop string included

    def plain_decoder(self) -> Callable[[Sequence[int]], str]:
        """`push` without the counting, where `is_plain`: for the hot path, which counts by itself."""
        return self._decode

    def plain_json(self) -> Callable[[Sequence[int]], bytes]:
        """As `plain_decoder`, but what it gives is the text inside a JSON string, in UTF-8 and without the quotes."""
        return self._detokenizer.push_json

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text; the sequence need not go on."""
        return None if self._stops is None else self._stops.matched

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is safe to show now, often ''; nothing more after the end."""
        if self.is_plain:
            self.num_tokens_used += len(token_ids)
            return self._decode(token_ids)
        # One by one, so that the count stops at the right token.
        return "".join([self._push_one(token_id) for token_id in token_ids])

    def finish(self) -> str:
        """The rest of the text, when there are no more tokens."""
        text = self._detokenizer.finish()
        if self._stops is None:
            return text
        return self._stops.push(text) + self._stops.finish()

    def _push_one(self, token_id: int) -> str:
        if self._ended:
            return ""
        self.num_tokens_used += 1
        if token_id in self._end_token_ids:
            self._ended = True
            return ""
        text = self._decode((token_id,))
        if self._stops is not None and text:
            text = self._stops.push(text)
            self._ended = self._stops.matched is not None
        return text
