"""Memory of the transfer's own: probes are read into it, and everything that a slow connection brings."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trtserve.plugins.transfer import cuda_driver
from trtserve.plugins.transfer.nixl.agent import Agent, AgentError, PeerLost
from trtserve.plugins.transfer.runs import PIECE_BYTES
from trtserve.plugins.transfer_api import MemoryKind, TransferError

MAX_STAGES = 256
"""Most stages of a process, 4 GiB; of one that only probes a mebibyte is ever touched."""


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """PIECE_BYTES of registered host memory."""

    memory: NDArray[np.uint8]

    @property
    def address(self) -> int:
        return int(self.memory.ctypes.data)

    def copy_out(self, addresses: Sequence[int], sizes: Sequence[int], kind: MemoryKind) -> None:
        """Copy stretch after stretch, from the beginning, to own addresses of that kind of memory. Lets other threads
        run meanwhile. Raises TransferError where CUDA refuses."""
        source = self.address
        copy = cuda_driver.copy_in if kind is MemoryKind.CUDA else ctypes.memmove
        for address, size in zip(addresses, sizes, strict=True):
            copy(address, source, size)
            source += size


class Stages:
    """Hands stages out. One that somebody may still write into does not come back: it stays until the process or the
    transfer ends."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._all: list[Stage] = []
        self._free: list[Stage] = []

    def take(self) -> Stage:
        """Raises TransferError where there are too many, or no memory."""
        if self._free:
            return self._free.pop()
        if len(self._all) >= MAX_STAGES:
            raise TransferError(
                f"transfer nixl has given up {MAX_STAGES} reads that may still arrive, or has as many peers; "
                "a restart of the worker takes the memory back"
            )
        try:
            stage = Stage(np.empty(PIECE_BYTES, np.uint8))
            self._agent.register(stage.address, PIECE_BYTES, MemoryKind.HOST, 0)
        except (MemoryError, AgentError, PeerLost) as error:
            raise TransferError(f"transfer nixl gets no memory to read into: {error}") from None
        self._all.append(stage)
        return stage

    def give_back(self, stage: Stage) -> None:
        """Nobody writes into it any more."""
        self._free.append(stage)

    def close(self) -> None:
        """After the agent's `close`."""
        self._all.clear()
        self._free.clear()
