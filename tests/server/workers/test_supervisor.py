"""Worker processes are started, watched and restarted: real processes, real sockets, throw-away scripts."""

import asyncio
import os
import re
import signal
import time

import pytest

from tests.server.workers.conftest import a_request, until
from tests.server.workers.supervision import is_alive
from trtserve.plugins.api import LaunchSpec, WorkerId
from trtserve.plugins.launchers.local import LocalLauncher
from trtserve.server.errors import WorkerLost
from trtserve.server.workers import wire
from trtserve.server.workers.supervisor import Supervisor, SupervisorLimits


async def test_a_worker_that_does_not_start_ends_it_with_its_last_lines(supervision):
    supervision.start("""
        for number in range(50): print("line", number)
        sys.exit("cannot find the weights")
    """)
    error = await supervision.failure()
    assert "worker agg-0 did not start: ended with exit code 1" in str(error)
    assert len(error.lines) == 20 and error.lines[-1] == "cannot find the weights"


async def test_a_worker_that_says_why_is_quoted(supervision):
    supervision.start("""
        say(HELLO); hear(); say(wire.Failed("out of memory")); time.sleep(60)
    """)
    assert "out of memory" in str(await supervision.failure())


async def test_a_worker_that_takes_too_long_is_ended(supervision):
    supervision.start(
        'say(HELLO); hear(); say(wire.Progress("loading weights")); time.sleep(60)',
        SupervisorLimits(start_s=3, stop_s=0.3),
    )
    await until(lambda: supervision.supervisor.processes)
    pid = supervision.supervisor.processes[WorkerId("agg-0")].pid
    assert "not ready after 3 s (last phase: loading weights)" in str(await supervision.failure())
    assert not is_alive(pid)


async def test_a_program_that_is_not_there(supervision, tmp_path):
    class Elsewhere(LocalLauncher):
        async def start(self, spec):
            return await super().start(LaunchSpec(spec.worker_id, ("/no/such/program",), {}, spec.log_path))

    supervision.start("", launcher=Elsewhere())
    assert "could not be started" in str(await supervision.failure())


async def test_a_log_that_cannot_be_kept_ends_no_server(supervision, tmp_path, caplog):
    supervision.start("join(); time.sleep(60)")
    await supervision.ready()
    (tmp_path / "agg-0.previous.log").mkdir()  # in the way
    (tmp_path / "agg-0.previous.log" / "file").touch()
    os.kill(supervision.supervisor.processes[WorkerId("agg-0")].pid, signal.SIGKILL)
    await until(lambda: "could not be started: [Errno" in caplog.text)
    (tmp_path / "agg-0.previous.log" / "file").unlink()
    (tmp_path / "agg-0.previous.log").rmdir()
    await supervision.ready()


async def test_a_refused_worker_is_not_started_again(supervision):
    supervision.start("""
        say(msgspec.structs.replace(HELLO, model_fingerprint="other"))
        refused = hear()
        print("refused by the server:", refused.reason, file=sys.stderr)
        sys.exit(3)
    """)
    error = await supervision.failure()
    assert "refused by the server: it has model other" in error.lines[-1]


async def test_a_crash_after_ready_restarts_with_growing_pauses(supervision, caplog):
    caplog.set_level("INFO")
    limits = SupervisorLimits(first_pause_s=0.1, longest_pause_s=20)
    supervision.start("join(); say(wire.Progress('pid %d' % os.getpid())); leave(7)", limits)
    await until(lambda: caplog.text.count("restarting in") >= 4, 20)
    pauses = re.findall(r"restarting in ([0-9.]+) s", caplog.text)
    assert pauses[:4] == ["0.1", "0.2", "0.4", "0.8"]
    assert "agg-0: ended with exit code 7" in caplog.text
    assert supervision.client.restarts >= 3 and not supervision.task.done()
    # What the last one said may come after its end.
    await until(lambda: len(re.findall(r"pid \d+", caplog.text)) >= 4, 20)
    pids = re.findall(r"pid (\d+)", caplog.text)
    assert len(set(pids)) == len(pids) >= 4
    heard = supervision.house.listener.heard
    assert heard[:4] == [("ready", "agg-0"), ("gone", "agg-0")] * 2
    assert (supervision.folder / "agg-0.previous.log").exists()


async def test_requests_of_a_crashed_worker_fail_at_once(supervision, running):
    supervision.start("join(); hear(); os.kill(os.getpid(), signal.SIGKILL)")
    await supervision.ready()
    run = running(supervision.client, a_request())
    with pytest.raises(WorkerLost, match="was killed by SIGKILL"):
        async with asyncio.timeout(5):
            await run
    await supervision.ready()


