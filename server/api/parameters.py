"""What a validated body asks for, and how it becomes the `SamplingParams` of an engine.

`trtserve.server.api.schema` makes a `GenerationParams` of a body. After tokenization the endpoint calls
`max_tokens_for` once for each prompt and `to_sampling_params` once for each choice of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from trtserve.plugins.api import GuidedDecoding, SamplingParams, TokenIds
from trtserve.server.api.schema_messages import Message
from trtserve.server.errors import ContextLengthExceeded, InvalidRequest

_MOST_SEEDS = 2**64


class GenerationParams(msgspec.Struct, frozen=True):
    """A chat or completion request after validation, which nobody changes. None means that the request was silent.

    `prompts` is filled for completions, `messages` for chat; the other one is empty.
    """

    model: str
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    continuous_usage_stats: bool = False

    # What becomes SamplingParams
    max_tokens: int | None = None  # None (chat only): the rest of the context
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None  # 0: off
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; k >= 0: the chosen token's and the k most likely ones'

    guided: GuidedDecoding | None = None

    # Text in and out
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    add_special_tokens: bool = False  # whether the tokenizer puts its own tokens around the prompt's text
    echo: bool = False
    prompts: tuple[str | TokenIds, ...] = ()  # token ids: int32[num_prompt_tokens], at least one
    messages: tuple[Message, ...] = ()
    chat_template_kwargs: Mapping[str, Any] = msgspec.field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    cache_salt: str = ""
    service_tier: str | None = None  # told in the answer where the request has one; there is one tier
    ignored: tuple[str, ...] = ()  # unknown fields that were ignored, sorted; for a warning and `ignored_header`


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What the model's maker recommends (generation_config.json), for requests that are silent about it."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def sampling_defaults(generation_config: Mapping[str, object]) -> SamplingDefaults:
    """The defaults of a generation_config.json. Values that are absent or out of bounds leave ours as they are."""
    within: dict[str, tuple[float, float]] = {
        "temperature": (0.0, 2.0),
        "top_p": (1e-6, 1.0),
        "top_k": (0, 2**31 - 1),
        "min_p": (0.0, 1.0),
        "repetition_penalty": (1e-6, 2.0),
    }
    found: dict[str, Any] = {}
    for name, (least, most) in within.items():
        value = generation_config.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most:
            found[name] = int(value) if name == "top_k" else float(value)
    return SamplingDefaults(**found)


def max_tokens_for(
    params: GenerationParams, num_prompt_tokens: int, max_seq_len: int, max_prompt_tokens: int | None = None
) -> int:
    """How many tokens a choice may generate: what was asked for, or the rest of the context.

    Raises ContextLengthExceeded where prompt and output do not fit in max_seq_len tokens or the prompt is longer than
    the engines take, InvalidRequest where the prompt has no token or min_tokens is more than what is left.
    """
    source = "messages" if params.messages else "prompt"
    if num_prompt_tokens < 1:
        raise InvalidRequest("The prompt has no tokens and at least 1 is needed; send some text.", param=source)
    room = max_seq_len - num_prompt_tokens
    if room < 1:
        raise ContextLengthExceeded(
            f"The prompt has {num_prompt_tokens} tokens and this model's context is {max_seq_len}, of which 1 is "
            f"needed for the answer; shorten the prompt by {1 - room} tokens or more.",
            param=source,
        )
    if max_prompt_tokens is not None and num_prompt_tokens > max_prompt_tokens:
        raise ContextLengthExceeded(
            f"The prompt has {num_prompt_tokens} tokens and prompts of up to {max_prompt_tokens} are taken; shorten it "
            f"by {num_prompt_tokens - max_prompt_tokens} tokens or more.",
            param=source,
        )
    wanted = room if params.max_tokens is None else params.max_tokens
    if wanted > room:
        raise ContextLengthExceeded(
            f"The prompt has {num_prompt_tokens} tokens and max_tokens is {wanted}, {num_prompt_tokens + wanted} "
            f"together, and this model's context is {max_seq_len}; shorten the prompt or ask for at most {room}.",
            param=source,
        )
    if params.min_tokens > wanted:
        raise InvalidRequest(
            f"min_tokens is {params.min_tokens} and the prompt leaves room for {wanted}; lower min_tokens.",
            param="min_tokens",
        )
    return wanted


def to_sampling_params(
    params: GenerationParams,
    defaults: SamplingDefaults,
    vocab_size: int,
    default_max_tokens: int,
    index: int = 0,
) -> SamplingParams:
    """The engine's parameters for choice `index` of n. default_max_tokens: of `max_tokens_for`, used where the request
    was silent.

    Each choice of a seeded request gets a seed of its own, so that the choices differ and repeat. Raises
    InvalidRequest for token ids outside the vocabulary and for several greedy choices, which would all be the same.
    """
    temperature = defaults.temperature if params.temperature is None else params.temperature
    if temperature == 0 and params.n > 1:
        raise InvalidRequest(
            f"n is {params.n} with temperature 0, which would give {params.n} times the same text; use n 1 or a "
            "temperature above 0.",
            param="n",
        )
    if params.stop_token_ids or params.logit_bias:
        _check_vocabulary(params, vocab_size)
    return SamplingParams(
        max_tokens=default_max_tokens if params.max_tokens is None else params.max_tokens,
        min_tokens=params.min_tokens,
        temperature=temperature,
        top_p=defaults.top_p if params.top_p is None else params.top_p,
        top_k=defaults.top_k if params.top_k is None else params.top_k,
        min_p=defaults.min_p if params.min_p is None else params.min_p,
        seed=None if params.seed is None else choice_seed(params.seed, index),
        repetition_penalty=(
            defaults.repetition_penalty if params.repetition_penalty is None else params.repetition_penalty
        ),
        presence_penalty=params.presence_penalty or 0.0,
        frequency_penalty=params.frequency_penalty or 0.0,
        logit_bias=params.logit_bias,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        logprobs=params.logprobs,
        guided=params.guided,
    )


def choice_seed(seed: int, index: int) -> int:
    """seed + index, wrapping around in signed 64 bits."""
    return (seed + index + _MOST_SEEDS // 2) % _MOST_SEEDS - _MOST_SEEDS // 2


def ignored_header(ignored: tuple[str, ...], most_bytes: int = 512) -> str:
    """The value of X-Trtserve-Ignored-Params: the names, safe for a header line, `...` for those that do not fit."""
    safe = ["".join(c if c.isascii() and (c.isalnum() or c in "_-.") else "?" for c in name[:64]) for name in ignored]
    line = ", ".join(safe)
    if len(line) <= most_bytes:
        return line
    return line[: line.rfind(",", 0, most_bytes - 5)] + ", ..."


def _check_vocabulary(params: GenerationParams, vocab_size: int) -> None:
    for position, token_id in enumerate(params.stop_token_ids):
        if token_id >= vocab_size:
            raise _outside_vocabulary(token_id, vocab_size, f"stop_token_ids[{position}]")
    for token_id, _ in params.logit_bias:
        if token_id >= vocab_size:
            raise _outside_vocabulary(token_id, vocab_size, f"logit_bias.{token_id}")


def _outside_vocabulary(token_id: int, vocab_size: int, param: str) -> InvalidRequest:
    return InvalidRequest(
        f"`{param}` names token {token_id} and this model's vocabulary has {vocab_size} tokens; "
        f"use ids from 0 to {vocab_size - 1}.",
        param=param,
    )
