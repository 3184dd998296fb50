"""What settings are called: `-` and `_` are alike, and other servers' names are understood."""

from __future__ import annotations

from collections.abc import Sequence

from trtserve.settings.errors import SettingsError

ALIASES = {
    "max-model-len": "max-seq-len",
    "max-batch-size": "max-num-seqs",
    "max-num-batched-tokens": "max-num-tokens",
    "tokens-per-block": "block-size",
    "kv-block-size": "block-size",
    "engine-option": "engine-options",
    "router-option": "router-options",
    "backend": "engine",
}
"""Other servers' names for the same things, so that a command line can be pasted."""

OPTION_ALIASES = {
    "extra-llm-api-options": "extra_llm_api_options",
    "tensor-parallel-size": "tensor_parallel_size",
    "tp-size": "tensor_parallel_size",
    "pipeline-parallel-size": "pipeline_parallel_size",
    "pp-size": "pipeline_parallel_size",
    "ep-size": "moe_expert_parallel_size",
    "kv-cache-free-gpu-memory-fraction": "kv_cache_free_gpu_memory_fraction",
    "free-gpu-memory-fraction": "kv_cache_free_gpu_memory_fraction",
}
"""Flags of trtllm-serve that are engine options here: `--tp-size 4` is `--engine-options tensor_parallel_size=4`."""

SECRETS = ("api-key", "worker-token")
"""Never accepted as flags: every user of the machine can read a command line."""


def normalise(arguments: Sequence[str]) -> list[str]:
    """`--served_model-name=x` → `--served-model-name=x`, aliases resolved. Raises SettingsError for secrets, and for an
    engine option without a value."""
    flags: list[str] = []
    pending = iter(arguments)
    for argument in pending:
        if argument == "--":
            return [*flags, argument, *pending]
        if not argument.startswith("--"):
            flags.append(argument)
            continue
        name, equals, value = argument[2:].partition("=")
        name = name.replace("_", "-")
        name = ALIASES.get(name, name)
        if name in OPTION_ALIASES:
            value = value if equals else next(pending, "")
            if not value or value.startswith("--"):
                raise SettingsError(f"--{name}: needs a value")
            flags.append(f"--engine-options={OPTION_ALIASES[name]}={value}")
            continue
        if name in SECRETS:
            variable = "TRTSERVE_" + name.replace("-", "_").upper()
            raise SettingsError(f"--{name}: secrets do not belong on a command line; use --{name}-file or {variable}")
        flags.append(f"--{name}{equals}{value}")
    return flags


def field_name(key: str) -> str:
    """The setting that a key of a YAML file names."""
    dashed = key.replace("_", "-")
    return ALIASES.get(dashed, dashed).replace("-", "_")
