"""One request inside the simulated engine: its tokens, its blocks and how far its KV is computed."""

from __future__ import annotations

from array import array

from trtserve.plugins.api import BlockHash, FinishReason, Output, Request, TokenIds, TokenLogprob
from trtserve.plugins.blocks import block_hash, block_hashes, root_hash
from trtserve.plugins.engines.sim.pool import Block, BlockPool
from trtserve.plugins.engines.sim.tokens import Tokens

_NEVER = 1 << 62


class Sequence:
    """Mutable; the scheduler's alone.

    `num_computed` counts tokens whose KV is in `blocks`; a sequence that decodes lacks exactly its last token.
    `hashes` grows with the generated blocks, but only the prompt's are ever looked up again.
    """

    __slots__ = (
        "_block_size",
        "_ends",
        "_is_reported",
        "_num_full",
        "_reuses",
        "_stream",
        "blocks",
        "generated",
        "hashes",
        "max_generated",
        "next_full",
        "num_accepted",
        "num_cached",
        "num_computed",
        "num_drafted_total",
        "num_kept_total",
        "num_prompt_blocks",
        "num_prompt_tokens",
        "num_tokens",
        "request",
    )

    def __init__(self, request: Request, stream: Tokens, block_size: int, max_seq_len: int, reuse: bool) -> None:
        self.request = request
        # Lengths are kept rather than asked for: passes need them for every sequence.
        self.num_prompt_tokens = self.num_tokens = len(request.prompt)
        self.generated: TokenIds = array("i")
        self.max_generated = min(request.sampling.max_tokens, max_seq_len - self.num_tokens)
        self.num_prompt_blocks = self.num_prompt_tokens // block_size if reuse else 0
        self.hashes = self._prompt_hashes(request, block_size) if reuse else []
        self.num_cached: int | None = None  # prompt tokens reused when first scheduled
        self.num_accepted = 0  # drafted tokens that the pass under way keeps
        self.num_drafted_total = self.num_kept_total = 0
        self._stream = stream
        self._block_size = block_size
        self._reuses = reuse
        self._is_reported = False  # whether an output has told num_cached
        eos = () if request.sampling.ignore_eos else request.eos_token_ids
        self._ends = frozenset((*eos, *request.sampling.stop_token_ids))
        self.begin([])

    @property
    def num_remaining(self) -> int:
        """Tokens it may still generate."""
        return self.max_generated - len(self.generated)

    @property
    def draw(self) -> int:
        """16 bits that depend on the tokens so far."""
        return self._stream.draw

    def begin(self, matched: list[Block]) -> None:
        """Start over with these full blocks, which the caller holds in the sequence's name."""
        self.blocks = matched
        self.num_computed = len(matched) * self._block_size
        self._count_full(len(matched))

    def fill(self, pool: BlockPool) -> None:
        """Make the blocks that became full reusable; called when `num_computed` has reached `next_full`."""
        first, last = self._num_full, self.num_computed // self._block_size
        for index in range(len(self.hashes), last):
            parent = self.hashes[-1] if index else root_hash(self.request.cache_salt)
            self.hashes.append(block_hash(parent, self._tokens(index, index + 1)))
        parent_of_first = self.hashes[first - 1] if first else None
        pool.store(self.blocks[first:last], self.hashes[first:last], parent_of_first, self._tokens(first, last))
        self._count_full(last)

    def generate(self) -> Output:
        """Say the tokens of this pass; the last output of the sequence carries its finish reason."""
        finish_reason, stop_token_id = None, None
        request, generated, stream = self.request, self.generated, self._stream
        num_top = request.sampling.logprobs
        logprobs: list[TokenLogprob] = []
        token_ids: list[int] = []
        for count in range(len(generated), len(generated) + 1 + self.num_accepted):
            token_id = stream.next(count >= request.sampling.min_tokens)
            token_ids.append(token_id)
            generated.append(token_id)
            if num_top is not None:
                logprobs.append(stream.logprob(token_id, num_top))
            if token_id in self._ends:
                finish_reason, stop_token_id = FinishReason.STOP, token_id
                break
            if count + 1 >= self.max_generated:
                finish_reason = FinishReason.LENGTH
                break
        self.num_tokens += len(token_ids)
        cached, self._is_reported = None if self._is_reported else self.num_cached, True
        told = None if num_top is None else tuple(logprobs)
        return Output(request.id, token_ids, finish_reason, stop_token_id, cached, told)

    def decodes_ahead(self) -> int:
        """In how many of the next passes it does nothing but decode, if all others do: one token a pass and no change
        of its blocks, up to and including the pass that gives its last token."""
        sampling, inside = self.request.sampling, self.num_tokens % self._block_size
        decodes = self.generated and self.num_tokens - self.num_computed == 1
        # Block by block: one is taken with the first token in it, and made reusable with the last one.
        if not decodes or inside <= 1 or self._ends or sampling.logprobs is not None:
            return 0
        if len(self.generated) < sampling.min_tokens:
            return 0
        return min(self._block_size - inside, self.num_remaining)

    def decode(self, count: int) -> Output:
        """What so many passes in which it does nothing but decode give, in one; count <= decodes_ahead()."""
        token_ids = self._stream.take(count)
        self.generated += token_ids
        self.num_computed += count
        self.num_tokens += count
        return Output(self.request.id, token_ids, None if self.num_remaining else FinishReason.LENGTH)

    def _count_full(self, num_full: int) -> None:
        self._num_full = num_full
        # Without reuse no block ever counts as full, so none outlives its sequence.
        self.next_full = (num_full + 1) * self._block_size if self._reuses else _NEVER

    def _tokens(self, first: int, last: int) -> TokenIds:
        """The tokens of blocks first to last - 1."""
        prompt, start, end = self.request.prompt, first * self._block_size, last * self._block_size
        length = len(prompt)
        if end <= length:
            return prompt[start:end]
        return prompt[start:] + self.generated[max(0, start - length) : end - length]

    @staticmethod
    def _prompt_hashes(request: Request, block_size: int) -> list[BlockHash]:
        if len(request.block_hashes) == len(request.prompt) // block_size:
            return list(request.block_hashes)
        return list(block_hashes(request.prompt, block_size, request.cache_salt))
