"""Whole servers with the simulated engine and a tiny model."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from random import SystemRandom

import pytest

from tests.e2e.process import Serve, ServerProcess, sim_arguments
from tests.models import make_tiny_model


@pytest.fixture(scope="session")
def sim_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, in a folder whose name clients use."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "sim")


def _starter(stack: ExitStack, model: Path) -> Serve:
    def serve(*more: str, num_blocks: int = 64, options: tuple[str, ...] = (), **environment: str) -> ServerProcess:
        arguments = sim_arguments(model, *more, num_blocks=num_blocks, options=options)
        return stack.enter_context(ServerProcess(*arguments, environment=environment))

    return serve


@pytest.fixture
def serve(sim_model: Path) -> Iterator[Serve]:
    """Starts servers that end with the test; keyword arguments are environment variables."""
    with ExitStack() as stack:
        yield _starter(stack, sim_model)


@pytest.fixture(scope="module")
def serve_module(sim_model: Path) -> Iterator[Serve]:
    """Starts servers that all tests of a module share."""
    with ExitStack() as stack:
        yield _starter(stack, sim_model)


@pytest.fixture(scope="module")
def server(serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    """One server that is ready, with fast passes and 64 KV blocks of 16 tokens; tests leave it idle."""
    return serve_module("--max-seq-len", "1024", options=("speedup=20",)).until_ready()


@pytest.fixture
def unused_port() -> int:
    """A TCP port that nobody listens on, below those that the kernel gives to connections: none takes it meanwhile."""
    while True:
        port = SystemRandom().randrange(20_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
