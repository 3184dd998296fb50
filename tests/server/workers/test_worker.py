"""The worker's end of the wire, run whole against a ROUTER socket that plays the server."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from array import array

import msgspec
import pytest

from tests.models import VOCAB_SIZE, make_tiny_model
from tests.server.workers.conftest import HELLO
from tests.server.workers.played_server import submit, tokens_until_end
from trtserve.plugins.api import (
    EngineConfig,
    FinishReason,
    RequestId,
)
from trtserve.plugins.engines.sim import make_engine
from trtserve.plugins.fingerprint import model_fingerprint, tokenizer_fingerprint
from trtserve.server.workers import wire
from trtserve.server.workers.warm_up import FIRST_REQUEST_ID
from trtserve.server.workers.worker import (
    EXIT_ENGINE_FAILED,
    EXIT_OK,
    EXIT_REFUSED,
    EXIT_SERVER_GONE,
    Worker,
    WorkerIdentity,
)


def test_a_real_token_comes_before_ready(server, run):
    run()
    between = server.welcome()
    assert between[0] == HELLO
    phases = [message.phase for message in between if isinstance(message, wire.Progress)]
    assert phases == ["simulating", "warming up"]
    warm = [array("Q", message.request_ids).tolist() for message in between if isinstance(message, wire.Step)]
    assert warm[0] == [FIRST_REQUEST_ID]
    assert between[-1].info.vocab_size == 1000


def test_nothing_is_loaded_before_the_welcome(server, run):
    run(fail_start=True)
    server.receive(wire.Hello)
    assert server.socket.poll(50) == 0


def test_requests_are_answered(server, run):
    worker = run()
    server.welcome()
    server.say(submit(1))
    server.say(submit(2, max_tokens=6))
    # One stream of steps serves both; each is read from its own copy.
    first, reason = tokens_until_end(server, 1)
    assert (len(first), reason) == (4, FinishReason.LENGTH)
    server.say(wire.Shutdown())
    assert worker.exit_code() == EXIT_OK


def test_step_numbers_and_heartbeats_agree(server, run):
    run()
    server.welcome()
    server.say(submit(1, max_tokens=3))
    step = server.receive(wire.Step)
    numbers = [step.number]
    while not any(detail.finish_reason for detail in step.details):
        step = server.receive(wire.Step)
        numbers.append(step.number)
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    heartbeat = server.receive(wire.Heartbeat)
    assert heartbeat.steps == numbers[-1] and heartbeat.load.running == 0


def test_quick_steps_share_messages(server, run, monkeypatch):
    """However quick the engine, so many messages a second, and hardly more steps; each token is there, in order."""
    pause_s = 0.02
    monkeypatch.setattr("trtserve.server.workers.worker._LEAST_PAUSE_S", pause_s)
    run()
    server.welcome()
    started_s = time.monotonic()
    server.say(submit(1, max_tokens=400))
    steps, num_messages = [], 0
    while not any(detail.finish_reason for step in steps[-1:] for detail in step.details):
        num_messages += not server._received
        steps.append(server.receive(wire.Step))
    elapsed_s = time.monotonic() - started_s
    numbers = [step.number for step in steps]
    assert numbers == sorted(set(numbers))
    assert sum(step.num_tokens for step in steps) == 400
    # Steps that wait join, but for those that tell of a full block, about one in 16.
    assert len(numbers) <= 3 * 400 / 16 + 2 * num_messages
    # 64 messages fit into one; heartbeats come between.
    assert num_messages <= 400 / 64 + 2 * elapsed_s / pause_s + 2


def test_a_request_is_cancelled(server, run):
    run(speedup=1.0)
    server.welcome()
    server.say(submit(1, max_tokens=900))
    server.receive(wire.Step)
    server.say(wire.Cancel(RequestId(1)))
    tokens, reason = tokens_until_end(server, 1)
    assert reason is FinishReason.CANCELLED and len(tokens) < 900
    server.say(wire.Cancel(RequestId(1)))  # ended long ago
    server.say(submit(2))
    assert tokens_until_end(server, 2)[1] is FinishReason.LENGTH


def test_a_refused_worker_says_so_by_its_exit_code(server, run):
    worker = run()
    server.receive(wire.Hello)
    server.say(wire.Refused("wrong model"))
    assert worker.exit_code() == EXIT_REFUSED


def test_an_engine_that_does_not_start(server, run):
    worker = run(fail_start=True)
    server.receive(wire.Hello)
    server.say(wire.Welcome())
    assert "told not to start" in server.receive(wire.Failed).reason
    assert worker.exit_code() == EXIT_ENGINE_FAILED


class FailingEngine:
    """Fails at its first request after the warm-up, or at that."""

    def __init__(self, at):
        self._engine = make_engine("sim", EngineConfig("", num_blocks=64, options={"speedup": 1e9}))
        self._at = at

    def start(self, sink):
        self._sink = sink
        return self._engine.start(sink)

    def submit(self, request):
        if request.id == self._at:
            self._sink.fail(OSError("the device fell off the bus"))
        else:
            self._engine.submit(request)

    def close(self):
        self._engine.close()


@pytest.mark.parametrize("at", [FIRST_REQUEST_ID, 1])
def test_an_engine_that_breaks_has_last_words(server, at):
    codes = queue.Queue()
    worker = Worker(WorkerIdentity(HELLO, server.endpoint, 10.0), lambda: FailingEngine(at))
    thread = threading.Thread(target=lambda: codes.put(worker.run()), daemon=True)
    thread.start()
    server.receive(wire.Hello)
    server.say(wire.Welcome())
    if at != FIRST_REQUEST_ID:
        server.receive(wire.Ready)
        server.say(submit(at))
    assert server.receive(wire.Failed).reason == "OSError: the device fell off the bus"
    assert codes.get(timeout=10) == EXIT_ENGINE_FAILED


def test_a_server_that_does_not_answer(server, run):
    assert run(connect_timeout_s=0.1).exit_code() == EXIT_SERVER_GONE


def test_a_server_that_goes_away(server, run):
    worker = run()
    server.welcome()
    server.close()
    assert worker.exit_code() == EXIT_SERVER_GONE


@pytest.mark.parametrize("attempt", range(5))
def test_the_last_word_of_a_server_counts(server, run, attempt):
    """Shutdown and the end of the connection may be there at the same time."""
    worker = run()
    server.welcome()
    server.say(wire.Shutdown())
    server.socket.close(linger=5000)
    assert worker.exit_code() == EXIT_OK


def test_a_worker_told_to_end_by_a_signal_says_so(server, run):
    worker = run()
    server.welcome()
    worker.worker.stop()
    assert server.receive(wire.Failed).reason == "it was told to end"
    assert worker.exit_code() == EXIT_OK


def test_a_whole_worker_process_ends_with_sigterm(server, tmp_path):
    folder = make_tiny_model(tmp_path / "model")
    command = [sys.executable, "-m", "trtserve.server.cli", "worker", str(folder), "--engine=sim", "--worker-id=hand-1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRTSERVE_")}
    process = subprocess.Popen(
        [*command, f"--connect={server.endpoint}", "--engine-options=speedup=1e9"],
        env=environment | {"TRTSERVE_WORKER_TOKEN": "t0ken"},
    )
    try:
        hello, *_, ready = server.welcome()
        assert hello.model_fingerprint == model_fingerprint(folder)
        assert hello.tokenizer_fingerprint == tokenizer_fingerprint(folder)
        assert (hello.worker_id, hello.token, hello.pid) == ("hand-1", "t0ken", process.pid)
        assert ready.info.vocab_size == VOCAB_SIZE
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == EXIT_OK
    finally:
        process.kill()
        process.wait()


def test_a_server_that_talks_nonsense_ends_the_worker(server, monkeypatch):
    errors = queue.Queue()
    worker = Worker(WorkerIdentity(HELLO, server.endpoint, 10.0), lambda: None)

    def run():
        try:
            worker.run()
        except wire.WireError as error:
            errors.put(str(error))

    threading.Thread(target=run, daemon=True).start()
    server.receive(wire.Hello)
    server.socket.send_multipart((server.identity, msgspec.msgpack.encode(["please"])))
    assert "please" in errors.get(timeout=10)
