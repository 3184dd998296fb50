"""The rules that concern several fields of a body, and the defaults that hang on them. All raise InvalidRequest."""

from __future__ import annotations

from typing import Any

from trtserve.server.api.schema_bodies import (
    MAX_CHOICES,
    ChatCompletionBody,
    CompletionBody,
    GenerationBody,
    TemplateFields,
)
from trtserve.server.api.schema_messages import Message
from trtserve.server.api.schema_prompts import parse_logit_bias
from trtserve.server.errors import InvalidRequest

# Names that the renderer itself gives to the template, or that are its own arguments.
_TEMPLATE_OWN = frozenset(
    "self messages tools documents add_generation_prompt continue_final_message chat_template tokenize".split()
)


def shared_params(body: GenerationBody) -> dict[str, Any]:
    """The GenerationParams fields that chat and completions make in the same way."""
    options = body.stream_options
    if options is not None and not body.stream:
        raise InvalidRequest(
            "`stream_options` is given and `stream` is not true; set stream or leave the options out.",
            param="stream_options",
        )
    include_usage = options is not None and bool(options.include_usage)
    return {
        "n": body.n or 1,
        "stream": bool(body.stream),
        "include_usage": include_usage,
        "continuous_usage_stats": include_usage and options is not None and bool(options.continuous_usage_stats),
        "min_tokens": body.min_tokens or 0,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": 0 if body.top_k == -1 else body.top_k,
        "min_p": body.min_p,
        "seed": body.seed,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "logit_bias": parse_logit_bias(body.logit_bias) if body.logit_bias is not None else (),
        "stop_token_ids": tuple(body.stop_token_ids) if body.stop_token_ids else (),
        "ignore_eos": bool(body.ignore_eos),
        "stop": (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        "include_stop_str_in_output": bool(body.include_stop_str_in_output),
        "skip_special_tokens": body.skip_special_tokens is not False,
        "cache_salt": body.cache_salt or "",
    }


def max_tokens(body: GenerationBody, default: int | None) -> int | None:
    """The most tokens a choice may have; `default` where the request is silent. min_tokens is checked against it."""
    most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if body.max_tokens is not None and most != body.max_tokens:
        raise InvalidRequest(
            f"`max_tokens` is {body.max_tokens} and `max_completion_tokens` is {most}, but they mean the same; "
            "send one of them.",
            param="max_tokens",
        )
    most = default if most is None else most
    if most is not None and body.min_tokens is not None and body.min_tokens > most:
        raise InvalidRequest(
            f"`min_tokens` is {body.min_tokens} and max_tokens is {most}; send a min_tokens of {most} or less, "
            "or a larger max_tokens.",
            param="min_tokens",
        )
    return most


def chat_logprobs(body: ChatCompletionBody, engine_most: int | None) -> int | None:
    """How many likely tokens to tell beside the chosen one, None for no logprobs at all. engine_most: None where the
    engine gives none."""
    if not body.logprobs:
        if body.top_logprobs:
            raise InvalidRequest(
                f"`top_logprobs` is {body.top_logprobs} and `logprobs` is not true; set logprobs too.",
                param="top_logprobs",
            )
        return None
    return _within(body.top_logprobs or 0, engine_most, "top_logprobs" if body.top_logprobs else "logprobs")


def completion_logprobs(body: CompletionBody, engine_most: int | None, api_most: int) -> int | None:
    """As `chat_logprobs`, in the older form where the number itself asks for logprobs."""
    if body.logprobs is None:
        return None
    if body.echo:
        raise InvalidRequest(
            "`echo` with logprobs needs scores of the prompt's tokens, which are not available yet; leave one out.",
            param="echo",
            code="unsupported_parameter",
        )
    most = None if engine_most is None else min(engine_most, api_most)
    return _within(body.logprobs, most, "logprobs")


def check_choices(num_prompts: int, n: int) -> None:
    """Keep one request from taking the whole server."""
    if num_prompts * n > MAX_CHOICES:
        raise InvalidRequest(
            f"{num_prompts} prompts with n {n} make {num_prompts * n} choices; send {MAX_CHOICES} or less in one "
            "request.",
            param="prompt" if num_prompts > MAX_CHOICES else "n",
        )


def template_settings(body: TemplateFields) -> tuple[dict[str, Any], bool, bool]:
    """Template variables, whether to open an answer, whether to continue the last message."""
    kwargs = body.chat_template_kwargs or {}
    for name in sorted(kwargs.keys() & _TEMPLATE_OWN):
        raise InvalidRequest(
            f"`chat_template_kwargs` sets {name}, which the server itself gives to the template; leave it out.",
            param=f"chat_template_kwargs.{name}",
        )
    continue_final_message = bool(body.continue_final_message)
    if continue_final_message and body.add_generation_prompt:
        raise InvalidRequest(
            "`continue_final_message` and `add_generation_prompt` are both true; the last message is continued or a "
            "new one begun, so send one of them.",
            param="continue_final_message",
        )
    return kwargs, body.add_generation_prompt is not False and not continue_final_message, continue_final_message


def check_continued(messages: tuple[Message, ...], continue_final_message: bool) -> None:
    """Whether there is something to continue."""
    if continue_final_message and messages and not messages[-1].get("content"):
        raise InvalidRequest(
            "`continue_final_message` is true and the last message has no text to continue; give it some.",
            param="continue_final_message",
        )


def _within(count: int, most: int | None, param: str) -> int:
    if most is None:
        raise InvalidRequest(
            "The engine of this server gives no logprobs; leave them out.", param=param, code="unsupported_parameter"
        )
    if count > most:
        raise InvalidRequest(f"`{param}` is {count}; send {most} or less.", param=param)
    return count
