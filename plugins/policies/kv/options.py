"""Options of the KV-aware policies (`--router-options`). docs/routing.md gives the reasons for the defaults."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class KVOptions(BaseModel):
    """Weights of the cost, and how long requests may be held. All of them have no unit but where the name says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    others_weight: float = Field(
        0.5, ge=0, le=10, description="Worth of another prompt's wait, against the request's own."
    )
    decode_weight: float = Field(
        0.05, ge=0, le=10, description="Worth of a decoding sequence's wait for a pass with prompts."
    )
    slow_weight: float = Field(
        0.05, ge=0, le=10, description="Worth of slower decode passes, for the request and the others there."
    )
    reuse_weight: float = Field(1.0, ge=0, le=100, description="Scales the bonus for prompt blocks that are there.")
    evict_weight: float = Field(1.0, ge=0, le=100, description="Scales the cost of blocks that must be evicted.")
    lead_ms: float = Field(10.0, ge=0, le=1000, description="A pass that ends within this is as good as over.")
    age_weight: float = Field(1.0, ge=0, le=10, description="How much a wait moves a held request forward.")
    window: int = Field(16, ge=1, le=256, description="So many of the oldest held requests are planned at once.")
