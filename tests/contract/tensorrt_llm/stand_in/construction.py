"""What the LLM's constructor checks before it loads."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from .engine_settings import EngineSettings
from .environment import Environment
from .model_folder import ModelFolder
from .violations import violated

if TYPE_CHECKING:
    from tensorrt_llm.llmapi.llm_args import TorchLlmArgs


def checked_arguments(class_name: str, keywords: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments that TorchLlmArgs has. ValueError for any other."""
    from tensorrt_llm.llmapi.llm_args import TorchLlmArgs

    for name in keywords:
        if name not in TorchLlmArgs.model_fields and name not in ("_mpi_session", "backend"):
            raise ValueError(f"{class_name} got invalid argument: {name}")
    return keywords


def check_main_is_guarded() -> None:
    """The executor's process imports the main module again, unless it is this very process."""
    if os.environ.get("TLLM_WORKER_USE_SINGLE_PROCESS") == "1":
        return
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    if getattr(main, "__spec__", None) is not None or path is None or not path.endswith(".py"):
        return
    with open(path, encoding="utf-8") as file:
        if "__name__" not in file.read():
            raise violated(f'{path} makes an LLM without an `if __name__ == "__main__":` guard')


def filled_arguments(
    args: TorchLlmArgs, folder: ModelFolder, environment: Environment
) -> tuple[TorchLlmArgs, EngineSettings]:
    """The arguments with no size left None, and what the engine runs by. RuntimeError for too few GPUs."""
    if args.world_size > 1 and environment.devices < min(args.world_size, args.gpus_per_node or args.world_size):
        raise RuntimeError(f"Only {environment.devices} GPUs available, but {args.world_size} GPUs required.")
    max_batch_size = args.max_batch_size or 2048
    max_num_tokens = args.max_num_tokens or 8192
    max_seq_len = args.max_seq_len or folder.max_seq_len
    sizes = {"max_batch_size": max_batch_size, "max_num_tokens": max_num_tokens, "max_seq_len": max_seq_len}
    filled = args.model_copy(update={**sizes, "max_beam_width": args.max_beam_width or 1})
    return filled, EngineSettings(filled, max_batch_size, max_num_tokens, max_seq_len)
