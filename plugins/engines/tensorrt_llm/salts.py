"""Which cache salt a stored block was computed under, where the engine's events do not say.

Up to 1.2, events of TensorRT-LLM carry the tokens of a block and not its salt, while equal tokens under other salts are
other blocks. The salts under which a first block was asked for are remembered; where there are several, nobody can
say which of them was stored, and the block is left out of the index rather than ascribed to the wrong tenant.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from trtserve.plugins.api import TokenIds

_MOST_ROOTS = 65_536


class Salts:
    """Costs nothing until a request has a salt."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._is_used = False
        self._by_root: OrderedDict[bytes, set[str]] = OrderedDict()
        self._short_roots: set[int] = set()  # lengths of prompts that are no full block, in bytes
        self._has_forgotten = False

    def submitted(self, prompt: TokenIds, salt: str) -> None:
        """A request comes, before any event about it."""
        self._is_used = self._is_used or bool(salt)
        if not self._is_used:
            return
        root = prompt[: self._block_size].tobytes()
        if len(prompt) < self._block_size:
            self._short_roots.add(len(root))
        self._by_root.setdefault(root, set()).add(salt)
        self._by_root.move_to_end(root)
        if len(self._by_root) > _MOST_ROOTS:
            self._by_root.popitem(last=False)
            self._has_forgotten = True

    def of(self, root_tokens: TokenIds, block: Mapping[str, Any]) -> str | None:
        """The salt of a first block; None where it cannot be known. block: the event's, as later versions tell it."""
        told = block.get("cache_salt")
        if told:
            return str(told)
        if not self._is_used:
            return ""
        # A prompt that is shorter than a block was filled up with what it was answered.
        root = root_tokens.tobytes()
        beginnings = (root, *(root[:length] for length in self._short_roots))
        salts = set().union(*(self._by_root.get(beginning, ()) for beginning in beginnings))
        if not salts:
            return None if self._has_forgotten else ""
        return salts.pop() if len(salts) == 1 else None
