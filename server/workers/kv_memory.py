"""Opens a worker's KV transfers and gets the memory for its rows."""

from __future__ import annotations

import ctypes
import logging
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trtserve.plugins.api import KVLayout
from trtserve.plugins.transfer import cuda_driver
from trtserve.plugins.transfer_api import Buffer, KVTransfer, MemoryKind, Region, TransferConfig, TransferError
from trtserve.server.workers.kv_fetcher import REGION

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TransferChoice:
    """The transfers that a worker may use, the best one first; the first that reaches a peer reads it.

    is_required: without any of them the worker does not start. instead: these are opened only if that one could not
    be, as the two do not go well together in one process (name → name).
    """

    make: Mapping[str, Callable[[], KVTransfer]]
    is_required: bool = False
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    instead: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RowMemory:
    """Memory of a worker's rows, readable through these transfers."""

    transfers: Sequence[KVTransfer]
    buffer: Buffer


def open_rows(choice: TransferChoice, config: TransferConfig, layout: KVLayout, num_rows: int) -> RowMemory:
    """Open the transfers, allocate and register. All on the thread that will make the transfers' other calls.

    Raises TransferError where no transfer can be used; its text has the reason of each.
    """
    problems: dict[str, str] = {}
    if _kind_of(layout) is MemoryKind.CUDA:
        cuda_driver.use(layout.device)  # UCX looks at the context of the thread that opens it
    opened = _open_all(choice, replace(config, device=layout.device), _kind_of(layout), problems)
    try:
        buffer = _allocate(opened, num_rows * layout.block_bytes, layout.device)
        region = Region(REGION, buffer.address, num_rows, layout.block_bytes, layout.block_bytes, buffer.kind)
        usable = [transfer for transfer in opened if _registers(transfer, region, problems)]
        if not usable:
            raise TransferError("; ".join(f"{name}: {problem}" for name, problem in problems.items()))
    except BaseException:
        for transfer in opened:
            transfer.close()
        raise
    for name, problem in problems.items():
        logger.info("KV transfer %s is not used: %s", name, problem)
    return RowMemory(usable, buffer)


def _open_all(
    choice: TransferChoice, config: TransferConfig, kind: MemoryKind, problems: dict[str, str]
) -> list[KVTransfer]:
    opened: list[KVTransfer] = []
    for name, make in choice.make.items():
        preferred = choice.instead.get(name)
        if any(transfer.name == preferred for transfer in opened):
            problems[name] = f"{preferred} is there"
            continue
        try:
            transfer = make()
            if kind not in transfer.caps.memory:
                raise TransferError(f"it does not move {kind} memory")
            transfer.open(replace(config, options=choice.options.get(name, {})))
        except TransferError as error:
            problems[name] = str(error)
        else:
            opened.append(transfer)
    if not opened:
        raise TransferError("; ".join(f"{name}: {problem}" for name, problem in problems.items()) or "there is none")
    return opened


def _registers(transfer: KVTransfer, region: Region, problems: dict[str, str]) -> bool:
    try:
        transfer.register(region)
    except TransferError as error:
        problems[transfer.name] = str(error)
        transfer.close()
        return False
    return True


def _allocate(transfers: Sequence[KVTransfer], num_bytes: int, device: str) -> Buffer:
    """From the first transfer that owns its memory; the others register it too, if they can."""
    for transfer in transfers:
        buffer = transfer.allocate(num_bytes)
        if buffer is not None:
            return buffer
    if device.startswith("cuda"):
        return cuda_driver.allocate(num_bytes, device)
    memory = mmap.mmap(-1, num_bytes)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return Buffer(address, num_bytes, MemoryKind.HOST, memory, memoryview(memory))


def _kind_of(layout: KVLayout) -> MemoryKind:
    return MemoryKind.CUDA if layout.device.startswith("cuda") else MemoryKind.HOST
