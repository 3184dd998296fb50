"""What the nixl transfer refuses in its own process, and what it leaves alone: python nixl_guards.py

Prints what is wrong; nothing if all is well. A process of its own, since NIXL cannot be unloaded.
"""

import logging
import os
import sys
import threading
from array import array

from trtserve.plugins.transfer.nixl import make_transfer
from trtserve.plugins.transfer_api import BlockCopies, ReadPlan, Region, TransferConfig, TransferError, TransferId


class Handler(logging.Handler):
    is_closed = False

    def close(self):
        self.is_closed = True
        super().close()


def raised(call):
    """What a call raises in another thread."""
    found = []

    def run():
        try:
            call()
        except Exception as error:
            found.append(type(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found


def main():
    handler = Handler()
    logging.getLogger().addHandler(handler)
    transfer, memory = make_transfer("nixl"), array("q", [0] * 4096)
    transfer.open(TransferConfig("guarded", 1, "/nowhere"))
    region = Region("keys", memory.buffer_info()[0], 4, 4096, 4096)
    plan = ReadPlan([BlockCopies("keys", array("i"), array("i"))])
    calls = {
        "register": lambda: transfer.register(region),
        "export": transfer.export,
        "import_peer": lambda: transfer.import_peer(None, b"", 1.0),
        "read_blocks": lambda: transfer.read_blocks(None, plan, 1.0),
        "poll": transfer.poll,
        "wakeup_fd": transfer.wakeup_fd,
        "tick_s": transfer.tick_s,
        "cancel": lambda: transfer.cancel(TransferId(1)),
        "drop_peer": lambda: transfer.drop_peer(None),
        "close": transfer.close,
    }
    for name, call in calls.items():
        if raised(call) != [RuntimeError]:
            print(f"{name} may be called from another thread")
    transfer.register(region)
    if handler.is_closed or not logging.raiseExceptions or logging.getLogger("nixl").handlers:
        print("loading NIXL changed the process's logging")
    if (os.environ["UCX_KEEPALIVE_INTERVAL"], os.environ["UCX_RNDV_THRESH"]) != ("3s", "inf"):
        print("what the user has set was overwritten, or what is needed was not set")
    if "torch" in sys.modules:
        print("torch was imported")
    transfer.close()
    transfer.close()
    if (transfer.poll(), transfer.tick_s(), transfer.wakeup_fd()) != ([], 0.0, None):
        print("a closed transfer has something to do")
    try:
        transfer.export()
    except TransferError:
        return
    print("a closed transfer exports")


if __name__ == "__main__":
    main()
