"""Shared memory whose reads end when a test says so: the bytes are copied at once, the completions wait."""

import os
import threading

from trtserve.plugins.transfer.shm.transfer import ShmTransfer
from trtserve.plugins.transfer_api import Cancelled, Completion, TransferOutcome


class HeldTransfer(ShmTransfer):
    """Any thread may call `let_go` and look at `cancelled`."""

    def __init__(self):
        super().__init__()
        self._lock = threading.Lock()
        self._held = []
        self._outcome = None
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK)
        self.cancelled = []
        self.refusals = 0

    def import_peer(self, peer, exported, deadline_s):
        if self.refusals:
            self.refusals -= 1
            from trtserve.plugins.transfer_api import TransferError

            raise TransferError("not today")
        return super().import_peer(peer, exported, deadline_s)

    @property
    def num_held(self):
        with self._lock:
            return len(self._held)

    def let_go(self, outcome=TransferOutcome.DONE):
        """All reads end so, these and later ones; None: hold them again."""
        with self._lock:
            self._outcome = outcome
        os.eventfd_write(self._wakeup, 1)

    def poll(self):
        new = super().poll()
        with self._lock:
            self._held += new
            if self._outcome is None:
                return []
            held, self._held = self._held, []
            reason = "" if self._outcome is TransferOutcome.DONE else "the test says so"
            return [
                Completion(each.transfer_id, self._outcome, each.num_bytes, each.duration_s, reason) for each in held
            ]

    def tick_s(self):
        return 0.005

    def cancel(self, transfer_id):
        self.cancelled.append(transfer_id)
        return Cancelled.DRAINING

    def close(self):
        super().close()
        if self._wakeup >= 0:
            os.close(self._wakeup)
            self._wakeup = -1
