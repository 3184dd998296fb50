"""`tensorrt_llm.scheduling_params`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any  # noqa: F401 - the type of a field that a test adds

from .stand_in.features import versioned_fields


@dataclass(slots=True, kw_only=True)
@versioned_fields
class SchedulingParams:
    attention_dp_rank: int | None = None
    attention_dp_relax: bool | None = None
