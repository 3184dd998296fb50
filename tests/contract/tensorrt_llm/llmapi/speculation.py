"""Speculative decoding's configurations. In 1.2 `decoding_type` chooses the class and is no field of it: a raw dict
with it given to the LLM is refused, and `update_llm_args_with_extra_dict` is the way in."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import model_validator

from tensorrt_llm.stand_in.features import versioned_model

from .configs import StrictBaseModel


class DecodingBaseConfig(StrictBaseModel):
    decoding_type: ClassVar[str]
    max_draft_len: int | None = None
    max_total_draft_tokens: int | None = None
    speculative_model: str | None = None
    max_concurrency: int | None = None
    draft_len_schedule: dict[int, int] | None = None
    load_format: str | None = None
    acceptance_window: int | None = None
    acceptance_length_threshold: float | None = None
    allow_advanced_sampling: bool = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DecodingBaseConfig:
        """Reads and pops `decoding_type`. ValueError where it names no type."""
        name = data.pop("decoding_type", None)
        for kind in DECODING_TYPES:
            if kind.decoding_type == name:
                return kind(**data)
        raise ValueError(f"Invalid decoding type: {name}")


@versioned_model
class MTPDecodingConfig(DecodingBaseConfig):
    decoding_type = "MTP"
    num_nextn_predict_layers: int = 1
    use_relaxed_acceptance_for_thinking: bool = False
    relaxed_topk: int = 1
    relaxed_delta: float = 0.0
    use_mtp_vanilla: bool = False
    mtp_eagle_one_model: bool = True
    begin_thinking_phase_token: int = 128798
    end_thinking_phase_token: int = 128799

    @model_validator(mode="after")
    def _draft_length(self) -> MTPDecodingConfig:
        self.max_draft_len = self.num_nextn_predict_layers
        return self


class EagleDecodingConfig(DecodingBaseConfig):
    decoding_type = "Eagle"
    eagle_choices: list[list[int]] | None = None
    greedy_sampling: bool = True
    posterior_threshold: float | None = None
    use_dynamic_tree: bool = False
    dynamic_tree_max_topK: int | None = None
    num_eagle_layers: int | None = None
    max_non_leaves_per_layer: int | None = None
    eagle3_one_model: bool = True
    eagle3_layers_to_capture: set[int] | None = None


class Eagle3DecodingConfig(EagleDecodingConfig):
    decoding_type = "Eagle3"


class NGramDecodingConfig(DecodingBaseConfig):
    decoding_type = "NGram"
    max_matching_ngram_size: int = 2
    is_keep_all: bool = True
    is_use_oldest: bool = True
    is_public_pool: bool = True


class DraftTargetDecodingConfig(DecodingBaseConfig):
    decoding_type = "Draft_Target"


class AutoDecodingConfig(DecodingBaseConfig):
    decoding_type = "AUTO"


DECODING_TYPES: tuple[type[DecodingBaseConfig], ...] = (
    MTPDecodingConfig,
    EagleDecodingConfig,
    Eagle3DecodingConfig,
    NGramDecodingConfig,
    DraftTargetDecodingConfig,
    AutoDecodingConfig,
)
