"""The embedded engine's own options (`--engine-options`)."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class TorchOptions(BaseModel):
    """What can be chosen beyond `EngineConfig`; every default is the fast and safe one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Threads of one forward pass on the CPU; none given: torch's choice. "
        "Workers that share a machine want their share of its cores.",
    )
    packed_linears: bool = Field(
        default=True,
        description="On the CPU in bfloat16, keep linear weights in oneDNN's own layout where this torch can.",
    )
    decode_rows_share: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="On the CPU, memory for a second copy of the KV of sequences that decode, as a share of the KV "
        "cache's and beside it; attention is faster over that copy, and 0 does without.",
    )
    layer_swap: bool = Field(
        default=True,
        description="Run Llama-shaped decoder layers through a leaner layer that was checked against the original.",
    )
