"""A request's sampling, in the keywords of TensorRT-LLM's SamplingParams.

A new object is made for every request, as `generate_async` changes the one it gets. Everything that has another default
there is said outright: nothing set would mean greedy choice and 32 tokens.
"""

from __future__ import annotations

from typing import Any

from trtserve.plugins.api import Request, SamplingParams

NO_TOKEN = -1
"""As an end id: no token ends the sequence."""

SAMPLING_KEYWORDS = frozenset(
    "end_id pad_id max_tokens min_tokens temperature top_p top_k min_p seed repetition_penalty presence_penalty "
    "frequency_penalty stop_token_ids include_stop_str_in_output ignore_eos detokenize add_special_tokens logprobs "
    "embedding_bias guided_decoding".split()
)
"""All that this engine ever gives SamplingParams."""


def end_id(request: Request) -> int:
    """The one end-of-sequence token that TensorRT-LLM knows; a model's others are stop tokens."""
    return NO_TOKEN if request.sampling.ignore_eos or not request.eos_token_ids else request.eos_token_ids[0]


def sampling_keywords(request: Request) -> dict[str, Any]:
    """Everything but `embedding_bias` and `guided_decoding`, which are objects of other libraries.

    For the decode of a hand-over: what the whole answer is asked for, the tokens of the prefill included.
    """
    sampling, handed_over = request.sampling, request.num_resumed if request.kv_handle is not None else 0
    end = end_id(request)
    keywords: dict[str, Any] = {
        # Without an end id TensorRT-LLM would look for a tokenizer, which it is not given.
        "end_id": end,
        "pad_id": max(end, 0),
        # None would reserve the longest sequence for each request; 0 has crashed the executor.
        "max_tokens": sampling.max_tokens + handed_over,
        "ignore_eos": sampling.ignore_eos,
        # Nothing is to be trimmed: the server keeps stop tokens out of the text and counts them.
        "include_stop_str_in_output": True,
        "detokenize": False,
        "add_special_tokens": False,
        **_choice(sampling),
        **_penalties(sampling),
    }
    stops = [token_id for token_id in ending_token_ids(request) if token_id != end]
    if stops:
        keywords["stop_token_ids"] = stops
    if sampling.min_tokens:
        keywords["min_tokens"] = sampling.min_tokens + handed_over
    if sampling.logprobs is not None:
        # 0 counts as "off" there; the surplus alternative is dropped from what comes back.
        keywords["logprobs"] = max(1, sampling.logprobs)
    return keywords


def _choice(sampling: SamplingParams) -> dict[str, Any]:
    if sampling.temperature == 0:
        return {"top_k": 1}  # greedy in every version, whatever else is left out
    keywords: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
    }
    if sampling.min_p:
        keywords["min_p"] = sampling.min_p
    if sampling.seed is not None:
        keywords["seed"] = sampling.seed % 2**64  # unsigned there
    return keywords


def _penalties(sampling: SamplingParams) -> dict[str, Any]:
    """Only those that do something: which ones a sampler honours is not the same in every version."""
    neutral = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    return {name: value for name, off in neutral.items() if (value := getattr(sampling, name)) != off}


def ending_token_ids(request: Request) -> list[int]:
    """All tokens that end the sequence, each once."""
    others = () if request.sampling.ignore_eos else request.eos_token_ids
    return list(dict.fromkeys((*request.sampling.stop_token_ids, *others)))
