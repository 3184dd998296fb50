"""Settings become a plan, and the plan the commands of worker processes."""

import json
import os
from pathlib import Path

import pytest

from trtserve.plugins.api import Role
from trtserve.plugins.manager import PluginError, PluginManager
from trtserve.server.deployment import (
    WORKER_TOKEN_VARIABLE,
    WorkerCommands,
    describe_plan,
    make_plan,
    with_usable_transfer,
)
from trtserve.settings.errors import SettingsError
from trtserve.settings.load import load_settings
from trtserve.settings.schema import Settings, WorkerSettings


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in os.environ:
        if name.upper().startswith("TRTSERVE_"):
            monkeypatch.delenv(name)


def load(*flags):
    return load_settings(Settings, ["--engine=sim", *flags])


def test_workers_are_named_by_role_and_number():
    plan = make_plan(load("--workers=3"), PluginManager())
    assert [(worker.worker_id, worker.role) for worker in plan.workers] == [
        ("agg-0", Role.AGG), ("agg-1", Role.AGG), ("agg-2", Role.AGG),
    ]  # fmt: skip


def test_each_worker_has_a_gpu_of_its_own(tmp_path):
    settings = load("--mode=disagg", "--decode-workers=2", "--gpus=3,0,1,7")
    plan = make_plan(settings, PluginManager())
    assert [worker.device for worker in plan.workers] == ["cuda:3", "cuda:0", "cuda:1"]
    assert "#   decode-1   role decode, engine sim, on cuda:1" in describe_plan(settings, plan)
    commands = WorkerCommands(settings, Path("/m"), tmp_path, "ipc:///x", "t", plan.workers)
    argv = commands.spec(plan.workers[1].worker_id, Role.DECODE).argv
    assert load_settings(WorkerSettings, [*argv[4:]]).device == "cuda:0"
    assert "--device" not in commands.spec("by-hand", Role.DECODE).argv


@pytest.mark.parametrize("gpus", ["0", "0,0"])
def test_too_few_gpus_are_an_error(gpus):
    with pytest.raises(SettingsError, match="each of the 2 workers needs a GPU of its own"):
        make_plan(load("--workers=2", f"--gpus={gpus}"), PluginManager())


@pytest.mark.parametrize("flags", [("--gpus=0", "--device=cpu"), ("--gpus=0", "--device=cuda:1"), ("--gpus=a",)])
def test_gpus_that_contradict_or_make_no_sense(flags):
    with pytest.raises(SettingsError, match="gpus"):
        load(*flags)


def test_a_server_without_workers_of_its_own_needs_a_token_for_others(tmp_path):
    with pytest.raises(SettingsError, match=r"--workers 0: .* give --worker-token-file"):
        make_plan(load("--workers=0"), PluginManager())
    (tmp_path / "token").write_text("secret")
    assert make_plan(load("--workers=0", f"--worker-token-file={tmp_path}/token"), PluginManager()).workers == ()


def test_everything_that_is_missing_is_named_at_once():
    with pytest.raises(PluginError) as caught:
        make_plan(load("--mode=magic", "--router=nearest", "--launcher=cloud", "--transfer=pigeon"), PluginManager())
    lines = str(caught.value).splitlines()
    assert [line.split(";")[0] for line in lines] == [
        "there is no mode 'magic'",
        "there is no policy 'nearest'",
        "there is no launcher 'cloud'",
        "there is no transfer 'pigeon'",
    ]


def test_options_are_checked_before_anything_starts():
    with pytest.raises(PluginError, match="speedup"):
        make_plan(load("--engine-options", "speedup=-1"), PluginManager())
    plan = make_plan(load("--engine-options", "speedup=5"), PluginManager())
    assert plan.engine_options["speedup"] == 5.0


def test_a_described_plan_is_a_config_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TRTSERVE_API_KEY", "s3cret")
    monkeypatch.setenv("TRTSERVE_WORKER_TOKEN", "t0ken")
    settings = load("some/model", "--port=81", "--workers=2", "--engine-options", "speedup=5", "--dry-run")
    text = describe_plan(settings, make_plan(settings, PluginManager()))
    assert "s3cret" not in text and "t0ken" not in text
    assert "#   agg-1   role agg, engine sim" in text
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    again = load_settings(Settings, ["--config", str(path)])
    assert (again.model, again.port, again.workers, again.dry_run) == ("some/model", 81, 2, False)
    assert again.engine_options["speedup"] == 5.0
    ignored = {"dry_run", "engine_options"}
    assert again.model_dump(exclude=ignored) == settings.model_dump(exclude=ignored)


