"""What is said to people may fail to reach them, and nothing else fails with it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_PROGRAM = "from trtserve.server.console import say, say_error; say('x' * 100_000); say_error('y'); say('z'); {end}"


@pytest.mark.parametrize("end", ["raise SystemExit(7)", "print('by others')"])
def test_a_pipe_that_nobody_reads(end):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", _PROGRAM.format(end=end)]
    try:
        for streams in ({"stdout": writer, "stderr": subprocess.PIPE}, {"stderr": writer, "stdout": subprocess.PIPE}):
            ended = subprocess.run(command, **streams, check=False)
            assert ended.returncode == (7 if "7" in end else 0)  # Python ends with 120 where its buffers are left full
            assert ended.stderr in (None, b"y\n")
    finally:
        os.close(writer)
