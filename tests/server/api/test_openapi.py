"""The OpenAPI document: structure, references, and agreement with what the schema takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from trtserve.server.api.openapi import openapi_document
from trtserve.server.api.schema_bodies import ChatCompletionBody, CompletionBody, DetokenizeBody, RoleBody, TokenizeBody

ROUTES = {
    ("post", "/v1/chat/completions"),
    ("post", "/v1/completions"),
    ("post", "/tokenize"),
    ("post", "/detokenize"),
    ("post", "/v1/tokenize"),
    ("post", "/v1/detokenize"),
    ("get", "/v1/models"),
    ("get", "/v1/models/{model}"),
    ("delete", "/v1/requests/{request_id}"),
    ("get", "/v1/workers"),
    ("post", "/v1/workers/{worker_id}/role"),
    ("get", "/v1/router/state"),
    ("post", "/v1/router/check"),
    ("get", "/health"),
    ("get", "/live"),
    ("get", "/ready"),
    ("get", "/version"),
    ("get", "/metrics"),
    ("get", "/prometheus/metrics"),
    ("get", "/openapi.json"),
}


@pytest.fixture(params=[False, True], ids=["open", "with key"])
def document(request: pytest.FixtureRequest) -> dict[str, Any]:
    """As a client sees it."""
    return orjson.loads(orjson.dumps(openapi_document("1.2.3", requires_key=request.param)))


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for child in node.values():
            yield from references(child)
    elif isinstance(node, list):
        for child in node:
            yield from references(child)


def test_the_head(document: dict[str, Any]):
    assert document["openapi"].startswith("3.1.")
    assert document["info"]["version"] == "1.2.3"
    assert document.keys() <= {"openapi", "info", "paths", "components"}


def test_all_routes_are_there(document: dict[str, Any]):
    assert {(method, path) for method, path, _ in operations(document)} == ROUTES


def test_every_reference_resolves(document: dict[str, Any]):
    found = set(references(document))
    assert len(found) > 20
    for reference in found:
        node: Any = document
        assert reference.startswith("#/")
        for step in reference[2:].split("/"):
            node = node[step]


def test_every_component_is_used(document: dict[str, Any]):
    used = set(references(document))
    for kind in ("schemas", "responses"):
        assert {f"#/components/{kind}/{name}" for name in document["components"][kind]} <= used


def test_every_operation_is_whole(document: dict[str, Any]):
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(names)) == len(names)
    for method, path, operation in operations(document):
        assert "200" in operation["responses"]
        for response in operation["responses"].values():
            assert "$ref" in response or response["description"]
        in_path = {part[1:-1] for part in path.split("/") if part.startswith("{")}
        assert {parameter["name"] for parameter in operation.get("parameters", [])} == in_path
        assert ("requestBody" in operation) is (method == "post" and path != "/v1/router/check")


def test_only_a_server_with_keys_asks_for_one():
    plain = openapi_document("1")
    assert "securitySchemes" not in plain["components"]
    keyed = openapi_document("1", requires_key=True)
    assert keyed["paths"]["/v1/completions"]["post"]["security"] == [{"key": []}]
    assert "security" not in keyed["paths"]["/health"]["get"]


@pytest.mark.parametrize("model", [ChatCompletionBody, CompletionBody, TokenizeBody, DetokenizeBody, RoleBody])
def test_bodies_are_the_models(model: Any):
    schemas = openapi_document("1")["components"]["schemas"]
    assert schemas[model.__name__]["properties"].keys() == model.model_fields.keys()


def test_bounds_are_told():
    properties = openapi_document("1")["components"]["schemas"]["ChatCompletionBody"]["properties"]
    number = next(choice for choice in properties["temperature"]["anyOf"] if choice["type"] == "number")
    assert (number["minimum"], number["maximum"]) == (0, 2)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_request_may_be_cancelled(document: dict[str, Any], path: str):
    assert "499" in document["paths"][path]["post"]["responses"]
