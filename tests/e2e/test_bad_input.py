"""The table of bad input over HTTP: the status, the field and the code of every row, and a server that is none the
worse for it."""

from __future__ import annotations

import json

import pytest

from tests.e2e.process import ServerProcess
from tests.server.api.bad_input import BAD_INPUT
from tests.server.api.bad_row import BadInput


@pytest.mark.parametrize("row", BAD_INPUT, ids=lambda row: row.label)
def test_bad_input(server: ServerProcess, row: BadInput):
    content = row.body if isinstance(row.body, bytes) else json.dumps(row.body).encode()
    response = server.client.post(row.endpoint, content=content, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (row.status, row.param, row.code)
    assert set(error) == {"message", "type", "param", "code"}


def test_afterwards_all_is_well(server: ServerProcess):
    answer = server.client.post("/v1/completions", json={"model": "sim", "prompt": "a", "max_tokens": 2})
    assert answer.status_code == 200
    server.until_idle(64)
