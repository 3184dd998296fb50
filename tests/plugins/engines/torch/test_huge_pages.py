"""Memory moved onto huge pages keeps its contents and its address; the KV store's is on them from the start."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from trtserve.plugins.engines.torch import huge_pages
from trtserve.plugins.engines.torch.huge_pages import onto_huge_pages
from trtserve.plugins.engines.torch.kv_store import KVStore, LayerShape

SMAPS = Path("/proc/self/smaps")


def mapping_of(address):
    """What Linux says of the mapping that holds an address: numbers in bytes, and its flags."""
    found = None
    for line in SMAPS.read_text().splitlines():
        name, *rest = line.split()
        if "-" in name and not name.endswith(":"):
            start, stop = (int(part, 16) for part in name.split("-"))
            found = {} if start <= address < stop else None
        elif found is not None:
            found[name[:-1]] = rest if name == "VmFlags:" else int(rest[0]) * 1024
            if name == "VmFlags:":
                return found
    raise AssertionError("no such mapping")


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux")
def test_memory_is_moved_with_its_contents():
    if not huge_pages._page_size():
        pytest.skip("no huge pages here")
    memory = mmap.mmap(-1, 16 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    numbers = torch.frombuffer(memory, dtype=torch.int64)
    numbers.copy_(torch.arange(len(numbers)))
    address = numbers.data_ptr()
    before = mapping_of(address)["AnonHugePages"]
    onto_huge_pages(address + 5 * 2**20, 2**20)
    assert torch.equal(numbers, torch.arange(len(numbers))) and numbers.data_ptr() == address
    assert mapping_of(address)["AnonHugePages"] > before


def test_memory_that_is_not_there_is_no_error():
    onto_huge_pages(2**40, 2**20)


def test_a_system_without_huge_pages_is_no_error(monkeypatch):
    monkeypatch.setattr(huge_pages, "_page_size", lambda: 0)
    onto_huge_pages(torch.zeros(4).data_ptr(), 16)


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux")
def test_the_kv_stores_memory_may_have_huge_pages():
    store = KVStore([LayerShape(2, 64, 64)], 4096, 16, torch.float32, torch.device("cpu"))
    flags = mapping_of(store.keys[0].data_ptr())["VmFlags"]
    assert "hg" in flags and "sh" not in flags  # Linux gives shared memory small pages, whatever is asked of it
