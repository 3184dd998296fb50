"""Workers that are started by hand: who may join, and who is told why not."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import msgspec
import pytest
import yaml
import zmq

from tests.e2e.process import Serve, ServerProcess, TrtserveProcess, eventually, sim_arguments
from tests.models import make_tiny_model
from trtserve.plugins.api import Role, WorkerId
from trtserve.server.cli import main
from trtserve.server.workers import wire

PATH = "/v1/completions"
TOKEN = "a-long-secret-of-the-tests"
REFUSED = 3
SERVER_GONE = 4


@pytest.fixture(scope="module")
def host(serve_module: Serve, tmp_path_factory) -> ServerProcess:
    """A server that starts no workers."""
    endpoint = f"ipc://{tmp_path_factory.mktemp('host')}/workers.sock"
    server = serve_module(
        *("--workers", "0", "--worker-endpoint", endpoint, "--worker-silence-timeout", "2"),
        TRTSERVE_WORKER_TOKEN=TOKEN,
    )
    server.endpoint = endpoint
    return listening(server)


def listening(server: ServerProcess) -> ServerProcess:
    """Wait until it says where it listens, which a server without workers does before it is ready."""
    server.until_output("waiting for workers")
    server.client.base_url = server.url
    return server


@pytest.fixture
def join(host, sim_model) -> Iterator:
    """Starts workers of the server."""
    with ExitStack() as stack:

        def start(*more: str, model=sim_model, token: str = TOKEN, worker_id: str = "hand-0") -> TrtserveProcess:
            arguments = sim_arguments(model, "--connect", host.endpoint, "--worker-id", worker_id, *more)
            environment = {"TRTSERVE_WORKER_TOKEN": token}
            return stack.enter_context(TrtserveProcess("worker", *arguments, environment=environment))

        yield start
    host.until_metric("trtserve_worker_up", lambda value: value == 0)


def test_one_without_a_model_says_so(tmp_path):
    arguments = sim_arguments(tmp_path / "none", "--connect", f"ipc://{tmp_path}/none", "--worker-id", "hand-0")
    with TrtserveProcess("worker", *arguments, environment={"TRTSERVE_WORKER_TOKEN": TOKEN}) as worker:
        assert worker.wait() == 2
    assert "trtserve: MODEL " in worker.output


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--connect", "ipc://"], "--connect ipc://: cannot be used: "),
        (["{empty}"], "has no config.json"),
        (["--engine-option", "no_such=1"], "engine-options.no_such: "),
    ],
)
def test_one_that_cannot_begin_says_why(sim_model, tmp_path, more, message):
    more = [argument.format(empty=tmp_path) for argument in more]
    model = () if more[0] == str(tmp_path) else (str(sim_model),)
    arguments = (*model, "--engine", "sim", "--connect", f"ipc://{tmp_path}/none", "--worker-id", "hand-0", *more)
    with TrtserveProcess("worker", *arguments, environment={"TRTSERVE_WORKER_TOKEN": TOKEN}) as worker:
        assert worker.wait() == 2
    assert message in worker.output


def test_a_dry_run_starts_none(tmp_path, capsys):
    arguments = ["--engine", "sim", "--connect", f"ipc://{tmp_path}/none", "--worker-id", "hand-0", "--dry-run"]
    assert main(["worker", "nowhere", *arguments]) == 0
    printed = capsys.readouterr().out
    assert (
        yaml.safe_load(printed)["worker_id"] == "hand-0" and yaml.safe_load(printed)["engine_options"]["speedup"] == 1
    )
    assert f"#   hand-0   role agg, engine sim, to ipc://{tmp_path}/none" in printed
    assert main(["worker", "nowhere", *arguments, "--engine-option", "no_such=1"]) == 2


def test_one_that_joins_serves_and_leaves(host, join):
    refused = host.client.post(PATH, json={"prompt": "a"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_worker")
    worker = join()
    eventually(lambda: host.client.get("/ready").status_code == 200, "ready")
    assert host.client.post(PATH, json={"prompt": "a", "max_tokens": 3}).status_code == 200
    assert [worker["id"] for worker in host.client.get("/health").json()["workers"]] == ["hand-0"]
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    eventually(lambda: host.client.get("/ready").status_code == 503, "not ready")
    (known,) = host.client.get("/health").json()["workers"]
    assert known["phase"] == "it was told to end", "it said so, and its silence was not waited for"


def test_one_that_dies_is_missed_and_may_come_back(host, join):
    worker = join()
    host.until_metric("trtserve_worker_up", lambda value: value == 1)
    os.kill(worker.pid, signal.SIGKILL)
    host.until_metric("trtserve_worker_up", lambda value: value == 0)
    join()
    host.until_metric("trtserve_worker_up", lambda value: value == 1)
    assert host.client.post(PATH, json={"prompt": "a", "max_tokens": 3}).status_code == 200


def test_a_wrong_token(join):
    worker = join(token="another")
    assert worker.wait() == REFUSED
    assert "refused by the server: its token is not this server's" in worker.output


def test_no_token_at_all(join):
    worker = join(token="")
    assert worker.wait() == 2 or "token" in worker.output


def test_another_model(join, tmp_path):
    other = make_tiny_model(tmp_path / "other")
    (other / "config.json").write_text('{"vocab_size": 1000, "max_position_embeddings": 99}')
    worker = join(model=other)
    assert worker.wait() == REFUSED
    assert "refused by the server: it has model " in worker.output


def test_another_tokenizer(join, tmp_path):
    other = make_tiny_model(tmp_path / "other")
    with (other / "tokenizer.json").open("a") as file:
        file.write("\n")
    worker = join(model=other)
    assert worker.wait() == REFUSED
    assert "refused by the server: it has tokenizer " in worker.output


def test_another_block_size(host, join):
    join()
    host.until_metric("trtserve_worker_up", lambda value: value == 1)
    worker = join("--block-size", "32", worker_id="hand-1")
    assert worker.wait() == REFUSED
    assert "its KV blocks hold 32 tokens, those of hand-0 16" in worker.output
    assert host.metric("trtserve_worker_up") == 1
    states = {worker["id"]: worker["state"] for worker in host.client.get("/health").json()["workers"]}
    assert (states["hand-0"], states["hand-1"]) == ("ready", "gone")


def test_another_role(host, join):
    join()
    host.until_metric("trtserve_worker_up", lambda value: value == 1)
    worker = join("--role", "decode")
    assert worker.wait() == REFUSED
    assert "it says --role decode, but hand-0 is a agg worker here" in worker.output


@contextmanager
def speaking(endpoint: str) -> Iterator[zmq.Socket]:
    """A socket that may say anything to the server."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as speaker:
        speaker.setsockopt(zmq.LINGER, 0)
        speaker.setsockopt(zmq.RCVTIMEO, 5000)
        speaker.connect(endpoint)
        yield speaker


