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

    def submitted(self, prompt: TokenIds, salt: str) -> None:
        """A request comes, before any event about it."""
        self._is_used = self._is_used or bool(salt)
        if not self._is_used:
            return
        root = prompt[: self._block_size].tobytes()
        self._by_root.setdefault(root, set()).add(salt)
        self._by_root.move_to_end(root)
        if len(self._by_root) > _MOST_ROOTS:
            self._by_root.popitem(last=False)

    def of(self, root_tokens: TokenIds, block: Mapping[str, Any]) -> str | None:
        """The salt of a first block; None where it cannot be known. block: the event's, as later versions tell it."""
        told = block.get("cache_salt")
        if told:
            return str(told)
        salts = self._by_root.get(root_tokens.tobytes())
        if not salts:
            return ""
        return next(iter(salts)) if len(salts) == 1 else None
