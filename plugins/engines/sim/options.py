"""Options of the simulated engine (`--engine-options`), each with its bounds."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from trtserve.plugins.engines.sim.timing import PassTiming
from trtserve.plugins.engines.sim.tokens import TokenModel

_TIMING = PassTiming()
_KV_TOKEN_BYTES = 1024
_MIN_TOKENS = 32  # more than the largest number of log probabilities a request can ask for


class FaultKind(StrEnum):
    """What goes wrong when a fault is triggered."""

    CRASH = "crash"  # the process ends with exit code 70, without a word
    HANG = "hang"  # the pass never ends
    ERROR = "error"  # the request ends with an error; the engine goes on


class SimOptions(BaseModel):
    """Everything that a simulated engine can be told, beside the limits every engine has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    speedup: float = Field(1.0, gt=0, le=1e12, description="A pass takes its simulated time divided by this.")
    start_s: float = Field(0.0, ge=0, le=3600, description="Seconds that starting takes.")
    slow_factor: float = Field(1.0, gt=0, le=1e6, description="Every pass takes this many times as long.")

    prefill_quadratic_ms: float = Field(
        _TIMING.prefill_quadratic_ms, ge=0, le=1, description="Prefill time: times the square of new prompt tokens."
    )
    prefill_linear_ms: float = Field(
        _TIMING.prefill_linear_ms, ge=0, le=1e3, description="Prefill time: times new prompt tokens."
    )
    prefill_constant_ms: float = Field(
        _TIMING.prefill_constant_ms, ge=0, le=1e6, description="Prefill time: for any pass with a prompt in it."
    )
    decode_quadratic_ms: float = Field(
        _TIMING.decode_quadratic_ms, ge=-1e6, le=1e6, description="Decode time: times the square of KV cache use."
    )
    decode_linear_ms: float = Field(
        _TIMING.decode_linear_ms, ge=-1e6, le=1e6, description="Decode time: times KV cache use, 0 to 1."
    )
    decode_constant_ms: float = Field(
        _TIMING.decode_constant_ms, ge=0, le=1e6, description="Decode time: for any pass that decodes."
    )
    decode_usage_limit: float = Field(
        _TIMING.usage_limit, gt=0, le=1, description="KV cache use above this is timed as this."
    )

    vocab_size: int = Field(32000, ge=_MIN_TOKENS, le=1 << 30, description="Used where the model folder has none.")
    first_token_id: int | None = Field(None, ge=0, description="Least id generated; default: 1000, or a third.")
    last_token_id: int | None = Field(None, ge=0, description="Greatest id generated; default: the vocabulary's last.")
    eos_probability: float = Field(0.0, ge=0, le=1, description="That a token is the end of the sequence.")

    num_draft_tokens: int = Field(0, ge=0, le=16, description="Tokens drafted in a decode step; 0: no speculation.")
    acceptance_rate: float = Field(0.7, ge=0, le=1, description="That a drafted token is right.")

    kv_block_bytes: int | None = Field(
        None,
        ge=64,
        le=1 << 24,
        description="Of a block's simulated KV, where workers exchange it; default: 1024 a token.",
    )

    fail_start: bool = Field(False, description="Starting raises an error.")
    crash_after_steps: int | None = Field(None, ge=0, description="The process ends before the pass after this many.")
    hang_after_steps: int | None = Field(None, ge=0, description="The pass after this many never ends.")
    fault_token_id: int | None = Field(None, ge=0, description="A prompt with this token triggers the fault.")
    fault_kind: FaultKind = Field(FaultKind.CRASH, description="What fault_token_id triggers: crash, hang or error.")
    fault_after_tokens: int = Field(0, ge=0, description="Trigger when the request has got this many tokens.")

    def timing(self) -> PassTiming:
        """The pass-time model these options describe."""
        return PassTiming(
            self.prefill_quadratic_ms,
            self.prefill_linear_ms,
            self.prefill_constant_ms,
            self.decode_quadratic_ms,
            self.decode_linear_ms,
            self.decode_constant_ms,
            self.decode_usage_limit,
        )

    def row_bytes(self, block_size: int) -> int:
        """Bytes of simulated KV in one block."""
        return _KV_TOKEN_BYTES * block_size if self.kv_block_bytes is None else self.kv_block_bytes

    def token_model(self, vocab_size: int, seed: int) -> TokenModel:
        """Raises ValueError if the ids do not fit the vocabulary or are too few."""
        first = min(1000, vocab_size // 3) if self.first_token_id is None else self.first_token_id
        last = vocab_size - 1 if self.last_token_id is None else self.last_token_id
        if last >= vocab_size or last - first + 1 < _MIN_TOKENS:
            raise ValueError(
                f"Token ids {first} to {last} do not make {_MIN_TOKENS} tokens of a vocabulary of {vocab_size}:"
                " choose another first_token_id or last_token_id."
            )
        return TokenModel(first, last, seed, self.eos_probability)
