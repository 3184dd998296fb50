"""What constrains an answer's form: OpenAI's `response_format`, and the names that vLLM's clients send.

These fields are known only where the workers' engines can do it; elsewhere `schema_refusals` has its say about them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trtserve.plugins.api import GuidedDecoding
from trtserve.server.api.schema_problems import invalid_request
from trtserve.server.errors import InvalidRequest

MAX_GUIDE_BYTES = 256 * 1024

Text = Annotated[str, Field(min_length=1, max_length=MAX_GUIDE_BYTES)]


class JsonSchemaFormat(BaseModel):
    """`strict` changes nothing here: a schema is always followed to the letter."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """json_schema only with that type."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class GuidedFields(BaseModel):
    """At most one of them."""

    model_config = ConfigDict(strict=True, extra="ignore")

    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | Text | None = None
    guided_regex: Text | None = None
    guided_grammar: Text | None = Field(default=None, description="EBNF.")
    guided_choice: Annotated[list[Text], Field(min_length=1, max_length=1024, fail_fast=True)] | None = None


GUIDED_FIELDS = frozenset(GuidedFields.model_fields)


def asks_for_a_form(data: Mapping[str, Any]) -> bool:
    """Whether any of the fields is in a body, in a few lookups."""
    return not GUIDED_FIELDS.isdisjoint(data)


def parse_guided(data: Mapping[str, Any]) -> GuidedDecoding | None:
    """What a body asks for; None for plain text. Raises InvalidRequest."""
    try:
        fields = GuidedFields.model_validate({name: data[name] for name in GUIDED_FIELDS & data.keys()})
    except ValidationError as error:
        raise invalid_request(error, dict(data)) from None
    given = [name for name in GuidedFields.model_fields if _is_given(name, getattr(fields, name))]
    if not given:
        return None
    if len(given) > 1:
        raise InvalidRequest(
            f"`{given[0]}` and `{given[1]}` both constrain the answer; send one of them.", param=given[1]
        )
    guided = _guided(given[0], fields)
    if len(guided.text.encode()) > MAX_GUIDE_BYTES:
        raise InvalidRequest(f"`{given[0]}` is longer than {MAX_GUIDE_BYTES} bytes.", param=given[0])
    return guided


def _is_given(name: str, value: Any) -> bool:
    return value is not None and not (name == "response_format" and value.type == "text")


def _guided(name: str, fields: GuidedFields) -> GuidedDecoding:
    if name == "guided_regex":
        return GuidedDecoding("regex", fields.guided_regex or "")
    if name == "guided_grammar":
        return GuidedDecoding("grammar", fields.guided_grammar or "")
    if name == "guided_choice":
        return GuidedDecoding("regex", "|".join(f"({re.escape(choice)})" for choice in fields.guided_choice or ()))
    if name == "guided_json":
        return GuidedDecoding("json_schema", _schema_text(fields.guided_json, name))
    response_format = fields.response_format
    assert response_format is not None
    if response_format.type == "json_object":
        return GuidedDecoding("json_object")
    if response_format.json_schema is None:
        raise InvalidRequest(
            "`response_format.json_schema` is missing; send the schema, or the type json_object.",
            param="response_format.json_schema",
            code="missing_required_parameter",
        )
    # The bare schema: engines do not know OpenAI's wrapper around it.
    return GuidedDecoding("json_schema", _schema_text(response_format.json_schema.json_schema, name))


def _schema_text(schema: object, name: str) -> str:
    """JSON. Raises InvalidRequest where a text is no JSON object."""
    try:
        parsed = orjson.loads(schema) if isinstance(schema, str) else schema
        if isinstance(parsed, dict):
            return orjson.dumps(parsed).decode()
    except (orjson.JSONDecodeError, orjson.JSONEncodeError, RecursionError) as error:
        raise InvalidRequest(f"`{name}` is no JSON schema: {error}.", param=name) from None
    raise InvalidRequest(f"`{name}` is no JSON schema: it has to be an object.", param=name)
