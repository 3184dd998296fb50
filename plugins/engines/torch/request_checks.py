"""What a request must satisfy before it may enter the queue."""

from __future__ import annotations

from trtserve.plugins.api import Request, RequestRefused

MAX_LOGPROBS = 20


def check_request(request: Request, vocab_size: int, max_seq_len: int) -> None:
    """Raises RequestRefused, in words for the client, where the engine could never serve this request."""
    num_tokens = len(request.prompt)
    if not num_tokens:
        raise RequestRefused("the prompt has no tokens: send at least one")
    if num_tokens >= max_seq_len:
        raise RequestRefused(
            f"the prompt has {num_tokens} tokens and this model takes {max_seq_len}, the answer included: shorten it"
        )
    if not 0 <= request.num_resumed < num_tokens:
        raise RequestRefused(
            f"{request.num_resumed} tokens of a prompt of {num_tokens} were generated before: at least one has to be "
            "there from the beginning"
        )
    lowest, highest = min(request.prompt), max(request.prompt)
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise RequestRefused(f"token id {wrong} is not in the vocabulary: ids go from 0 to {vocab_size - 1}")
    for token_id, _ in request.sampling.logit_bias:
        if not 0 <= token_id < vocab_size:
            raise RequestRefused(f"logit_bias names token id {token_id}: ids go from 0 to {vocab_size - 1}")
    if (request.sampling.logprobs or 0) > MAX_LOGPROBS:
        raise RequestRefused(f"{request.sampling.logprobs} log probabilities a token: at most {MAX_LOGPROBS} are given")
