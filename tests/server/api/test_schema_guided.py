"""What constrains an answer's form: parsed where the engines can do it, refused as before where they cannot."""

import json

import orjson
import pytest

from trtserve.plugins.api import GuidedDecoding
from trtserve.server.api.schema import RequestRules, parse_chat, parse_completion
from trtserve.server.errors import InvalidRequest

GUIDING = RequestRules(("m",), 1000, guides=lambda: True)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
MESSAGES = [{"role": "user", "content": "Hello"}]


def chat(rules=GUIDING, **fields):
    return parse_chat(orjson.dumps({"messages": MESSAGES, **fields}), rules)


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
                }
            },
            "json_schema",
            SCHEMA,
        ),
        ({"guided_json": SCHEMA}, "json_schema", SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, "json_schema", SCHEMA),
        ({"guided_regex": "[0-9]+"}, "regex", "[0-9]+"),
        ({"guided_grammar": 'root ::= "a"'}, "grammar", 'root ::= "a"'),
        ({"guided_choice": ["yes", "no (not)"]}, "regex", r"(yes)|(no\ \(not\))"),
        ({"response_format": {"type": "text"}, "guided_regex": "a"}, "regex", "a"),
    ],
)
def test_forms_are_taken_as_the_engine_wants_them(fields, kind, text):
    params = chat(**fields)
    assert params.guided.kind == kind and params.ignored == ()
    assert (json.loads(params.guided.text) if text is SCHEMA else params.guided.text) == text
    assert parse_completion(orjson.dumps({"prompt": "a", **fields}), GUIDING).guided == params.guided


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}, {"guided_json": None}])
def test_plain_text_has_no_form(fields):
    assert chat(**fields).guided is None
    assert chat(RequestRules(("m",), 1000), **fields).guided is None


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"response_format": "json"}, "response_format", "invalid_type"),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "missing_required_parameter",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            "response_format.json_schema.schema",
            "missing_required_parameter",
        ),
        ({"guided_json": "{"}, "guided_json", None),
        ({"guided_json": "[1]"}, "guided_json", None),
        ({"guided_regex": ""}, "guided_regex", "invalid_value"),
        ({"guided_choice": []}, "guided_choice", "invalid_value"),
        ({"guided_regex": "a", "guided_grammar": "b"}, "guided_grammar", None),
        ({"response_format": {"type": "json_object"}, "guided_regex": "b"}, "guided_regex", None),
        ({"guided_json": {"x": "é" * 200_000}}, "guided_json", None),
        ({"structural_tag": "x"}, "structural_tag", "unsupported_parameter"),
    ],
)
def test_bad_forms(fields, param, code):
    with pytest.raises(InvalidRequest) as refusal:
        chat(**fields)
    assert refusal.value.param == param
    if code is not None:
        assert refusal.value.code == code


def test_without_an_engine_that_can_they_are_refused():
    with pytest.raises(InvalidRequest) as refusal:
        chat(RequestRules(("m",), 1000), response_format={"type": "json_object"})
    assert (refusal.value.param, refusal.value.code) == ("response_format", "unsupported_parameter")


def test_a_guide_is_plain_data():
    assert chat(guided_regex="a").guided == GuidedDecoding("regex", "a")
