"""A supervisor over worker processes whose programs a test writes."""

import asyncio
import os
import sys
import textwrap

from tests.server.workers.conftest import until
from trtserve.plugins.api import LaunchSpec, Role, WorkerId
from trtserve.plugins.launchers.local import LocalLauncher
from trtserve.server.workers.supervisor import Supervisor, SupervisorLimits, WorkerStartFailed

PREAMBLE = """
import os, signal, subprocess, sys, time, zmq
from tests.server.workers.conftest import HELLO, INFO
from trtserve.plugins.api import WorkerLoad
from trtserve.server.workers import wire
import msgspec

context = zmq.Context()
socket = context.socket(zmq.DEALER)
socket.setsockopt(zmq.ROUTING_ID, str(os.getpid()).encode())
socket.connect(sys.argv[1])

def say(message):
    socket.send(wire.encode(message))

def hear():
    return wire.decode_to_worker(socket.recv())

def join():
    say(msgspec.structs.replace(HELLO, pid=os.getpid()))
    assert hear() == wire.Welcome()
    say(wire.Ready(INFO))

def leave(code):
    socket.close(5000)
    context.term()
    os._exit(code)
"""

QUICK = SupervisorLimits(start_s=20, silence_s=20, stall_s=20, stop_s=0.3, first_pause_s=0.02, longest_pause_s=0.1)


class Supervision:
    """A supervisor over one worker slot whose program the test gives."""

    def __init__(self, house, folder):
        self.house, self.folder = house, folder
        self.client = house.pool.add(WorkerId("agg-0"), Role.AGG)
        self.supervisor = None
        self.task = None

    def start(self, program, limits=QUICK, launcher=None):
        script = self.folder / "worker.py"
        script.write_text(PREAMBLE + textwrap.dedent(program))
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.getcwd()}
        argv = (sys.executable, str(script), self.house.link.endpoint)
        spec = LaunchSpec(WorkerId("agg-0"), argv, environment, str(self.folder / "agg-0.log"))
        self.supervisor = Supervisor(launcher or LocalLauncher(), self.house.pool, lambda client: spec, limits)
        self.task = asyncio.create_task(self.supervisor.run([self.client]))

    async def ready(self):
        await until(lambda: self.client.state == "ready" or self.task.done(), 15)
        assert not self.task.done(), self.task.exception()

    async def stop(self):
        self.task.cancel()
        await asyncio.wait({self.task}, timeout=10)
        assert self.task.cancelled()

    async def failure(self) -> WorkerStartFailed:
        await asyncio.wait({self.task}, timeout=15)
        (error,) = self.task.exception().exceptions
        assert isinstance(error, WorkerStartFailed)
        return error


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
