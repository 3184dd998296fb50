"""Fixtures that every part of the tests may use."""

from pathlib import Path

import pytest

from trtserve.server.model.resolve import DEFAULT_MODEL, resolve_model


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The folder of the default model, converted into the real cache the first time."""
    return resolve_model(DEFAULT_MODEL).path
