"""However a supervisor ends, no process is left; and what it says of those that ended."""

import asyncio
import os
import sys
import time

import pytest

from tests.server.workers.conftest import until
from tests.server.workers.supervision import PREAMBLE, QUICK, is_alive
from trtserve.plugins.api import LaunchSpec, Role, WorkerId
from trtserve.plugins.launchers.local import LocalLauncher
from trtserve.server.workers.supervisor import Supervisor, SupervisorLimits, describe_exit, last_lines


async def test_a_shutdown_lets_workers_end_by_themselves(supervision):
    supervision.start("join(); assert hear() == wire.Shutdown(); print('bye', flush=True)", SupervisorLimits(stop_s=10))
    await supervision.ready()
    process = supervision.supervisor.processes[WorkerId("agg-0")]
    supervision.supervisor.shutdown()
    async with asyncio.timeout(10):
        assert await process.wait() == 0
    await supervision.stop()
    assert any("bye" in log.read_text() for log in supervision.folder.glob("*.log"))


async def test_cancelling_leaves_no_process_not_even_a_deaf_one(supervision):
    supervision.start("signal.signal(signal.SIGTERM, signal.SIG_IGN); join(); time.sleep(60)")
    await supervision.ready()
    pid = supervision.supervisor.processes[WorkerId("agg-0")].pid
    started_s = time.monotonic()
    await supervision.stop()
    assert time.monotonic() - started_s >= QUICK.stop_s  # it had its chance
    assert not is_alive(pid) and supervision.supervisor.processes == {}


@pytest.mark.parametrize("group", [None, 0], ids=["in its group", "in groups of their own"])
async def test_cancelling_ends_grandchildren_too(supervision, group):
    """Ranks of an engine, which MPI may put into groups of their own."""
    supervision.start(f"""
        deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
        child = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE, process_group={group})
        child.stdout.readline()
        join(); say(wire.Progress(f"child {{child.pid}}")); time.sleep(60)
    """)
    await supervision.ready()
    await until(lambda: supervision.client.phase.startswith("child"))
    child = os.pidfd_open(int(supervision.client.phase.split()[1]))
    await supervision.stop()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(child, ended.set)
    async with asyncio.timeout(5):
        await ended.wait()
    asyncio.get_running_loop().remove_reader(child)
    os.close(child)


async def test_cancelling_while_a_worker_loads(supervision):
    supervision.start("say(HELLO); hear(); say(wire.Progress('loading')); time.sleep(60)")
    await until(lambda: supervision.client.phase == "loading", 15)
    pid = supervision.supervisor.processes[WorkerId("agg-0")].pid
    await supervision.stop()
    assert not is_alive(pid)


async def test_cancelling_in_the_pause_before_a_restart(supervision, caplog):
    supervision.start("join(); leave(1)", SupervisorLimits(first_pause_s=60))
    await until(lambda: "restarting in 60.0 s" in caplog.text, 15)
    await supervision.stop()


async def test_one_worker_that_cannot_start_ends_the_others(house, tmp_path):
    clients = [house.pool.add(WorkerId(name), Role.AGG) for name in ("good", "bad")]
    programs = {"good": "time.sleep(60)", "bad": "sys.exit(2)"}
    for name, program in programs.items():
        (tmp_path / f"{name}.py").write_text(PREAMBLE + program)

    def spec(client):
        name = client.worker_id
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.getcwd()}
        argv = (sys.executable, str(tmp_path / f"{name}.py"), house.link.endpoint)
        return LaunchSpec(name, argv, environment, str(tmp_path / f"{name}.log"))

    supervisor = Supervisor(LocalLauncher(), house.pool, spec, QUICK)
    run = asyncio.create_task(supervisor.run(clients))
    await until(lambda: "good" in supervisor.processes)
    pid = supervisor.processes[WorkerId("good")].pid
    with pytest.raises(ExceptionGroup) as caught:
        await run
    assert [error.worker_id for error in caught.value.exceptions] == ["bad"]
    assert not is_alive(pid)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "ended with exit code 0"),
        (70, "ended with exit code 70"),
        (-9, "was killed by SIGKILL"),
        (-99, "was killed by signal 99"),
    ],
)
def test_exits_in_words(code, words):
    assert describe_exit(code) == words


def test_last_lines_of_logs_of_any_size(tmp_path):
    log = tmp_path / "log"
    assert last_lines(str(log)) == []
    log.write_bytes(b"\xff broken\n" + b"x" * 200_000 + b"\n" + b"\n".join(b"line %d" % n for n in range(5)))
    assert last_lines(str(log), 2) == ["line 3", "line 4"]
    assert len(last_lines(str(log))) == 6
