"""A process of its own that counts what a UCX transfer takes of the library and gives back; prints JSON.

Two workers in one process read each other through every way that a read, a peer and a transfer can end.
"""

from __future__ import annotations

import json
import mmap
import os
import queue
import select
import sys
import threading
import time
from array import array
from collections import Counter
from ctypes import addressof, c_char

from trtserve.plugins.api import WorkerId
from trtserve.plugins.transfer.identity import peer_info
from trtserve.plugins.transfer.ucx import environment, libucp
from trtserve.plugins.transfer.ucx.libucp import request_status
from trtserve.plugins.transfer.ucx.transfer import UcxTransfer
from trtserve.plugins.transfer_api import BlockCopies, ReadPlan, Region, TransferConfig

NUM_BLOCKS, BLOCK_BYTES = 64, 1 << 20
TAKEN_BY = {
    "ucp_worker_create": "workers",
    "ucp_mem_map": "mapped memory",
    "ucp_ep_create": "endpoints",
    "ucp_ep_rkey_unpack": "remote keys",
}
GIVEN_BACK_BY = {
    "ucp_worker_destroy": "workers",
    "ucp_mem_unmap": "mapped memory",
    "ucp_ep_close_nbx": "endpoints",
    "ucp_rkey_destroy": "remote keys",
    "ucp_request_free": "requests",
}


def main() -> None:
    environment.set_defaults()
    library = libucp.load()
    taken, given = count_calls(library)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        live()
    after = len(os.listdir("/proc/self/fd"))
    json.dump({"taken": taken, "given": given, "more descriptors": after - before}, sys.stdout)


def count_calls(library):
    """Wrap the library's functions in place."""
    taken, given = Counter(), Counter()

    def counting(function, counter, what, is_request):
        def call(*arguments):
            result = function(*arguments)
            counter[what] += 1
            if is_request and request_status(result) == 1:
                taken["requests"] += 1
            return result

        return call

    for name, what in TAKEN_BY.items():
        setattr(library, name, counting(getattr(library, name), taken, what, False))
    for name, what in GIVEN_BACK_BY.items():
        setattr(library, name, counting(getattr(library, name), given, what, name == "ucp_ep_close_nbx"))
    library.ucp_get_nbx = counting(library.ucp_get_nbx, Counter(), "gets", True)
    return taken, given


def live() -> None:
    """Open two, let reads of all endings go by, close."""
    told, reader_is_done = queue.SimpleQueue(), threading.Event()
    serving = threading.Thread(target=serve, args=(told, reader_is_done))
    serving.start()
    try:
        ends = read_in_every_way(*told.get(timeout=10.0))
    finally:
        reader_is_done.set()
        serving.join()
    assert ends == ["done", "cancelled", "timed_out", "peer_lost", "peer_lost"], ends


def read_in_every_way(info, export) -> list[str]:
    reader, _, memory = opened("reader")
    plan = ReadPlan([BlockCopies("pool", array("i", range(NUM_BLOCKS)[::-1]), array("i", range(NUM_BLOCKS)))])
    peer = reader.import_peer(info, export, 10.0)
    ends = [end_of(reader, reader.read_blocks(peer, plan, 10.0))]
    cancelled = reader.read_blocks(peer, plan, 10.0)
    reader.cancel(cancelled)
    ends += [end_of(reader, cancelled), end_of(reader, reader.read_blocks(peer, plan, 1e-6))]
    dropped = reader.read_blocks(peer, plan, 10.0)
    reader.drop_peer(peer)
    ends += [end_of(reader, dropped), end_of(reader, reader.read_blocks(peer, plan, 10.0))]
    reader.read_blocks(reader.import_peer(info, export, 10.0), plan, 10.0)  # closed while it goes on
    reader.close()
    memory.release()
    return ends


def serve(told, reader_is_done) -> None:
    """The other worker, on a thread of its own."""
    source, config, memory = opened("source")
    told.put((peer_info(config), source.export()))
    while not reader_is_done.is_set():
        select.select([source.wakeup_fd()], [], [], 0.05)
        source.poll()
    source.close()
    memory.release()


def opened(name):
    memory = memoryview(mmap.mmap(-1, NUM_BLOCKS * BLOCK_BYTES))
    config = TransferConfig(WorkerId(name), 1, "")
    transfer = UcxTransfer()
    transfer.open(config)
    address = addressof(c_char.from_buffer(memory))
    transfer.register(Region("pool", address, NUM_BLOCKS, BLOCK_BYTES, BLOCK_BYTES))
    return transfer, config, memory


def end_of(reader, transfer_id) -> str:
    until_s = time.monotonic() + 10.0
    while time.monotonic() < until_s:
        for completion in reader.poll():
            if completion.transfer_id == transfer_id:
                return str(completion.outcome)
        select.select([reader.wakeup_fd()], [], [], reader.tick_s() or 1.0)
    raise AssertionError("no completion")


if __name__ == "__main__":
    main()
