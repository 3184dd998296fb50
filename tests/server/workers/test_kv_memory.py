"""Which transfers a worker opens, and where its rows lie."""

import pytest

from trtserve.plugins.api import KVLayout, WorkerId
from trtserve.plugins.transfer import cuda_driver
from trtserve.plugins.transfer.shm.transfer import ShmTransfer
from trtserve.plugins.transfer_api import Buffer, MemoryKind, TransferCaps, TransferConfig, TransferError
from trtserve.server.workers.kv_memory import TransferChoice, open_rows

LAYOUT = KVLayout("layout", 64, "cpu")


class Pipe:
    """A transfer that moves memory from anywhere, as far as opening one goes."""

    def __init__(self, name="pipe", memory=MemoryKind.HOST, cannot_open=False, cannot_register=False):
        self.name = name
        self.caps = TransferCaps(frozenset({memory}), across_nodes=True, owns_memory=False)
        self.config = self.region = None
        self.is_closed = False
        self._cannot_open, self._cannot_register = cannot_open, cannot_register

    def open(self, config):
        if self._cannot_open:
            raise TransferError("it is blocked")
        self.config = config

    def allocate(self, num_bytes):
        return None

    def register(self, region):
        if self._cannot_register:
            raise TransferError("it leaks")
        self.region = region

    def close(self):
        self.is_closed = True


@pytest.fixture
def config(tmp_path):
    return TransferConfig(WorkerId("prefill-0"), 1, str(tmp_path))


def opened(config, *transfers, layout=LAYOUT, **choice):
    make = {each.name: (lambda each=each: each) for each in transfers}
    return open_rows(TransferChoice(make, **choice), config, layout, 10)


def test_one_memory_serves_all_transfers(config):
    """The one that owns its memory gives it, wherever it stands."""
    pipe, shm = Pipe(), ShmTransfer()
    memory = opened(config, pipe, shm, options={"shm": {"copy_threads": 1}})
    assert [each.name for each in memory.transfers] == ["pipe", "shm"]
    assert memory.buffer.num_bytes == 640 and pipe.region.address == memory.buffer.address
    assert (pipe.region.num_blocks, pipe.region.block_bytes, pipe.config.device) == (10, 64, "cpu")
    shm.close()


def test_memory_of_nobody_will_do(config):
    memory = opened(config, Pipe())
    assert memory.buffer.kind is MemoryKind.HOST and bytes(memory.buffer.view) == bytes(640)


def test_a_transfer_that_cannot_be_used_is_left_out(config):
    good = Pipe()
    leaking = Pipe("leaking", cannot_register=True)
    memory = opened(config, Pipe("blocked", cannot_open=True), leaking, Pipe("gpu", MemoryKind.CUDA), good)
    assert memory.transfers == [good] and leaking.is_closed


def test_one_of_two_that_do_not_go_together(config):
    first, second = Pipe("ucx"), Pipe("nixl")
    assert opened(config, first, second, instead={"nixl": "ucx"}).transfers == [first]
    blocked = Pipe("ucx", cannot_open=True)
    assert opened(config, blocked, second, instead={"nixl": "ucx"}).transfers == [second]


@pytest.mark.parametrize(
    ("transfers", "problem"),
    [
        ([], "there is none"),
        (
            [Pipe("a", cannot_open=True), Pipe("b", MemoryKind.CUDA)],
            "a: it is blocked; b: it does not move host memory",
        ),
        ([Pipe("a", cannot_register=True)], "a: it leaks"),
    ],
)
def test_without_any_it_is_said_why(config, transfers, problem):
    with pytest.raises(TransferError, match=problem):
        opened(config, *transfers)


def test_device_memory_is_the_drivers_where_no_transfer_gives_any(config, monkeypatch):
    gpu = Pipe("gpu", MemoryKind.CUDA)
    used, given = [], Buffer(4096, 640, MemoryKind.CUDA, None)
    monkeypatch.setattr(cuda_driver, "use", used.append)
    monkeypatch.setattr(cuda_driver, "allocate", lambda num_bytes, device: given)
    memory = opened(config, gpu, layout=KVLayout("layout", 64, "cuda:1"))
    assert memory.buffer is given and used == ["cuda:1"] and gpu.config.device == "cuda:1"


def test_without_a_driver_device_memory_is_refused(config):
    with pytest.raises(TransferError, match=r"no CUDA driver|does not start|INVALID_DEVICE"):
        opened(config, Pipe("gpu", MemoryKind.CUDA), layout=KVLayout("layout", 64, "cuda:99"))
