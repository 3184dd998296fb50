"""Whether the results of a generation phase begin with the tokens that its context phase has generated.

Versions may differ in this, and it is documented nowhere, so it is learnt: from a generation that ended for its length,
as the warm-up of each pair of workers does. Until then a result that begins with those very tokens is taken to repeat
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trtserve.plugins.api import Request


class FirstTokens:
    """One for an executor. max_seq_len: its longest sequence."""

    def __init__(self, max_seq_len: int) -> None:
        self._max_seq_len = max_seq_len
        self.are_repeated: bool | None = None  # None: not known yet

    def num_repeated(self, request: Request, token_ids: Sequence[int]) -> int:
        """How many leading tokens of a result the client has already. request: with the prefill's tokens at the end
        of its prompt."""
        if self.are_repeated is None and not _begins(request, token_ids):
            self.are_repeated = False
        return 0 if self.are_repeated is False else request.num_resumed

    def learn(self, request: Request, output: Any) -> None:
        """A generation is over. output: TensorRT-LLM's."""
        if output.finish_reason != "length" or self.are_repeated is not None or not request.num_resumed:
            return
        missing = request.sampling.max_tokens + request.num_resumed - len(output.token_ids)
        # One that meets the longest sequence may end a token early.
        is_short = len(request.prompt) + request.sampling.max_tokens < self._max_seq_len
        if missing == 0 or (is_short and missing == request.num_resumed):
            self.are_repeated = missing == 0


def _begins(request: Request, token_ids: Sequence[int]) -> bool:
    first = list(request.prompt[len(request.prompt) - request.num_resumed :])
    return list(token_ids[: len(first)]) == first[: len(token_ids)]
