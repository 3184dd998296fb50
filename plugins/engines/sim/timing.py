"""How long a pass of the simulated engine takes.

    pass    = prefill(n) + decode(u)
    prefill = a n^2 + b n + c      n: new prompt tokens of the pass, as `PromptTokens.timed` counts them; 0 if none
    decode  = d u^2 + e u + f      u: context tokens of the sequences that were decoding before the pass, as a share of
                                   the tokens that fit into the KV cache; 0 if none was decoding

The default coefficients describe a large model on one GPU of the data-centre kind, fitted up to a full cache.
A fitted polynomial means nothing outside its range, and this one falls beyond u = 1.05: u is held at `usage_limit`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PassTiming:
    """The coefficients, in milliseconds."""

    prefill_quadratic_ms: float = 4.209989e-7
    prefill_linear_ms: float = 1.518344e-2
    prefill_constant_ms: float = 16.50142
    decode_quadratic_ms: float = -25.74
    decode_linear_ms: float = 54.01
    decode_constant_ms: float = 5.74
    usage_limit: float = 1.0

    def prefill_s(self, num_tokens: int) -> float:
        """Seconds for `num_tokens` new prompt tokens; cached ones are free."""
        if num_tokens <= 0:
            return 0.0
        linear = self.prefill_quadratic_ms * num_tokens + self.prefill_linear_ms
        return max(0.0, linear * num_tokens + self.prefill_constant_ms) / 1000

    def decode_s(self, context_tokens: int, capacity_tokens: int) -> float:
        """Seconds for decoding sequences with `context_tokens` in all on a cache of `capacity_tokens`."""
        if context_tokens <= 0:
            return 0.0
        usage = min(context_tokens / capacity_tokens, self.usage_limit)
        linear = self.decode_quadratic_ms * usage + self.decode_linear_ms
        return max(0.0, linear * usage + self.decode_constant_ms) / 1000


@dataclass(slots=True)
class PromptTokens:
    """The prompt tokens of one pass, summed over the prompts that it works on."""

    num_prompts: int = 0
    begins: int = 0  # tokens that were there before the pass, cached ones included
    ends: int = 0  # tokens that are there after it

    @property
    def computed(self) -> int:
        return self.ends - self.begins

    @property
    def timed(self) -> int:
        """The count that a pass is timed by: prompts times (mean end - mean begin), both means rounded down."""
        if not self.num_prompts:
            return 0
        return self.num_prompts * (self.ends // self.num_prompts - self.begins // self.num_prompts)
