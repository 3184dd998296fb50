"""The driver, around a scripted step engine whose every pass waits for the test's leave where it matters."""

import threading
from array import array
from concurrent.futures import CancelledError, wait

import pytest

from trtserve.plugins.api import (
    Engine,
    EngineInfo,
    FinishReason,
    Output,
    Request,
    RequestId,
    RequestRefused,
    SamplingParams,
    StepOutputs,
    WorkerLoad,
)
from trtserve.plugins.conformance.engine import CollectingSink
from trtserve.plugins.driver import Driver

INFO = EngineInfo(block_size=16, num_blocks=8, max_num_seqs=4, max_num_tokens=64, max_seq_len=128, vocab_size=100)
DEADLINE_S = 10


class ScriptedEngine:
    """Gives each request one token a pass for ever; records who calls it. `gate` closed holds a pass in its middle."""

    def __init__(self, start_error=None, step_error=None, add_error=None, close_error=None):
        self.start_error, self.step_error = start_error, step_error
        self.add_error, self.close_error = add_error, close_error
        self.gate = threading.Event()
        self.gate.set()
        self.in_step = threading.Event()
        self.threads = set()
        self.calls = []
        self.live, self.cancelled, self.generated = [], [], 0

    def record(self, *call):
        self.threads.add(threading.current_thread())
        self.calls.append(call)

    def start(self, progress):
        self.record("start")
        progress("loading")
        if self.start_error:
            raise self.start_error
        return INFO

    def add(self, request):
        self.record("add", request.id)
        if self.add_error:
            raise self.add_error
        self.live.append(request.id)

    def abort(self, request_id):
        self.record("abort", request_id)
        self.live.remove(request_id)
        self.cancelled.append(Output(request_id, finish_reason=FinishReason.CANCELLED))

    def has_work(self):
        return bool(self.live or self.cancelled)

    def step(self):
        self.in_step.set()
        self.gate.wait()
        if self.step_error:
            raise self.step_error
        outputs, self.cancelled = self.cancelled + [Output(request_id, [7]) for request_id in self.live], []
        self.generated += len(self.live)
        return StepOutputs(outputs, self.stats())

    def stats(self):
        return WorkerLoad(running=len(self.live), free_blocks=8, generated_tokens_total=self.generated)

    def close(self):
        self.record("close")
        if self.close_error:
            raise self.close_error


def request(number: int) -> Request:
    return Request(RequestId(number), array("i", [1, 2, 3]), SamplingParams(max_tokens=8))


@pytest.fixture
def sink() -> CollectingSink:
    return CollectingSink()


@pytest.fixture
def drive(sink):
    """Starts a driver around a step engine; closed when the test is over."""
    drivers = []

    def start(engine, **arguments):
        driver = Driver(engine, **arguments)
        drivers.append(driver)
        assert driver.start(sink) is INFO
        return driver

    yield start
    for driver in drivers:
        driver.close()


def test_is_an_engine():
    assert isinstance(Driver(ScriptedEngine()), Engine)


def test_all_calls_come_from_one_thread_of_its_own(drive, sink):
    engine = ScriptedEngine()
    driver = drive(engine)
    driver.submit(request(1))
    sink.wait_first_output(RequestId(1), DEADLINE_S)
    driver.cancel(RequestId(1))
    sink.wait_ended([RequestId(1)], DEADLINE_S)
    driver.close()
    assert len(engine.threads) == 1
    assert threading.current_thread() not in engine.threads
    assert [call[0] for call in engine.calls] == ["start", "add", "abort", "close"]
    assert sink.phases == ["loading"]


def test_start_raises_what_the_engine_raised(sink):
    engine = ScriptedEngine(start_error=ValueError("no such model"))
    driver = Driver(engine)
    with pytest.raises(ValueError, match="no such model"):
        driver.start(sink)
    driver.close()
    assert engine.calls == [("start",), ("close",)]
    assert not sink.failures


def test_starts_once(drive, sink):
    driver = drive(ScriptedEngine())
    with pytest.raises(RuntimeError, match="starts once"):
        driver.start(sink)
    driver.close()
    with pytest.raises(RuntimeError, match="starts once"):
        driver.start(sink)


def test_submit_needs_a_running_engine(drive):
    with pytest.raises(RuntimeError, match="not running"):
        Driver(ScriptedEngine()).submit(request(1))
    driver = drive(ScriptedEngine())
    driver.close()
    with pytest.raises(RuntimeError, match="not running"):
        driver.submit(request(1))


