"""Rows of KV in memory that others can reach, as a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import c_char
from typing import Any

import torch
from torch import Tensor

from trtserve.plugins.api import KVRows


def rows_tensor(rows: KVRows, dtype: torch.dtype) -> Tensor:
    """The rows without a copy: `dtype`[num_rows, numbers in a row]. Whoever holds the tensor keeps `rows` as well.

    Raises ValueError where a row has no whole number of numbers.
    """
    if rows.row_bytes % dtype.itemsize or rows.address % dtype.itemsize:
        raise ValueError(
            f"rows of {rows.row_bytes} bytes from address {rows.address:#x} on hold no {dtype}: align them to "
            f"{dtype.itemsize} bytes"
        )
    num_bytes = rows.num_rows * rows.row_bytes
    device = torch.device(rows.device)
    if device.type == "cpu":
        flat = torch.frombuffer((c_char * num_bytes).from_address(rows.address), dtype=torch.uint8)
    else:
        flat = torch.as_tensor(_DeviceBytes(rows.address, num_bytes), device=device)
    return flat.view(dtype).view(rows.num_rows, -1)


class _DeviceBytes:
    """Device memory for torch to look at, by the CUDA array interface, version 3 (numba's documentation defines it)."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__: Mapping[str, Any] = {
            "version": 3,
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),  # False: writable
            "strides": None,  # contiguous
            "stream": None,  # nobody is writing to it now
        }