async def test_a_worker_is_not_silent_while_the_server_stands_still(supervision, monkeypatch, caplog):
    """A process that was stopped, or got no processor, has not heard what others said meanwhile."""
    supervision.start("join(); time.sleep(60)", SupervisorLimits(silence_s=20, stop_s=0.2))
    await supervision.ready()
    looks, look, now_s = [], supervision.client.trouble, time.monotonic
    monkeypatch.setattr(supervision.client, "trouble", lambda *limits: looks.append(None) or look(*limits))
    monkeypatch.setattr(time, "monotonic", lambda: now_s() + 30)
    await until(lambda: len(looks) >= 2)
    assert supervision.client.state == "ready" and "no heartbeat" not in caplog.text


async def test_what_a_worker_said_right_before_its_end_counts(supervision, house, caplog):
    """Its end may be seen before its last message was read."""
    supervision.start("""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        join(); signal.sigwait({signal.SIGUSR1}); say(wire.Failed('a rank died')); leave(70)
    """)
    await supervision.ready()
    asyncio.get_running_loop().remove_reader(house.link._socket.fileno())  # the loop is not told of messages
    os.kill(supervision.supervisor.processes[WorkerId("agg-0")].pid, signal.SIGUSR1)
    await until(lambda: "restarting in" in caplog.text, 15)
    assert "agg-0: a rank died; restarting in" in caplog.text


async def test_a_silent_worker_is_killed_and_replaced(supervision, caplog):
    supervision.start("join(); time.sleep(60)", SupervisorLimits(silence_s=0.7, stop_s=0.2, first_pause_s=0.02))
    await supervision.ready()
    pid = supervision.supervisor.processes[WorkerId("agg-0")].pid
    await until(lambda: re.search(r"no heartbeat for \d+ s; restarting", caplog.text))
    assert not is_alive(pid)
    await supervision.ready()
    assert supervision.supervisor.processes[WorkerId("agg-0")].pid != pid


async def test_a_hung_engine_is_noticed_though_its_process_lives(supervision, running, caplog):
    supervision.start(
        "join()\nwhile True: say(wire.Heartbeat(1, WorkerLoad())); time.sleep(0.1)",
        SupervisorLimits(silence_s=20, stall_s=0.6, stop_s=0.2, first_pause_s=0.02),
    )
    await supervision.ready()
    run = running(supervision.client, a_request())
    with pytest.raises(WorkerLost, match="its engine made no step"):
        async with asyncio.timeout(10):
            await run


async def test_a_worker_that_failed_and_does_not_end_is_killed(supervision, caplog):
    supervision.start("join(); say(wire.Failed('a rank died')); time.sleep(60)")
    await until(lambda: "a rank died; restarting" in caplog.text, 15)


async def test_a_guest_that_falls_silent_is_given_up(supervision, house, running):
    """A worker started by hand has no process here."""
    supervision.start(
        "join()\nwhile True: say(wire.Heartbeat(0, WorkerLoad())); time.sleep(0.1)", SupervisorLimits(silence_s=2.0)
    )
    await supervision.ready()
    peer, guest = await house.worker(worker_id="guest")
    run = running(guest, a_request())
    await peer.hears()
    with pytest.raises(WorkerLost, match=r"no heartbeat for [2-9] s"):
        async with asyncio.timeout(10):
            await run
    assert await peer.hears() == wire.Shutdown()
    assert ("gone", "guest") in house.listener.heard and ("gone", "agg-0") not in house.listener.heard


async def test_guests_that_are_gone_are_forgotten(house):
    """They may come with new ids for ever. One that falls silent while it loads is gone as well, in the end."""
    limits = SupervisorLimits(start_s=1.0, silence_s=60.0, forget_s=1.0)
    watching = asyncio.create_task(Supervisor(LocalLauncher(), house.pool, _starts_none, limits).run([]))
    _, killed = await house.worker(worker_id="killed")
    _, well = await house.worker(worker_id="well")
    loading = house.peer(worker_id="loading")
    loading.say(loading.hello)
    assert await loading.hears() == wire.Welcome()
    house.pool.gone(killed, "was killed")
    await until(lambda: list(house.pool) == [well])
    assert await loading.hears() == wire.Shutdown()
    await house.worker(worker_id="killed", incarnation=2)
    watching.cancel()
    await asyncio.wait({watching})


def _starts_none(client):
    raise AssertionError(f"{client.worker_id} is started elsewhere")
