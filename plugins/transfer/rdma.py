"""Whether this machine has RDMA devices, and whether the UCX that the ucx transfer would load can use them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

_DEVICES = Path("/sys/class/infiniband")
_SYSTEM_FOLDERS = (Path("/usr/lib"), Path("/usr/lib64"), Path("/usr/local/lib"))
_MODULES = ("ucx/libuct_ib*.so*", "*/ucx/libuct_ib*.so*")


def has_devices(devices: Path = _DEVICES) -> bool:
    """Whether this machine has any InfiniBand or RoCE device."""
    return devices.is_dir() and any(devices.iterdir())


def ucx_uses_it() -> bool:
    """Whether libucp comes with its module for InfiniBand and RoCE: the wheels' does not, a system's may."""
    wheel = find_spec("libucx")
    folders = _SYSTEM_FOLDERS if wheel is None else [Path(place) for place in wheel.submodule_search_locations or ()]
    return any(True for folder in folders for pattern in _MODULES for _ in folder.glob(pattern))
