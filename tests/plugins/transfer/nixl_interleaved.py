"""Two processes whose regions lie in each other's gaps, as keys and values do: python nixl_interleaved.py

Prints what the reader finds wrong; nothing if all is well. The process given a descriptor is the one that is read.
"""

import socket
import subprocess
import sys
import time
from array import array

import msgspec
import numpy as np

from trtserve.plugins.transfer.identity import peer_info
from trtserve.plugins.transfer.nixl import make_transfer
from trtserve.plugins.transfer_api import BlockCopies, PeerInfo, ReadPlan, Region, TransferConfig, TransferOutcome

NUM_BLOCKS, BLOCK_BYTES = 32, 4096
DEADLINE_S = 10.0


def open_transfer(worker_id, pool):
    transfer = make_transfer("nixl")
    transfer.open(TransferConfig(worker_id, 1, "/nowhere"))
    for number, name in enumerate(("keys", "values")):
        address = pool.ctypes.data + number * BLOCK_BYTES
        transfer.register(Region(name, address, NUM_BLOCKS, BLOCK_BYTES, 2 * BLOCK_BYTES))
    return transfer


def be_read(control):
    pool = np.arange(2 * NUM_BLOCKS * BLOCK_BYTES // 8, dtype=np.uint64)
    transfer = open_transfer("source", pool)
    info = peer_info(TransferConfig("source", 1, "/nowhere"))
    control.send(msgspec.msgpack.encode([info, transfer.export()]))
    control.settimeout(0.001)
    while True:
        transfer.poll()
        try:
            return control.recv(1)
        except TimeoutError:
            continue


def read(control):
    pool = np.zeros(2 * NUM_BLOCKS * BLOCK_BYTES // 8, np.uint64)
    transfer = open_transfer("reader", pool)
    info, exported = msgspec.msgpack.decode(control.recv(1 << 20))
    peer = transfer.import_peer(msgspec.convert(info, PeerInfo), exported, DEADLINE_S)
    sources = {"keys": [3, 4, 31, 0], "values": [0, 7]}
    targets = {"keys": [0, 1, 2, 31], "values": [31, 2]}
    plan = [BlockCopies(name, array("i", sources[name]), array("i", targets[name])) for name in sources]
    transfer.read_blocks(peer, ReadPlan(plan), DEADLINE_S)
    until_s = time.monotonic() + DEADLINE_S
    while not (ended := transfer.poll()) and time.monotonic() < until_s:
        time.sleep(transfer.tick_s())
    blocks = pool.reshape(NUM_BLOCKS, 2, -1)
    expected = np.zeros_like(blocks)
    there = np.arange(pool.size, dtype=np.uint64).reshape(blocks.shape)
    for number, name in enumerate(sources):
        expected[targets[name], number] = there[sources[name], number]
    if [end.outcome for end in ended] != [TransferOutcome.DONE]:
        print(ended)
    if not (blocks == expected).all():
        print("wrong blocks:", np.argwhere((blocks != expected).any(axis=2)).tolist())
    transfer.close()


def main():
    if len(sys.argv) > 1:
        be_read(socket.socket(fileno=int(sys.argv[1])))
        return
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(DEADLINE_S)
    source = subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    theirs.close()
    try:
        read(ours)
    finally:
        source.kill()
        source.wait()


if __name__ == "__main__":
    main()
