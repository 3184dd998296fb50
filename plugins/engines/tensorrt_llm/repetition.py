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
    """One for an executor."""

    def __init__(self) -> None:
        self.are_repeated: bool | None = None  # None: not known yet

    def num_repeated(self, request: Request, token_ids: Sequence[int]) -> int:
        """How many leading tokens of a result the client has already. request: with the prefill's tokens at the end
        of its prompt."""
        first = list(request.prompt[len(request.prompt) - request.num_resumed :])
        is_repeated = self.are_repeated
        if is_repeated is None:
            is_repeated = list(token_ids[: len(first)]) == first[: len(token_ids)]
        return len(first) if is_repeated else 0

    def learn(self, request: Request, output: Any) -> None:
        """A generation is over. output: TensorRT-LLM's."""
        if output.finish_reason != "length" or self.are_repeated is not None:
            return
        missing = request.sampling.max_tokens + request.num_resumed - len(output.token_ids)
        if missing in (0, request.num_resumed):  # else it met the longest sequence
            self.are_repeated = missing == 0
