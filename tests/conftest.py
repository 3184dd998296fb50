"""Fixtures that every part of the tests may use."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from trtserve.server.model.resolve import DEFAULT_MODEL, resolve_model

# Examples are not timed one by one: tests run beside others, and the first text of a fresh clone makes Hypothesis read
# all of Unicode. pytest-timeout bounds each test.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

# Hundreds of servers and workers are started; without this each would compile our modules again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The folder of the default model, converted into the real cache the first time."""
    return resolve_model(DEFAULT_MODEL).path