def test_refused_request_ends_with_the_engines_words(drive, sink):
    engine = ScriptedEngine(add_error=RequestRefused("too long by 3"))
    driver = drive(engine)
    driver.submit(request(1))
    sink.wait_ended([RequestId(1)], DEADLINE_S)
    (output,) = sink.outputs_of(RequestId(1))
    assert (output.finish_reason, output.error) == (FinishReason.ERROR, "too long by 3")
    engine.add_error = None
    driver.submit(request(2))
    sink.wait_first_output(RequestId(2), DEADLINE_S)


@pytest.mark.parametrize("place", ["step_error", "add_error"])
def test_a_broken_engine_fails_once_and_is_closed(drive, sink, place):
    engine = ScriptedEngine(**{place: OSError("device lost")})
    driver = drive(engine)
    driver.submit(request(1))
    assert str(sink.wait_failure(DEADLINE_S)) == "device lost"
    driver.submit(request(2))
    driver.close()
    assert len(sink.failures) == 1
    assert not sink.steps
    assert engine.calls == [("start",), ("add", 1), ("close",)]


def test_a_sink_that_raises_breaks_the_engine_too(drive, sink, monkeypatch):
    driver = drive(ScriptedEngine())
    monkeypatch.setattr(sink, "push", lambda step: 1 / 0)
    driver.submit(request(1))
    assert isinstance(sink.wait_failure(DEADLINE_S), ZeroDivisionError)


def test_cancel_follows_its_submit_through_the_inbox(drive, sink):
    engine = ScriptedEngine()
    driver = drive(engine)
    engine.gate.clear()
    driver.submit(request(1))
    assert engine.in_step.wait(DEADLINE_S)
    # The driver is in the middle of a pass: all of this waits in the inbox together.
    driver.submit(request(2))
    driver.cancel(RequestId(2))
    driver.cancel(RequestId(2))
    driver.cancel(RequestId(77))
    driver.cancel(RequestId(1))
    engine.gate.set()
    sink.wait_ended([RequestId(1), RequestId(2)], DEADLINE_S)
    driver.cancel(RequestId(1))
    driver.submit(request(3))
    sink.wait_first_output(RequestId(3), DEADLINE_S)
    assert [output.finish_reason for output in sink.outputs_of(RequestId(2))] == [FinishReason.CANCELLED]
    assert [call for call in engine.calls if call[0] == "abort"] == [("abort", 2), ("abort", 1)]


def test_cancel_before_its_submit_is_a_cancel_of_an_unknown_request(drive, sink):
    driver = drive(ScriptedEngine())
    driver.cancel(RequestId(1))
    driver.submit(request(1))
    sink.wait_first_output(RequestId(1), DEADLINE_S)
    assert sink.outputs_of(RequestId(1))[0].finish_reason is None


def test_stats_are_those_of_the_last_step(drive, sink):
    engine = ScriptedEngine()
    driver = drive(engine)
    assert driver.stats() == WorkerLoad(free_blocks=8)
    driver.submit(request(1))
    sink.wait_first_output(RequestId(1), DEADLINE_S)
    assert driver.stats().running == 1
    assert driver.stats().generated_tokens_total >= 1


def test_nothing_is_said_after_close(drive, sink):
    engine = ScriptedEngine()
    driver = drive(engine, interrupt=engine.gate.set)
    engine.gate.clear()
    driver.submit(request(1))
    assert engine.in_step.wait(DEADLINE_S)
    driver.close()
    driver.close()
    assert not sink.steps
    assert engine.calls[-1] == ("close",)
    assert engine.calls.count(("close",)) == 1


def test_close_does_not_wait_for_a_step_that_never_ends(drive, sink):
    engine = ScriptedEngine()
    driver = drive(engine, close_timeout_s=0.05)
    engine.gate.clear()
    driver.submit(request(1))
    assert engine.in_step.wait(DEADLINE_S)
    driver.close()
    engine.gate.set()
    for thread in engine.threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    assert not sink.steps


def test_a_sink_may_close_the_engine_that_failed(sink, monkeypatch):
    driver = Driver(ScriptedEngine(step_error=OSError("device lost")))
    closed = threading.Event()

    def close_engine(error):
        driver.close()
        closed.set()

    monkeypatch.setattr(sink, "fail", close_engine)
    driver.start(sink)
    driver.submit(request(1))
    assert closed.wait(DEADLINE_S)
    driver.close()


def test_an_engine_that_fails_to_close_does_not_disturb_closing(drive):
    drive(ScriptedEngine(close_error=OSError("stuck"))).close()


def test_closing_before_the_start_is_harmless():
    driver = Driver(ScriptedEngine())
    driver.close()
    driver.close()


def test_a_call_runs_on_the_drivers_thread_of_an_idle_engine(drive):
    engine = ScriptedEngine()
    driver = drive(engine)
    assert driver.engine is engine
    assert driver.call(threading.current_thread).result(DEADLINE_S) in engine.threads