@pytest.fixture
def spec(tmp_path, monkeypatch):
    """What starts agg-1 of a server with secrets in its environment."""
    monkeypatch.setenv("TRTSERVE_API_KEY", "s3cret")
    monkeypatch.setenv("TRTSERVE_PORT", "1234")
    monkeypatch.setenv("UNRELATED", "kept")
    settings = load("a/model", "--max-num-seqs=7", "--engine-options", "speedup=5")
    commands = WorkerCommands(settings, Path("/models/a"), tmp_path, "ipc:///x", "t0ken")
    return commands.spec("agg-1", Role.AGG)


def test_a_worker_reads_the_servers_settings(spec, monkeypatch):
    for name in list(os.environ):
        monkeypatch.delenv(name)
    for name, value in spec.environment.items():
        monkeypatch.setenv(name, value)
    _, module, program, command, *arguments = spec.argv
    assert (module, program, command) == ("-m", "trtserve.server.cli", "worker")
    worker = load_settings(WorkerSettings, arguments)
    assert (worker.worker_id, worker.role, worker.connect) == ("agg-1", "agg", "ipc:///x")
    assert (worker.model, worker.max_num_seqs, worker.parent_pid) == ("/models/a", 7, os.getpid())
    assert worker.engine_options == {"speedup": "5"}
    assert worker.worker_token.get_secret_value() == "t0ken"


def test_a_worker_gets_its_token_and_no_other_secret(spec, tmp_path):
    assert spec.environment[WORKER_TOKEN_VARIABLE] == "t0ken"
    assert spec.environment["UNRELATED"] == "kept"
    assert [name for name in spec.environment if name.startswith("TRTSERVE_")] == [WORKER_TOKEN_VARIABLE]
    everything = " ".join([*spec.argv, *spec.environment.values(), (tmp_path / "settings.json").read_text()])
    assert "s3cret" not in everything
    assert "t0ken" not in " ".join(spec.argv) + (tmp_path / "settings.json").read_text()


def test_logs_go_where_the_settings_say(tmp_path):
    settings = load(f"--log-dir={tmp_path}/deep/logs")
    commands = WorkerCommands(settings, Path("/m"), tmp_path, "ipc:///x", "t")
    assert commands.spec("agg-0", Role.AGG).log_path == f"{tmp_path}/deep/logs/agg-0.log"
    assert (tmp_path / "deep/logs").is_dir()
    assert "log_dir" not in json.loads((tmp_path / "settings.json").read_text())


def test_a_folder_for_logs_that_cannot_be_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    settings = load(f"--log-dir={tmp_path}/file/logs")
    with pytest.raises(SettingsError, match=r"--log-dir .*/file/logs: cannot be made: Not a directory"):
        WorkerCommands(settings, Path("/m"), tmp_path, "ipc:///x", "t")


def test_the_plan_tells_how_much_kv_can_be_on_its_way():
    def described(*flags):
        settings = load(*flags)
        return describe_plan(settings, make_plan(settings, PluginManager()))

    assert "KV moves" not in described()
    assert "KV moves by auto, each worker holds a quarter of its KV cache" in described("--mode=disagg")
    text = described("--mode=disagg", "--kv-transfer-tokens=4096", "--transfer=shm")
    assert "KV moves by shm, each worker holds 4096 tokens" in text and "kv_transfer_tokens: 4096" in text


@pytest.mark.parametrize("tokens", [0, 15, 2**22 * 16 + 1])
def test_room_for_kv_is_at_least_a_block_and_bounded(tokens):
    with pytest.raises(SettingsError, match=r"kv.transfer.tokens"):
        load(f"--kv-transfer-tokens={tokens}")


@pytest.mark.parametrize(
    ("machine", "flags", "is_there", "transfer"),
    [
        ("aarch64", [], False, "ucx"),
        ("aarch64", [], True, "nixl"),
        ("aarch64", ["--transfer=nixl"], False, "nixl"),
        ("x86_64", [], False, "nixl"),
    ],
)
def test_nixl_by_its_variable_is_given_up_on_arm_only_and_only_where_it_cannot_be_used(
    monkeypatch, caplog, machine, flags, is_there, transfer
):
    """What is left at nixl without being there is an error, by `make_plan`."""
    monkeypatch.setenv("TRTLLM_USE_NIXL_KVCACHE", "1")
    monkeypatch.setattr("platform.machine", lambda: machine)
    manager = PluginManager()
    monkeypatch.setattr(manager, "problem", lambda kind, name: None if is_there else "nixl is not there")
    settings = with_usable_transfer(load(*flags), manager)
    assert settings.transfer == transfer
    assert ("on this arm64 machine nixl is not there; ucx is used instead" in caplog.text) is (transfer == "ucx")
