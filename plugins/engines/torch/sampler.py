"""Choosing the next token of each sequence of a batch.

Order of work on the logits: repetition, presence and frequency penalties, logit bias (log probabilities are taken
here), tokens that may not come yet, then the draw (`token_draw`). Chance is a pure function of a request's key and
of how many tokens it has generated, on other workers before too, so neither the rest of the batch nor a preemption nor
a move to another worker changes a draw.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trtserve.plugins.api import Request, SamplingParams, TokenIds, TokenLogprob
from trtserve.plugins.engines.torch.likeliest import most_likely
from trtserve.plugins.engines.torch.token_draw import Draw, draw_tokens, uniform

_MASK_64 = (1 << 64) - 1
_CPU_ROWS = 4  # sampled at once: their intermediate results stay in the cache and need no fresh memory


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sequence's next token; `is_broken` when its logits held NaN or infinity, and the token is void."""

    token_id: int
    logprob: TokenLogprob | None = None
    is_broken: bool = False


@dataclass(slots=True, eq=False)
class SamplingState:
    """What sampling remembers of one sequence. Made by `Sampler.state`, kept up to date by `Sampler.sample`."""

    params: SamplingParams
    key: int  # 64 bits
    is_plain: bool  # greedy and nothing else: an argmax will do
    delayed: tuple[int, ...]  # tokens that are impossible before min_tokens
    num_resumed: int = 0  # tokens generated before the request came here
    num_generated: int = 0  # here
    prompt_seen: Tensor | None = None  # bool[vocab], for repetition_penalty
    output_counts: Tensor | None = None  # float32[vocab], for all penalties
    bias_ids: Tensor | None = None  # int64[biases]
    bias_values: Tensor | None = None  # float32[biases]

    @property
    def draw(self) -> Draw:
        """How to draw the next token."""
        params = self.params
        chance = uniform(self.key, self.num_resumed + self.num_generated)
        return Draw(params.temperature, params.top_k, params.top_p, params.min_p, chance)


class Sampler:
    """Samples for one model. Holds the generator of keys for requests without a seed, and no request."""

    def __init__(self, vocab_size: int, seed: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._random = random.Random(seed)

    def state(self, request: Request) -> SamplingState:
        """Begin a sequence. A request without a seed gets the generator's next key."""
        params = request.sampling
        ends = (() if params.ignore_eos else request.eos_token_ids) + params.stop_token_ids
        state = SamplingState(
            params=params,
            key=self._random.getrandbits(64) if params.seed is None else params.seed & _MASK_64,
            is_plain=_is_plain(params),
            delayed=tuple(sorted({token for token in ends if 0 <= token < self._vocab_size})),
            num_resumed=request.num_resumed,
        )
        if _has_penalties(params):
            first_output = len(request.prompt) - request.num_resumed
            state.prompt_seen = self._counts(request.prompt[:first_output]) > 0
            state.output_counts = self._counts(request.prompt[first_output:])
        if params.logit_bias:
            ids, values = zip(*params.logit_bias, strict=True)
            state.bias_ids = torch.tensor(ids, dtype=torch.long, device=self._device)
            state.bias_values = torch.tensor(values, dtype=torch.float32, device=self._device)
        return state

    def sample(self, logits: Tensor, states: Sequence[SamplingState]) -> list[Sampled]:
        """logits: [len(states), at least vocab_size], any float type, left as they are -> one result a state."""
        logits = logits[:, : self._vocab_size]
        if all(state.is_plain for state in states):
            sampled = _argmax(logits)
        else:
            sampled = []
            at_once = _CPU_ROWS if logits.device.type == "cpu" else len(states)
            for start in range(0, len(states), at_once):
                rows = slice(start, start + at_once)
                sampled += self._sample_mixed(logits[rows].to(torch.float32, copy=True), states[rows])
        for state, result in zip(states, sampled, strict=True):
            state.num_generated += 1
            if state.output_counts is not None and not result.is_broken:
                state.output_counts[result.token_id] += 1
        return sampled

    def _counts(self, tokens: TokenIds) -> Tensor:
        """How often each token of the vocabulary is among these: float32[vocab]."""
        ids = torch.tensor(tokens, dtype=torch.long, device=self._device)
        return torch.bincount(ids, minlength=self._vocab_size).float()

    def _sample_mixed(self, logits: Tensor, states: Sequence[SamplingState]) -> list[Sampled]:
        broken = [result.is_broken for result in _argmax(logits)]
        for row, state in zip(logits, states, strict=True):
            _penalise(row, state)
        logprobs = {
            index: torch.log_softmax(logits[index], -1)
            for index, state in enumerate(states)
            if state.params.logprobs is not None and not broken[index]
        }
        for row, state in zip(logits, states, strict=True):
            if state.delayed and state.num_generated < state.params.min_tokens:
                row[list(state.delayed)] = -math.inf
        results = []
        for index, token_id in enumerate(self._choose(logits, states)):
            row_logprobs = logprobs.get(index)
            logprob = None if row_logprobs is None else _logprob(row_logprobs, token_id, states[index].params)
            results.append(Sampled(token_id, logprob, broken[index]))
        return results

    def _choose(self, logits: Tensor, states: Sequence[SamplingState]) -> list[int]:
        """Token ids, given finished logits; those of broken rows mean nothing."""
        chosen = [0] * len(states)
        drawing = [index for index, state in enumerate(states) if state.params.temperature > 0]
        if drawing:
            tokens = draw_tokens(logits[drawing], [states[index].draw for index in drawing])
            for index, token_id in zip(drawing, tokens, strict=True):
                chosen[index] = token_id
        greedy = [index for index, state in enumerate(states) if state.params.temperature == 0]
        if greedy:
            for index, result in zip(greedy, _argmax(logits[greedy]), strict=True):
                chosen[index] = result.token_id
        return chosen


def _is_plain(params: SamplingParams) -> bool:
    changes_logits = _has_penalties(params) or bool(params.logit_bias) or params.min_tokens > 0
    return params.temperature == 0 and params.logprobs is None and not changes_logits


def _has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def _argmax(logits: Tensor) -> list[Sampled]:
    # NaN counts as the largest, so one pass finds both the token and the broken rows
    values, ids = most_likely(logits)
    finite = torch.isfinite(values).tolist()
    return [Sampled(token_id, None, not is_finite) for token_id, is_finite in zip(ids.tolist(), finite, strict=True)]


def _penalise(row: Tensor, state: SamplingState) -> None:
    """Penalties, then bias, in place on one row of logits."""
    params = state.params
    if state.prompt_seen is not None and state.output_counts is not None:
        generated = state.output_counts > 0
        if params.repetition_penalty != 1:
            divided = torch.where(row > 0, row / params.repetition_penalty, row * params.repetition_penalty)
            torch.where(state.prompt_seen | generated, divided, row, out=row)
        row -= params.frequency_penalty * state.output_counts
        row -= params.presence_penalty * generated
    if state.bias_ids is not None and state.bias_values is not None:
        row.index_add_(0, state.bias_ids, state.bias_values)


def _logprob(logprobs: Tensor, token_id: int, params: SamplingParams) -> TokenLogprob:
    """logprobs: float32[vocab] of one position."""
    top: tuple[tuple[int, float], ...] = ()
    if params.logprobs:
        values, ids = torch.topk(logprobs, min(params.logprobs, logprobs.shape[-1]))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token_id, float(logprobs[token_id]), top)
