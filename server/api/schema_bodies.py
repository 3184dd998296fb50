"""The request bodies as pydantic models: names, types and bounds. The OpenAPI document is made from them too.

Strict: a number in quotes, true for an integer, 5.0 for an integer, NaN and Infinity are refused. null means "not
given" for every optional field. Rules over several fields are in `trtserve.server.api.schema`; fields that are not
here are in `trtserve.server.api.schema_refusals` or unknown.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from trtserve.server.api.schema_messages import Message

MAX_CHOICES = 128
MAX_STOP_STRINGS = 32
MAX_BIASES = 1024
DEFAULT_COMPLETION_TOKENS = 16
_INT32_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1

_PROMPT_SCHEMA: dict[str, Any] = {
    "description": "Text, token ids, or a list of either; n times as many choices as prompts, at most 128.",
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
        {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
        {
            "type": "array",
            "minItems": 1,
            "items": {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
        },
    ],
}
_BIAS_SCHEMA: dict[str, Any] = {
    "description": "Token id, as a string, to what is added to its logit.",
    "anyOf": [
        {
            "type": "object",
            "maxProperties": MAX_BIASES,
            "propertyNames": {"pattern": "^(0|[1-9][0-9]*)$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        },
        {"type": "null"},
    ],
}
_TOKENS_SCHEMA: dict[str, Any] = {
    "description": "Token ids of the model's vocabulary.",
    "type": "array",
    "items": {"type": "integer", "minimum": 0},
}

TokenCount = Annotated[int, Field(ge=1, le=_INT32_MAX)]
TokenId = Annotated[int, Field(ge=0, le=_INT32_MAX)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
StopString = Annotated[str, Field(min_length=1)]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)]


class Body(BaseModel):
    """What every body has."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    model: str | None = Field(default=None, description="May be left out where exactly one model is served.")


class StreamOptions(BaseModel):
    """Only together with stream. continuous_usage_stats has an effect only together with include_usage."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(Body):
    """What chat and completions have in common."""

    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    min_tokens: int | None = Field(default=None, ge=0, le=_INT32_MAX)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=-1, le=_INT32_MAX, description="-1 and 0 turn it off.")
    min_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=-_INT64_MAX - 1, le=_INT64_MAX)
    repetition_penalty: float | None = Field(default=None, gt=0, le=2, allow_inf_nan=False)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[Any, WithJsonSchema(_BIAS_SCHEMA)] = None
    stop: StopString | StopStrings | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    cache_salt: str | None = Field(
        default=None, min_length=1, max_length=1024, description="Requests share prefix cache only with equal salts."
    )


class TemplateFields(BaseModel):
    """How a conversation becomes a prompt; shared by chat and tokenize."""

    model_config = ConfigDict(strict=True, extra="ignore")

    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class ChatCompletionBody(GenerationBody, TemplateFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, description="Needs logprobs: true. The server has a limit.")


class CompletionBody(GenerationBody):
    """POST /v1/completions. max_tokens is 16 where the request is silent."""

    prompt: Annotated[Any, WithJsonSchema(_PROMPT_SCHEMA)]
    logprobs: int | None = Field(default=None, ge=0, description="The server has a limit.")
    echo: bool | None = Field(default=None, description="Puts the prompt before the answer. Not with logprobs.")


class TokenizeBody(Body, TemplateFields):
    """POST /tokenize: exactly one of prompt and messages."""

    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool | None = Field(default=None, description="Default: true for a prompt, false for messages.")
    return_token_strs: bool | None = None


class RoleBody(BaseModel):
    """POST /v1/workers/{worker_id}/role."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["agg", "prefill", "decode"]
    drain_timeout_s: float | None = Field(
        default=None, gt=0, le=86_400, description="Seconds for the worker's requests to end. Default: a setting's."
    )
    force: bool | None = Field(default=None, description="Also where it is the last ready worker of its role.")


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: Annotated[Any, WithJsonSchema(_TOKENS_SCHEMA)]
    skip_special_tokens: bool | None = None
