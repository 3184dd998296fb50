"""Freed memory goes back to the system: looked at in a process of its own, since it is a setting of the whole one."""

import ctypes
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys
from trtserve.server.memory import keep_free_memory_small

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usm fsm uord ford keep".split()]

library = ctypes.CDLL(None)
library.mallinfo2.restype = Info
if sys.argv[1] == "small":
    keep_free_memory_small()
large = bytearray(16 << 20)
del large  # glibc now takes 16 MiB for a size that comes again, and would keep it
before = library.mallinfo2().hblks
table = bytearray(1 << 20)
print(library.mallinfo2().hblks - before)
"""


def mapped_pieces(argument):
    run = subprocess.run([sys.executable, "-c", PROGRAM, argument], capture_output=True, text=True, timeout=30)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="not glibc 2.33 or younger")
def test_a_large_table_stays_a_piece_of_its_own_after_a_larger_one_was_freed():
    assert mapped_pieces("small") == 1
    assert mapped_pieces("as ever") == 0


def test_what_is_there_when_a_process_has_settled_is_not_looked_at_again():
    program = """
import gc
from trtserve.server.memory import settle
made = [[number] for number in range(10_000)]
settle()
assert gc.get_freeze_count() > 10_000 and gc.get_threshold()[0] == 10_000
assert gc.collect() == 0 and len(gc.get_objects()) < 1_000
"""
    subprocess.run([sys.executable, "-c", program], timeout=30, check=True)