def test_calls_keep_their_place_among_submits_and_cancels(drive, sink):
    engine = ScriptedEngine()
    driver = drive(engine)
    engine.gate.clear()
    driver.submit(request(1))
    assert engine.in_step.wait(DEADLINE_S)
    for number in range(2, 5):
        driver.call(lambda number=number: engine.record("call", number))
        driver.submit(request(number))
        driver.cancel(RequestId(number))
    last = driver.call(lambda: engine.record("call", 5))
    engine.gate.set()
    last.result(DEADLINE_S)
    wanted = [(kind, number) for number in range(2, 5) for kind in ("call", "add", "abort")]
    assert engine.calls == [("start",), ("add", 1), *wanted, ("call", 5)]


def test_what_a_call_leaves_to_report_is_reported_by_a_step(drive, sink):
    engine = ScriptedEngine()
    driver = drive(engine)
    end = Output(RequestId(9), finish_reason=FinishReason.LENGTH)
    driver.call(lambda: engine.cancelled.append(end)).result(DEADLINE_S)
    sink.wait_ended([RequestId(9)], DEADLINE_S)


def test_what_a_call_raises_is_its_own_affair(drive, sink):
    driver = drive(ScriptedEngine())
    with pytest.raises(ZeroDivisionError):
        driver.call(lambda: 1 / 0).result(DEADLINE_S)
    driver.submit(request(1))
    sink.wait_first_output(RequestId(1), DEADLINE_S)
    assert not sink.failures


def test_a_call_that_was_cancelled_in_time_is_not_run(drive):
    engine = ScriptedEngine()
    driver = drive(engine)
    engine.gate.clear()
    driver.submit(request(1))
    assert engine.in_step.wait(DEADLINE_S)
    cancelled, after = driver.call(lambda: engine.record("no")), driver.call(lambda: engine.record("yes"))
    assert cancelled.cancel()
    engine.gate.set()
    after.result(DEADLINE_S)
    assert ("yes",) in engine.calls and ("no",) not in engine.calls
    with pytest.raises(CancelledError):
        cancelled.result(DEADLINE_S)


def test_calls_of_an_engine_that_is_not_running_fail(drive):
    driver = Driver(ScriptedEngine())
    assert isinstance(driver.call(int).exception(DEADLINE_S), RuntimeError)
    driver = drive(ScriptedEngine())
    driver.close()
    with pytest.raises(RuntimeError, match="not running"):
        driver.call(int).result(DEADLINE_S)


def test_calls_that_wait_when_the_engine_breaks_fail(drive, sink):
    engine = ScriptedEngine(step_error=OSError("device lost"))
    driver = drive(engine)
    engine.gate.clear()
    driver.submit(request(1))
    assert engine.in_step.wait(DEADLINE_S)
    waiting = driver.call(int)
    engine.gate.set()
    sink.wait_failure(DEADLINE_S)
    assert isinstance(waiting.exception(DEADLINE_S), RuntimeError)
    assert isinstance(driver.call(int).exception(DEADLINE_S), RuntimeError)


def test_close_fails_the_calls_behind_a_step_that_never_ends(drive):
    engine = ScriptedEngine()
    driver = drive(engine, close_timeout_s=0.05)
    engine.gate.clear()
    driver.submit(request(1))
    assert engine.in_step.wait(DEADLINE_S)
    waiting = driver.call(int)
    driver.close()
    assert isinstance(waiting.exception(0), RuntimeError)
    assert isinstance(driver.call(int).exception(0), RuntimeError)
    engine.gate.set()
    for thread in engine.threads:  # it is woken by what the refusals left in the inbox
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


def test_every_call_made_while_closing_ends(drive):
    driver = drive(ScriptedEngine())
    futures, closing = [], threading.Event()

    def client():
        while not closing.is_set():
            futures.append(driver.call(int))
        futures.append(driver.call(int))

    thread = threading.Thread(target=client)
    thread.start()
    driver.call(int).result(DEADLINE_S)
    driver.close()
    closing.set()
    thread.join(DEADLINE_S)
    assert not wait(futures, DEADLINE_S).not_done


def test_many_threads_submit_and_cancel(drive, sink):
    driver = drive(ScriptedEngine())

    def client(first):
        for number in range(first, first + 25):
            driver.submit(request(number))
            driver.cancel(RequestId(number))

    clients = [threading.Thread(target=client, args=(first,)) for first in range(0, 200, 25)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    sink.wait_ended(map(RequestId, range(200)), DEADLINE_S)
    for number in range(200):
        reasons = [output.finish_reason for output in sink.outputs_of(RequestId(number))]
        assert reasons.count(FinishReason.CANCELLED) == 1
        assert reasons[-1] is FinishReason.CANCELLED
