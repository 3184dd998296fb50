"""What one pass of the simulated engine works on, put together by the scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field

from trtserve.plugins.api import PassStats
from trtserve.plugins.engines.sim.sequence import Sequence
from trtserve.plugins.engines.sim.timing import PassTiming, PromptTokens


@dataclass(slots=True)
class Batch:
    """Mutable while it is scheduled; lives for one pass."""

    budget: int  # tokens that the pass can still take
    prompts: PromptTokens = field(default_factory=PromptTokens)
    ready: list[Sequence] = field(default_factory=list)  # get tokens at the end of the pass
    decode_sequences: int = 0  # of `ready`: had generated before
    context_tokens: int = 0  # of those
    has_preempted: bool = False

    def take(self, sequence: Sequence, begin: int, drafted: int) -> None:
        """Count what a sequence computes in this pass: from token `begin` to its `num_computed`, and the drafts."""
        length, end = sequence.num_prompt_tokens, sequence.num_computed
        self.budget -= end - begin + drafted
        if begin < length:
            self.prompts.num_prompts += 1
            self.prompts.begins += begin
            self.prompts.ends += min(end, length)
        if end == sequence.num_tokens:
            self.ready.append(sequence)
            if end > length:
                self.decode_sequences += 1
                self.context_tokens += end

    def take_decode(self, sequence: Sequence) -> None:
        """`take`, for a sequence that computes its last token and drafts nothing."""
        self.budget -= 1
        self.ready.append(sequence)
        self.decode_sequences += 1
        self.context_tokens += sequence.num_computed

    def stats(self, timing: PassTiming, capacity_tokens: int) -> PassStats | None:
        """What the pass did and how long it takes; None if it computed nothing that takes time."""
        if not self.prompts.num_prompts and not self.decode_sequences:
            return None
        prefill_s = timing.prefill_s(self.prompts.timed)
        duration_s = prefill_s + timing.decode_s(self.context_tokens, capacity_tokens)
        return PassStats(duration_s, self.prompts.computed, self.decode_sequences, self.context_tokens)
