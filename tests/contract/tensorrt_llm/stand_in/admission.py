"""Which requests the engine refuses, once it is their turn."""

from __future__ import annotations

from .block_pool import BlockPool
from .engine_settings import EngineSettings
from .environment import Environment
from .request import Request


def refusal(
    request: Request, wanted_blocks: int, pool: BlockPool, settings: EngineSettings, environment: Environment
) -> str | None:
    """Why one request fails; None where it does not. RuntimeError where the executor does."""
    prompt = request.prompt
    if environment.fatal_error_token is not None and environment.fatal_error_token in prompt:
        raise RuntimeError("stand-in: the executor hit a fatal error")
    if environment.request_error_token is not None and environment.request_error_token in prompt:
        return "stand-in: this request fails"
    if request.sampling.guided_decoding is not None and settings.guided_decoding_backend is None:
        return "Guided decoding is not enabled: guided_decoding_backend is None"
    if len(prompt) >= settings.max_seq_len:
        return f"The prompt of {len(prompt)} tokens leaves no room in max_seq_len ({settings.max_seq_len})"
    if wanted_blocks > pool.num_blocks:
        return f"The request needs {wanted_blocks} KV blocks of {pool.num_blocks}"
    return None
