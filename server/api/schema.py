"""Request bodies in, frozen results out: parse, validate, and refuse with the field that is to blame.

Every bad body ends in an InvalidRequest (400), or ModelNotFound (404) for a model that is not served; nothing else
is raised. Types and bounds of single fields are in `schema_bodies`; the rules over several are in `schema_rules`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from trtserve.plugins.api import GuidedDecoding, TokenIds
from trtserve.server.api.parameters import GenerationParams
from trtserve.server.api.schema_bodies import (
    DEFAULT_COMPLETION_TOKENS,
    ChatCompletionBody,
    CompletionBody,
    DetokenizeBody,
    RoleBody,
    TokenizeBody,
)
from trtserve.server.api.schema_guided import GUIDED_FIELDS, asks_for_a_form, parse_guided
from trtserve.server.api.schema_messages import Message, normalise_messages
from trtserve.server.api.schema_problems import invalid_request, shown
from trtserve.server.api.schema_prompts import parse_prompts, parse_token_ids
from trtserve.server.api.schema_refusals import UnknownParams, sort_out
from trtserve.server.api.schema_rules import (
    chat_logprobs,
    check_choices,
    check_continued,
    completion_logprobs,
    max_tokens,
    shared_params,
    template_settings,
)
from trtserve.server.errors import InvalidRequest, ModelNotFound

_BodyT = TypeVar("_BodyT", bound=BaseModel)

_CHAT_FIELDS = frozenset(ChatCompletionBody.model_fields)
_COMPLETION_FIELDS = frozenset(CompletionBody.model_fields)
_TOKENIZE_FIELDS = frozenset(TokenizeBody.model_fields)
_DETOKENIZE_FIELDS = frozenset(DetokenizeBody.model_fields)
_MOST_FIELDS = 512


@dataclass(frozen=True, slots=True)
class RequestRules:
    """What depends on the deployment; made once, when the model is known."""

    served_models: tuple[str, ...]
    vocab_size: int | None = None  # bounds the token ids of prompts and of /detokenize
    unknown_params: UnknownParams = "warn"
    max_logprobs: int | None = 20  # of the settings and the engine; None: the engine gives none
    max_completion_logprobs: int = 5  # OpenAI's bound for /v1/completions
    guides: Callable[[], bool] = field(default=lambda: False)  # whether every ready engine can decode guided


@dataclass(frozen=True, slots=True)
class TokenizeParams:
    """A text or a conversation to tokenize; text is None where messages are given."""

    model: str
    add_special_tokens: bool
    return_token_strs: bool
    text: str | None = None
    messages: tuple[Message, ...] = ()
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DetokenizeParams:
    """Token ids to turn into text. tokens: int32[num_tokens], may be empty."""

    model: str
    tokens: TokenIds
    skip_special_tokens: bool = False
    ignored: tuple[str, ...] = ()


def parse_chat(raw: bytes, rules: RequestRules) -> GenerationParams:
    """A body of POST /v1/chat/completions."""
    data = _load(raw)
    body = _validate(ChatCompletionBody, data)
    model = _served(body.model, rules)
    guided, known = _guided(data, _CHAT_FIELDS, rules)
    ignored = sort_out(data, known, body.n or 1, rules.unknown_params)
    template_kwargs, add_generation_prompt, continue_final_message = template_settings(body)
    messages = normalise_messages(body.messages)
    check_continued(messages, continue_final_message)
    return GenerationParams(
        model=model,
        max_tokens=max_tokens(body, None),
        logprobs=chat_logprobs(body, rules.max_logprobs),
        add_special_tokens=bool(body.add_special_tokens),
        messages=messages,
        chat_template_kwargs=template_kwargs,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        service_tier=None if data.get("service_tier") is None else "default",
        guided=guided,
        ignored=ignored,
        **shared_params(body),
    )


def parse_completion(raw: bytes, rules: RequestRules) -> GenerationParams:
    """A body of POST /v1/completions."""
    data = _load(raw)
    body = _validate(CompletionBody, data)
    model = _served(body.model, rules)
    guided, known = _guided(data, _COMPLETION_FIELDS, rules)
    ignored = sort_out(data, known, body.n or 1, rules.unknown_params)
    prompts = parse_prompts(body.prompt, rules.vocab_size)
    check_choices(len(prompts), body.n or 1)
    return GenerationParams(
        model=model,
        max_tokens=max_tokens(body, DEFAULT_COMPLETION_TOKENS),
        logprobs=completion_logprobs(body, rules.max_logprobs, rules.max_completion_logprobs),
        add_special_tokens=body.add_special_tokens is not False,
        echo=bool(body.echo),
        prompts=prompts,
        guided=guided,
        ignored=ignored,
        **shared_params(body),
    )


def parse_tokenize(raw: bytes, rules: RequestRules) -> TokenizeParams:
    """A body of POST /tokenize."""
    data = _load(raw)
    body = _validate(TokenizeBody, data)
    model = _served(body.model, rules)
    ignored = sort_out(data, _TOKENIZE_FIELDS, 1, rules.unknown_params)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest(
            "Exactly one of `prompt` and `messages` is needed; "
            + ("neither was sent." if body.prompt is None else "both were sent."),
            param="prompt",
            code="missing_required_parameter" if body.prompt is None else None,
        )
    template_kwargs, add_generation_prompt, continue_final_message = template_settings(body)
    messages = normalise_messages(body.messages or [])
    check_continued(messages, continue_final_message)
    return TokenizeParams(
        model=model,
        add_special_tokens=body.messages is None if body.add_special_tokens is None else body.add_special_tokens,
        return_token_strs=bool(body.return_token_strs),
        text=body.prompt,
        messages=messages,
        chat_template_kwargs=template_kwargs,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        ignored=ignored,
    )


def parse_detokenize(raw: bytes, rules: RequestRules) -> DetokenizeParams:
    """A body of POST /detokenize."""
    data = _load(raw)
    body = _validate(DetokenizeBody, data)
    return DetokenizeParams(
        model=_served(body.model, rules),
        tokens=parse_token_ids(body.tokens, "tokens", rules.vocab_size),
        skip_special_tokens=bool(body.skip_special_tokens),
        ignored=sort_out(data, _DETOKENIZE_FIELDS, 1, rules.unknown_params),
    )


def parse_role(raw: bytes) -> RoleBody:
    """A body of POST /v1/workers/{worker_id}/role."""
    return _validate(RoleBody, _load(raw))


def _guided(
    data: dict[str, Any], known: frozenset[str], rules: RequestRules
) -> tuple[GuidedDecoding | None, frozenset[str]]:
    """The form that is asked for, and the fields that are known then."""
    if not asks_for_a_form(data) or not rules.guides():
        return None, known
    return parse_guided(data), known | GUIDED_FIELDS


def _load(raw: bytes) -> dict[str, Any]:
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(
            f"The body is not valid JSON: {error}. Send one JSON object.", code="invalid_json"
        ) from None
    if not isinstance(data, dict):
        raise InvalidRequest(f"The body is {shown(data)}; send a JSON object.", code="invalid_json")
    if len(data) > _MOST_FIELDS:
        raise InvalidRequest(f"The body has {len(data)} fields; no request needs more than {_MOST_FIELDS}.")
    return data


def _validate(model: type[_BodyT], data: dict[str, Any]) -> _BodyT:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise invalid_request(error, data) from None


def _served(model: str | None, rules: RequestRules) -> str:
    if model is None:
        if len(rules.served_models) != 1:
            raise InvalidRequest(
                f"`model` is missing and {len(rules.served_models)} models are served; name one of them.",
                param="model",
                code="missing_required_parameter",
            )
        return rules.served_models[0]
    if model not in rules.served_models:
        raise ModelNotFound(model, rules.served_models)
    return model
