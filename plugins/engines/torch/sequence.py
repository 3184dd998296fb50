"""One request on its way through the engine."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from trtserve.plugins.api import Request, TokenIds
from trtserve.plugins.engines.torch.prefix_cache import BlockChain
from trtserve.plugins.engines.torch.sampler import SamplingState


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable and the engine's own. `tokens` is int32[prompt + generated]; KV exists for the first `num_computed`."""

    request: Request
    chain: BlockChain
    sampling: SamplingState
    tokens: TokenIds = field(default_factory=lambda: array("i"))
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)
    cached_tokens: int | None = None  # of the prompt, known at the first admission
    has_reported: bool = False  # an output was made, so cached_tokens was told

    def __post_init__(self) -> None:
        self.tokens = array("i", self.request.prompt)

    @property
    def num_generated(self) -> int:
        """Tokens generated here; those that were resumed count with the prompt."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def num_pending(self) -> int:
        """Tokens whose KV is still to be computed; 1 for a sequence that decodes."""
        return len(self.tokens) - self.num_computed
