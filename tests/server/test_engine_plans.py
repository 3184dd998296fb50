"""Engines with a plan: GPUs and environment of their workers, and what --dry-run tells of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trtserve.plugins.api import Role
from trtserve.plugins.manager import PluginError, PluginManager
from trtserve.server.deployment import WorkerCommands, describe_plan, make_plan
from trtserve.settings.errors import SettingsError
from trtserve.settings.load import load_settings
from trtserve.settings.schema import Settings, WorkerSettings

FOUR = "--tp-size=4"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in os.environ:
        if name.upper().startswith(("TRTSERVE_", "CUDA_VISIBLE")):
            monkeypatch.delenv(name)


def planned(*flags):
    """For --dry-run, which needs no TensorRT-LLM."""
    settings = load_settings(Settings, ["--engine=tensorrt_llm", "--dry-run", *flags])
    return settings, make_plan(settings, PluginManager())


def seen(*flags):
    return [",".join(worker.gpus) for worker in planned(*flags)[1].workers]


@pytest.mark.parametrize(
    ("flags", "gpus"),
    [
        ((FOUR, "--workers=2", "--gpus=7,6,5,4,3,2,1,0"), ["7,6,5,4", "3,2,1,0"]),
        ((FOUR, "--workers=2"), ["0,1,2,3", "4,5,6,7"]),
        ((FOUR,), [""]),
        ((FOUR, "--gpus=4,5,6,7,8"), ["4,5,6,7"]),
        (("--workers=3",), ["0", "1", "2"]),
        (("--mode=disagg", "--prefill.engine-options=tensor_parallel_size=2"), ["0,1", "2"]),
    ],
)
def test_each_worker_has_gpus_of_its_own(flags, gpus):
    assert seen(*flags) == gpus


def test_gpus_of_the_server_are_shared_out(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c")
    assert seen("--workers=3") == ["GPU-a", "GPU-b", "GPU-c"]
    with pytest.raises(SettingsError, match=r"CUDA_VISIBLE_DEVICES=GPU-a,GPU-b,GPU-c: the 4 workers need 1 \+ 1"):
        planned("--workers=4")


@pytest.mark.parametrize("gpus", ["0,1,2,3,4,5,6", "0,1,2,3,4,5,6,6"])
def test_too_few_gpus_are_an_error(gpus):
    with pytest.raises(SettingsError, match=rf"--gpus {gpus}: the 2 workers need 4 \+ 4 GPUs, 8 in all"):
        planned(FOUR, "--workers=2", f"--gpus={gpus}")


def test_a_workers_process_gets_its_plan(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "8")
    settings, plan = planned("--workers=2", "--engine-options", "environment={UCX_TLS: all}")
    commands = WorkerCommands(settings, Path("/m"), tmp_path, "ipc:///x", "t", plan.workers, plan.engines)
    environment = commands.spec(plan.workers[1].worker_id, Role.AGG).environment
    assert environment["CUDA_VISIBLE_DEVICES"] == "1" and environment["UCX_TLS"] == "all"
    assert environment["TLLM_WORKER_USE_SINGLE_PROCESS"] == "1"
    assert "SLURM_JOB_ID" not in environment and environment["SLURM_CPUS_ON_NODE"] == "8"


def test_a_worker_whose_role_was_changed_keeps_its_engine(tmp_path):
    settings, plan = planned("--mode=disagg", "--prefill.max-num-tokens=123")
    commands = WorkerCommands(settings, Path("/m"), tmp_path, "ipc:///x", "t", plan.workers, plan.engines)

    def worker(role):
        return load_settings(WorkerSettings, commands.spec(plan.workers[0].worker_id, role).argv[4:])

    assert (worker(Role.PREFILL).role, worker(Role.PREFILL).engine_role) == ("prefill", None)
    assert (worker(Role.DECODE).role, worker(Role.DECODE).engine_role) == ("decode", "prefill")
    assert worker(Role.DECODE).prefill.max_num_tokens == 123


def test_what_the_plan_tells():
    settings, plan = planned("--mode=disagg", "--decode.max-seq-len=4096", "--transfer=nixl")
    text = describe_plan(settings, plan)
    assert "#   KV moves by tensorrt_llm itself" in text
    assert "#   decode-0   role decode, engine tensorrt_llm, on GPU 1" in text
    prefill, decode = text.split("# tensorrt_llm of a worker with role ")[1:]
    assert "#   disable_overlap_scheduler: true" in prefill and "disable_overlap_scheduler" not in decode
    assert '"backend": "NIXL"' in prefill and "#   max_seq_len: 4096" in decode
    assert "TLLM_WORKER_USE_SINGLE_PROCESS=1" in decode and "environment without SLURM_JOBID" in decode


def test_a_file_for_an_older_tensorrt_llm_is_understood(tmp_path):
    """As NVIDIA Dynamo's examples of early 2025 had them."""
    path = tmp_path / "agg_llm_api_config.yaml"
    path.write_text(
        """
        backend: pytorch
        tensor_parallel_size: 4
        moe_expert_parallel_size: 4
        max_batch_size: 256
        kv_cache_config: {free_gpu_memory_fraction: 0.85}
        pytorch_backend_config:
          use_cuda_graph: true
          cuda_graph_padding_enabled: true
          cuda_graph_batch_sizes: [1, 256]
          enable_overlap_scheduler: true
          kv_cache_dtype: fp8
        """
    )
    settings, plan = planned("--extra-llm-api-options", str(path), "--workers=2")
    arguments = plan.engines[Role.AGG].arguments
    assert arguments["cuda_graph_config"] == {"enable_padding": True, "batch_sizes": [1, 256]}
    assert (arguments["max_batch_size"], arguments["disable_overlap_scheduler"]) == (256, False)
    cache = {"dtype": "fp8", "free_gpu_memory_fraction": 0.85, "tokens_per_block": 16}
    assert cache.items() <= arguments["kv_cache_config"].items()
    text = describe_plan(settings, plan)
    assert f"#   note: {path}: kv_cache_dtype is kv_cache_config.dtype now" in text
    assert "#   agg-1   role agg, engine tensorrt_llm, on GPUs 4,5,6,7" in text


