"""Options of the KV-aware policies (`--router-options`). docs/routing.md gives the reasons for the defaults."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class KVOptions(BaseModel):
    """Weights of the cost, and how long requests may be held. All of them have no unit but where the name says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    others_weight: float = Field(
        0.5, ge=0, le=10, description="Worth of the wait of a prompt in the same pass, against the request's own."
    )
    decode_weight: float = Field(
        0.05, ge=0, le=10, description="Worth of the wait of one decoding sequence for a pass with prompts."
    )
    decode_limit: float = Field(
        2.0, gt=0, le=1000, description="Worth of the wait of ever so many decoding sequences together."
    )
    reuse_weight: float = Field(1.0, ge=0, le=100, description="Scales the worth of a stored block.")
    lead_ms: float = Field(10.0, ge=0, le=1000, description="A pass that ends within this is as good as over.")
    gather_share: float = Field(
        0.03, ge=0, le=1, description="A request waits this share of its prefill time for others of the same moment."
    )
    gather_ms: float = Field(10.0, ge=0, le=1000, description="And never longer than this.")
    age_weight: float = Field(0.25, ge=0, le=10, description="How much a wait moves a held request forward.")
    window: int = Field(32, ge=1, le=256, description="So many held requests are planned at once.")
