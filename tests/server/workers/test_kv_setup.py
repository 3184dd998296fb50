"""From settings to transfers: which ones, in what order, and what is said where there is none."""

import os
import subprocess
import sys

import pytest

from tests.models import make_tiny_model
from tests.server.workers.conftest import HELLO, INFO
from trtserve.plugins.manager import PluginError, PluginManager
from trtserve.plugins.transfer_api import TransferError
from trtserve.server.workers import wire
from trtserve.server.workers.kv_exchange import KVExchange
from trtserve.server.workers.kv_setup import exchange_options, own_address, runtime_dir
from trtserve.settings.schema import WorkerSettings


def settings(**changes):
    return WorkerSettings(model="m", connect="ipc:///tmp/some/place.sock", worker_id="prefill-0", **changes)


def test_an_aggregated_worker_takes_no_part():
    assert exchange_options(settings(), HELLO, PluginManager()) is None


def test_auto_takes_what_is_installed():
    options = exchange_options(settings(role="decode"), HELLO, PluginManager())
    assert options is not None and "shm" in options.choice.make and not options.choice.is_required
    assert options.choice.make["shm"]().name == "shm"
    assert (options.config.worker_id, options.config.runtime_dir) == (HELLO.worker_id, "/tmp/some")


def test_room_for_kv_is_in_whole_blocks():
    given = exchange_options(settings(role="decode", kv_transfer_tokens=100), HELLO, PluginManager())
    default = exchange_options(settings(role="decode"), HELLO, PluginManager())
    assert given is not None and default is not None
    assert (given.num_rows, default.num_rows) == (7, None)


def test_a_transfer_by_name_is_required():
    options = exchange_options(settings(role="prefill", transfer="shm"), HELLO, PluginManager())
    assert options is not None and list(options.choice.make) == ["shm"] and options.choice.is_required
    with pytest.raises(PluginError, match="pigeon"):
        exchange_options(settings(role="prefill", transfer="pigeon"), HELLO, PluginManager())


def test_a_folder_of_its_own_for_every_user(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = runtime_dir("tcp://127.0.0.1:5")
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    assert runtime_dir("tcp://127.0.0.1:6") == folder
    folder.chmod(0o755)
    with pytest.raises(PermissionError, match="only this user"):
        runtime_dir("tcp://127.0.0.1:5")
    folder.rmdir()
    os.symlink("/tmp", folder)
    with pytest.raises(PermissionError):
        runtime_dir("tcp://127.0.0.1:5")


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:5", "ipc:///tmp/a/b", "tcp://localhost:5"])
def test_the_own_address_is_the_way_to_the_server(endpoint):
    assert own_address(endpoint) in ("127.0.0.1", "::1")


def test_a_worker_process_offers_its_rows(server, tmp_path):
    folder = make_tiny_model(tmp_path / "model")
    command = [sys.executable, "-m", "trtserve.server.cli", "worker", str(folder), "--engine=sim", "--role=prefill"]
    process = subprocess.Popen(
        [
            *command,
            "--worker-id=p-0",
            f"--connect={server.endpoint}",
            "--num-blocks=400",
            "--engine-options=speedup=1e9",
        ],
        env=os.environ | {"TRTSERVE_WORKER_TOKEN": "t0ken"},
    )
    try:
        ready = server.welcome()[-1]
        assert ready.kv.info.pid == process.pid and "shm" in dict(ready.kv.exports)
        assert ready.kv.num_rows == max(100, ready.info.max_seq_len // 16 + 1)
        assert server.receive(wire.Heartbeat).kv is not None
    finally:
        process.kill()
        process.wait()


def test_an_engine_without_kv_ends_a_worker_only_where_a_transfer_was_asked_for():
    def start(**changes):
        options = exchange_options(settings(role="decode", **changes), HELLO, PluginManager())
        return KVExchange(options, lambda message: None).start(object(), INFO)

    assert start() is None
    with pytest.raises(TransferError, match="this engine has no KV"):
        start(transfer="shm")
