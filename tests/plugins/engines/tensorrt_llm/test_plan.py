"""What a TensorRT-LLM worker's process needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from trtserve.plugins.api import EngineConfig, PlanRefused, Role
from trtserve.plugins.engines.tensorrt_llm.options import TensorRTLLMOptions
from trtserve.plugins.engines.tensorrt_llm.plan import SLURM_VARIABLES, plan_worker

DOCS = Path(__file__).parents[4] / "docs" / "profiles.md"


def plan(role=Role.AGG, **options):
    return plan_worker(EngineConfig("/m", role, block_size=32, options=options))


@pytest.mark.parametrize(
    ("options", "environment"),
    [
        ({}, {"TLLM_WORKER_USE_SINGLE_PROCESS": "1"}),
        ({"single_process": False}, {"TLLM_WORKER_USE_SINGLE_PROCESS": "0"}),
        ({"tensor_parallel_size": 2}, {}),
        ({"tensor_parallel_size": 2, "environment": {"UCX_TLS": "all"}}, {"UCX_TLS": "all"}),
    ],
)
def test_the_environment(options, environment):
    assert plan(**options).environment == environment


def test_sizes_of_the_users_own_arguments_count():
    planned = plan(tensor_parallel_size=2, llm_args={"tensor_parallel_size": 4, "pipeline_parallel_size": 2})
    assert planned.num_gpus == 8 and planned.arguments["tensor_parallel_size"] == 4


def test_an_independent_worker_is_no_step_of_a_job():
    assert plan(tensor_parallel_size=8).unset == SLURM_VARIABLES
    several = plan(tensor_parallel_size=16, gpus_per_node=4)
    assert several.unset == () and several.num_gpus == 16
    assert "srun -N 4 --ntasks-per-node=4 --mpi=pmix trtllm-llmapi-launch trtserve worker" in several.by_hand


@pytest.mark.parametrize("role", Role)
def test_which_roles_move_kv(role):
    assert plan(role).moves_kv is (role is not Role.AGG)


def test_problems_come_as_the_contract_says():
    with pytest.raises(PlanRefused, match="max_beam_width"):
        plan(llm_args={"max_beam_width": 2})


def test_every_option_is_in_the_docs():
    text = DOCS.read_text()
    assert [name for name in TensorRTLLMOptions.model_fields if f"`{name}`" not in text] == []
