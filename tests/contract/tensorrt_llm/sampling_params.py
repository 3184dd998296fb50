"""`tensorrt_llm.sampling_params`: one object for one request, validated when it is made."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydantic import BaseModel

from .stand_in.features import versioned_fields
from .stand_in.violations import documented


class LogprobParams(NamedTuple):
    prompt_logprobs: int | None = None
    logprobs: int | None = None


@dataclass(slots=True, kw_only=True)
@versioned_fields
class GuidedDecodingParams:
    """Exactly one guide. `json` is the bare schema, not OpenAI's wrapper of a name and a schema."""

    json: str | BaseModel | dict[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    json_object: bool = False
    structural_tag: str | None = None

    def guides(self) -> list[str]:
        named = ("json", "regex", "grammar", "structural_tag")
        return [name for name in named if getattr(self, name) is not None] + ["json_object"] * bool(self.json_object)

    def _validate(self) -> None:
        if len(self.guides()) != 1:
            raise documented(ValueError(f"Only one guide can be used for a request, but got {len(self.guides())}."))
        if isinstance(self.json, dict) and {"name", "schema"} <= self.json.keys():
            raise documented(ValueError("guided_decoding.json holds OpenAI's wrapper, not the schema in it"))


@dataclass(slots=True, kw_only=True)
@versioned_fields
class SamplingParams:
    end_id: int | None = None
    pad_id: int | None = None
    max_tokens: int | None = 32
    bad: str | list[str] | None = None
    bad_token_ids: list[int] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    embedding_bias: Any = None
    logits_processor: Any = None
    apply_batched_logits_processor: bool = False
    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    top_k: int | None = None
    top_p: float | None = None
    top_p_min: float | None = None
    top_p_reset_ids: int | None = None
    top_p_decay: float | None = None
    seed: int | None = None
    temperature: float | None = None
    min_tokens: int | None = None
    beam_search_diversity_rate: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    length_penalty: float | None = None
    early_stopping: int | None = None
    no_repeat_ngram_size: int | None = None
    min_p: float | None = None
    beam_width_array: list[int] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_context_logits: bool = False
    return_generation_logits: bool = False
    exclude_input_from_output: bool = True
    return_encoder_output: bool = False
    return_perf_metrics: bool = False
    additional_model_outputs: list[Any] | None = None
    lookahead_config: Any = None
    guided_decoding: GuidedDecodingParams | None = None
    ignore_eos: bool = False
    detokenize: bool = True
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    _stream_interval: int | None = field(default=None, init=False, repr=False)
    _stand_in_used: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.pad_id is None:
            self.pad_id = self.end_id
        self.best_of = self.n if self.best_of is None else self.best_of
        problem = self._problem()
        if problem:
            raise documented(ValueError(problem))
        if self.guided_decoding is not None:
            self.guided_decoding._validate()

    def _problem(self) -> str | None:
        """The documented range checks, in their order."""
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            return f"require 0 <= top_p <= 1, got top_p={self.top_p}"
        if self.top_k is not None and self.top_k < 0:
            return f"require top_k >= 0, got top_k={self.top_k}"
        if self.temperature is not None and self.temperature < 0:
            return f"require temperature >= 0, got temperature={self.temperature}"
        if self.best_of is not None and self.best_of < self.n:
            return f"best_of ({self.best_of}) cannot be less than n ({self.n})"
        if (self.best_of or 1) > 1 and self._greedy_decoding and not os.environ.get("TLLM_ALLOW_N_GREEDY_DECODING"):
            return f"Greedy decoding allows no best_of > 1, got best_of={self.best_of}"
        if self.truncate_prompt_tokens is not None and self.truncate_prompt_tokens < 1:
            return f"truncate_prompt_tokens must be >= 1, got {self.truncate_prompt_tokens}"
        return None

    @property
    def _greedy_decoding(self) -> bool:
        unset = self.temperature is None and self.top_p is None and self.top_k is None
        chosen = self.top_k == 1 or self.top_p == 0.0 or self.temperature == 0
        return not self.use_beam_search and (unset or chosen)