@pytest.mark.parametrize(("variable", "backend"), [("UCX", "UCX"), ("NIXL", "NIXL")])
def test_the_examples_variables_choose_how_kv_moves(monkeypatch, variable, backend):
    monkeypatch.setenv(f"TRTLLM_USE_{variable}_KVCACHE", "1")
    _, plan = planned("--mode=disagg")
    assert {engine.arguments["cache_transceiver_config"]["backend"] for engine in plan.engines.values()} == {backend}


def test_every_role_with_a_problem_is_named():
    with pytest.raises(PluginError) as caught:
        planned("--mode=disagg", "--engine-options", "llm_args={max_beam_width: 4}")
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        *("engine tensorrt_llm cannot run as prefill", "  max_beam_width 4"),
        *("engine tensorrt_llm cannot run as decode", "  max_beam_width 4"),
    ]


def test_roles_that_do_not_go_together():
    with pytest.raises(PluginError, match="the prefill and decode workers of engine tensorrt_llm do not go together"):
        planned("--mode=disagg", "--decode.engine-options", "transceiver_backend=NIXL")


def test_a_worker_of_several_nodes_is_started_by_hand():
    several = ("--tp-size=16", "--engine-options", "gpus_per_node=8")
    with pytest.raises(SettingsError, match=r"--workers: a worker of 16 GPUs on 2 nodes is started by hand"):
        planned(*several)
    settings, plan = planned(*several, "--workers=0")
    assert plan.workers == () and "#   by hand: a worker of 16 GPUs on 2 nodes" in describe_plan(settings, plan)


def test_what_is_not_there_stops_a_start_and_not_a_dry_run(monkeypatch):
    manager = PluginManager()
    monkeypatch.setattr(manager, "missing", lambda kind, name: "buy TensorRT" if kind == "engine" else None)
    settings, _ = planned()
    assert "#   buy TensorRT" in describe_plan(settings, make_plan(settings, manager))
    real = settings.model_copy(update={"dry_run": False})
    with pytest.raises(PluginError, match="buy TensorRT"):
        make_plan(real, manager)
    # Where no worker starts here, nothing is needed here.
    by_hand = real.model_copy(update={"workers": 0, "worker_token_file": Path(__file__)})
    assert make_plan(by_hand, manager).workers == ()


def test_an_engine_that_moves_kv_needs_no_transfer_of_ours(monkeypatch):
    manager = PluginManager()
    monkeypatch.setattr(manager, "missing", lambda kind, name: f"no {name}" if kind == "transfer" else None)
    settings, _ = planned("--mode=disagg", "--transfer=nixl")
    assert make_plan(settings, manager).warnings == ()
    assert make_plan(settings.model_copy(update={"engine": "sim"}), manager).warnings == ("no nixl",)
