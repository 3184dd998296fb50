"""What a TensorRT-LLM worker needs of its process: GPUs, nodes, environment. Pure; the server calls it, and so does a
worker that was started by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trtserve.plugins.api import EngineConfig, EnginePlan, Role
from trtserve.plugins.engines.tensorrt_llm.arguments import llm_arguments
from trtserve.plugins.engines.tensorrt_llm.facts import Facts
from trtserve.plugins.engines.tensorrt_llm.options import TensorRTLLMOptions

SLURM_VARIABLES = ("SLURM_JOBID", "SLURM_JOB_ID", "SLURM_NODELIST")
"""With these MPI takes a worker for a step of the job that the server runs in, and finds no room to start its ranks
(ai-dynamo/dynamo#992)."""

SINGLE_PROCESS = "TLLM_WORKER_USE_SINGLE_PROCESS"


def plan_worker(config: EngineConfig) -> EnginePlan:
    """Raises ArgumentsError (a PlanRefused) naming every problem."""
    options = TensorRTLLMOptions.model_validate(dict(config.options))
    arguments = llm_arguments(config, options)
    merged = arguments.merged()
    facts = Facts(merged, config, options)
    nodes = facts.world_size // min(facts.world_size, facts.number("gpus_per_node", facts.world_size))
    return EnginePlan(
        num_gpus=facts.world_size,
        environment=_environment(options, facts.world_size),
        # A worker of several nodes is a step of a job, and belongs to it.
        unset=SLURM_VARIABLES if nodes == 1 else (),
        arguments=merged,
        notes=arguments.notes,
        moves_kv=config.role is not Role.AGG,
        by_hand="" if nodes == 1 else _by_hand(config.role, facts.world_size, nodes),
    )


def _environment(options: TensorRTLLMOptions, world_size: int) -> Mapping[str, str]:
    environment: dict[str, Any] = {}
    if options.single_process is not None or world_size == 1:
        environment[SINGLE_PROCESS] = "0" if options.single_process is False else "1"
    return environment | options.environment


def _by_hand(role: Role, world_size: int, nodes: int) -> str:
    return (
        f"a worker of {world_size} GPUs on {nodes} nodes is started by hand, and this count is 0: srun -N {nodes} "
        f"--ntasks-per-node={world_size // nodes} --mpi=pmix trtllm-llmapi-launch trtserve worker --config PROFILE "
        f"--connect tcp://SERVER:PORT --worker-id {role}-a --role {role}"
    )