def hello(**changes) -> wire.Hello:
    fields = {
        "wire_version": wire.WIRE_VERSION,
        "worker_id": WorkerId("raw-0"),
        "incarnation": secrets.randbits(63),
        "token": TOKEN,
        "pid": 1,
        "role": Role.AGG,
        "engine": "sim",
        "model_fingerprint": "",
        "tokenizer_fingerprint": "",
        "trtserve_version": "9.9",
    }
    return wire.Hello(**fields | changes)


def test_another_wire_version(host):
    with speaking(host.endpoint) as speaker:
        speaker.send(wire.encode(hello(wire_version=wire.WIRE_VERSION + 1)))
        answer = wire.decode_to_worker(speaker.recv())
    assert isinstance(answer, wire.Refused)
    assert f"it speaks wire version {wire.WIRE_VERSION + 1} (trtserve 9.9)" in answer.reason
    assert "install the same trtserve on both" in answer.reason


def test_nonsense_hurts_nobody(host, join):
    nonsense = [b"", b"\xff", b"not msgpack", msgspec.msgpack.encode(["hello"]), msgspec.msgpack.encode(["step", -1])]
    with speaking(host.endpoint) as speaker:
        for message in nonsense:
            speaker.send(message)
        speaker.send_multipart([b"too", b"many", b"frames"])
        speaker.send(wire.encode(wire.Progress("I never said hello")))
        speaker.send(wire.encode(hello(wire_version=0)))
        assert isinstance(wire.decode_to_worker(speaker.recv()), wire.Refused)  # all before it was read
    join()
    host.until_metric("trtserve_worker_up", lambda value: value == 1)
    assert host.client.post(PATH, json={"prompt": "a", "max_tokens": 3}).status_code == 200


def test_a_server_that_ends_takes_them_along(serve, sim_model, tmp_path):
    endpoint = f"ipc://{tmp_path}/workers.sock"
    (tmp_path / "token").write_text(TOKEN)
    token = ("--worker-token-file", str(tmp_path / "token"))
    server = listening(serve("--workers", "0", "--worker-endpoint", endpoint, *token))
    arguments = sim_arguments(sim_model, "--connect", endpoint, "--worker-id", "hand-0", *token)
    with TrtserveProcess("worker", *arguments) as worker:
        server.until_metric("trtserve_worker_up", lambda value: value == 1)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert worker.wait() == 0


def test_a_server_that_is_killed_takes_them_along(serve, sim_model, tmp_path):
    endpoint = f"ipc://{tmp_path}/workers.sock"
    # Nobody is left to remove its private folder, so that lies in the test's.
    environment = {"TRTSERVE_WORKER_TOKEN": TOKEN, "TMPDIR": str(tmp_path)}
    server = listening(serve("--workers", "0", "--worker-endpoint", endpoint, **environment))
    arguments = sim_arguments(sim_model, "--connect", endpoint, "--worker-id", "hand-0")
    with TrtserveProcess("worker", *arguments, environment=environment) as worker:
        server.until_metric("trtserve_worker_up", lambda value: value == 1)
        server.signal(signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
        assert worker.wait() == SERVER_GONE
