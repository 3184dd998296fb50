"""The shapes of our answers, for the OpenAPI document. Answers themselves are made with orjson from plain dicts, so
these are descriptions; tests over HTTP hold them against what is sent."""

from __future__ import annotations

from typing import Any, TypeAlias

Schema: TypeAlias = dict[str, Any]

_STRING: Schema = {"type": "string"}
_INTEGER: Schema = {"type": "integer"}
_BOOLEAN: Schema = {"type": "boolean"}
_NUMBER: Schema = {"type": "number"}
_ROLE: Schema = {"type": "string", "enum": ["agg", "prefill", "decode"]}


def reference(name: str) -> Schema:
    """A $ref to a schema of the document's components."""
    return {"$ref": f"#/components/schemas/{name}"}


def answer_schemas() -> dict[str, Schema]:
    """Every schema of an answer, by its name under components/schemas."""
    return {**_generation_schemas(), **_chunk_schemas(), **_other_schemas()}


def _object(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    return {"type": "object", "required": list(required), "properties": {**required, **(optional or {})}}


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _constant(value: str) -> Schema:
    return {"type": "string", "const": value}


def _nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _generation_schemas() -> dict[str, Schema]:
    stop_reason = {"anyOf": [_STRING, _INTEGER, {"type": "null"}], "description": "Stop string or token that matched."}
    ended = {"finish_reason": {"type": "string", "enum": ["stop", "length"]}}
    message = _object({"role": _constant("assistant"), "content": _nullable(_STRING)}, {"refusal": _nullable(_STRING)})
    chat_choice = {"index": _INTEGER, "message": message, **ended}
    completion_choice = {"index": _INTEGER, "text": _STRING, **ended}
    return {
        "Usage": _object(
            {"prompt_tokens": _INTEGER, "completion_tokens": _INTEGER, "total_tokens": _INTEGER},
            {
                "prompt_tokens_details": _nullable(_object({"cached_tokens": _INTEGER})),
                "completion_tokens_details": _nullable(_object({"reasoning_tokens": _INTEGER})),
            },
        ),
        "ChatLogprobs": _object({"content": _nullable(_array(_token_logprob()))}, {"refusal": _nullable(_STRING)}),
        "CompletionLogprobs": _object(
            {
                "tokens": _array(_STRING),
                "token_logprobs": _array(_nullable(_NUMBER)),
                "text_offset": _array(_INTEGER),
                "top_logprobs": _nullable(_array(_nullable({"type": "object", "additionalProperties": _NUMBER}))),
            }
        ),
        "ChatCompletion": _generated(
            "chat.completion",
            _object(chat_choice, {"logprobs": _nullable(reference("ChatLogprobs")), "stop_reason": stop_reason}),
        ),
        "Completion": _generated(
            "text_completion",
            _object(
                completion_choice, {"logprobs": _nullable(reference("CompletionLogprobs")), "stop_reason": stop_reason}
            ),
        ),
    }


def _token_logprob() -> Schema:
    token = {"token": _STRING, "logprob": _NUMBER, "bytes": _nullable(_array(_INTEGER))}
    return _object({**token, "top_logprobs": _array(_object(token))})


def _generated(kind: str, choice: Schema) -> Schema:
    return _object(
        {"id": _STRING, "object": _constant(kind), "created": _INTEGER, "model": _STRING, "choices": _array(choice)},
        {"usage": reference("Usage"), "service_tier": _STRING},
    )


def _chunk_schemas() -> dict[str, Schema]:
    """The data of the SSE events; where usage was asked for, it comes last, in a chunk without choices."""
    delta = _object({}, {"role": _constant("assistant"), "content": _nullable(_STRING)})
    ended = {
        "finish_reason": _nullable({"type": "string", "enum": ["stop", "length"]}),
        "stop_reason": {"anyOf": [_STRING, _INTEGER, {"type": "null"}]},
    }
    chat = _object({"index": _INTEGER, "delta": delta}, {**ended, "logprobs": _nullable(reference("ChatLogprobs"))})
    completion = _object(
        {"index": _INTEGER, "text": _STRING}, {**ended, "logprobs": _nullable(reference("CompletionLogprobs"))}
    )
    chunks = {
        "ChatCompletionChunk": _generated("chat.completion.chunk", chat),
        "CompletionChunk": _generated("text_completion", completion),
    }
    for chunk in chunks.values():
        chunk["properties"]["usage"] = _nullable(reference("Usage"))
    return chunks


def _other_schemas() -> dict[str, Schema]:
    return {
        "Error": _object(
            {
                "error": _object(
                    {"message": _STRING, "type": _STRING, "param": _nullable(_STRING), "code": _STRING},
                )
            }
        ),
        "Model": _object(
            {"id": _STRING, "object": _constant("model"), "created": _INTEGER, "owned_by": _STRING},
            {"max_model_len": _INTEGER},
        ),
        "ModelList": _object({"object": _constant("list"), "data": _array(reference("Model"))}),
        "Tokenized": _object(
            {"count": _INTEGER, "tokens": _array(_INTEGER)}, {"token_strs": _nullable(_array(_STRING))}
        ),
        "Detokenized": _object({"prompt": _STRING}),
        "Version": _object({"version": _STRING}),
        "Health": _object(
            {"status": {"type": "string", "enum": ["live", "ready", "starting", "draining"]}},
            {"phase": _STRING, "model": _STRING, "workers": _array({"type": "object"})},
        ),
        "Worker": _worker(),
        "WorkerList": _object({"workers": _array(reference("Worker"))}),
        "RoleChanged": _object({"worker": reference("Worker"), "former_role": _ROLE}),
        "Cancelled": _object({"id": _STRING, "object": _constant("request"), "cancelled": _BOOLEAN}),
    }


def _worker() -> Schema:
    link = _object(
        {
            "worker": _STRING,
            "is_connected": _BOOLEAN,
            "transfer": _nullable(_STRING),
            "lane": _nullable(_STRING),
            "bandwidth_bytes_per_second": _nullable(_NUMBER),
            "failures": _INTEGER,
            "problem": _nullable(_STRING),
        }
    )
    kv = _object(
        {
            "transfers": _array(_STRING),
            "rows": _INTEGER,
            "row_bytes": _INTEGER,
            "reads_from": _array(link),
            "usage": {"type": "object"},
        }
    )
    return _object(
        {
            "id": _STRING,
            "role": _ROLE,
            "state": {"type": "string", "enum": ["starting", "ready", "draining", "gone"]},
            "phase": _STRING,
            "restarts": _INTEGER,
            "booked_sequences": _INTEGER,
            "load": {"type": "object"},
            "kv": _nullable(kv),
        }
    )
