"""A worker does not outlive its server."""

import os
import select
import signal
import subprocess
import sys

from trtserve.server.workers.orphan import EXIT_ORPHANED

CHILD = """
import os, signal, sys, time
from trtserve.server.workers.orphan import die_with_parent
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
die_with_parent(int(sys.argv[1]))
print(os.getpid(), flush=True)
time.sleep(60)
"""

PARENT = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())], start_new_session=True)
time.sleep(60)
"""


def test_it_ends_when_its_parent_is_killed():
    with subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE) as parent:
        child = os.pidfd_open(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        is_gone, _, _ = select.select([child], [], [], 10)
        os.close(child)
        assert is_gone


def test_it_ends_at_once_if_its_parent_is_gone_already():
    done = subprocess.run([sys.executable, "-c", CHILD, "0"], capture_output=True, timeout=10)
    assert (done.returncode, done.stdout) == (EXIT_ORPHANED, b"")
