"""The look-up of our names in TensorRT-LLM: in the stand-in, and in a miniature checkout without its libraries."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

STAND_IN = Path(__file__).parents[3] / "contract"

ARGUMENTS = """
from enum import EnumMeta
from typing import Any, ClassVar, Dict, List, Literal, Optional, TypeAlias, Union

import torch
from pydantic import Field as PydanticField
from strenum import StrEnum
from transformers import PreTrainedTokenizerBase

from tensorrt_llm.lora_helper import LoraConfig
from .._utils import mpi_rank
from ..bindings.executor import KvCacheConfig as _KvCacheConfig, SchedulerPolicy as _SchedulerPolicy
from ..logger import logger
from ..sampling_params import SamplingParams
from .utils import StrictBaseModel, generate_api_docs_as_docstring, get_type_repr


def Field(default=..., *, status=None, **keywords):
    return PydanticField(default, **keywords)


def mirrors(native):
    assert not [name for name in dir(native) if not name.startswith("_") and not callable(getattr(native, name))]
    return lambda cls: cls


@mirrors(_SchedulerPolicy)
class SchedulerPolicy(StrEnum):
    STATIC = "STATIC"


@mirrors(_KvCacheConfig)
class KvCacheConfig(StrictBaseModel):
    enable_block_reuse: bool = True
    max_tokens: Optional[int] = None
    free_gpu_memory_fraction: float = Field(0.9, ge=0, le=1)
    event_buffer_max_size: int = 0
    dtype: str = "auto"
    tokens_per_block: int = 32


class CacheTransceiverConfig(StrictBaseModel):
    backend: Optional[Literal["DEFAULT", "UCX", "NIXL"]] = None
    max_tokens_in_buffer: Optional[int] = None
    kv_transfer_timeout_ms: Optional[int] = Field(None, gt=0)


class CudaGraphConfig(StrictBaseModel):
    batch_sizes: Optional[List[int]] = None
    max_batch_size: int = 0
    enable_padding: bool = False


class MoeConfig(StrictBaseModel):
    backend: str = "CUTLASS"
    max_num_tokens: Optional[int] = None
    load_balancer: Optional[Union[object, str]] = None
    use_low_precision_moe_combine: bool = False


class DecodingBaseConfig(StrictBaseModel):
    max_draft_len: Optional[int] = None
    speculative_model: Optional[str] = None

    @classmethod
    def from_dict(cls, data):
        kinds = {kind.decoding_type: kind for kind in (EagleDecodingConfig, MTPDecodingConfig)}
        return kinds[data.pop("decoding_type")](**data)


class EagleDecodingConfig(DecodingBaseConfig):
    decoding_type: ClassVar[str] = "Eagle"


class MTPDecodingConfig(DecodingBaseConfig):
    num_nextn_predict_layers: int = 1
    decoding_type: ClassVar[str] = "MTP"


SpeculativeConfig: TypeAlias = Optional[Union[EagleDecodingConfig, MTPDecodingConfig]]


class BaseLlmArgs(StrictBaseModel):
    model: str
    tokenizer: Optional[PreTrainedTokenizerBase] = None
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    tensor_parallel_size: int = 1
    dtype: str = "auto"
    pipeline_parallel_size: int = 1
    gpus_per_node: Optional[int] = None
    moe_expert_parallel_size: Optional[int] = None
    enable_attention_dp: bool = False
    enable_lm_head_tp_in_adp: bool = False
    lora_config: Optional[LoraConfig] = None
    kv_cache_config: KvCacheConfig = Field(default_factory=KvCacheConfig)
    enable_chunked_prefill: bool = False
    guided_decoding_backend: Optional[Literal["xgrammar", "llguidance"]] = None
    cache_transceiver_config: Optional["CacheTransceiverConfig"] = None
    speculative_config: SpeculativeConfig = None
    max_batch_size: Optional[int] = None
    max_num_tokens: Optional[int] = 8192
    max_seq_len: Optional[int] = None
    mpi_session: Optional[object] = Field(default=None, alias="_mpi_session")


class TorchLlmArgs(BaseLlmArgs):
    cuda_graph_config: Optional[CudaGraphConfig] = Field(default_factory=CudaGraphConfig)
    disable_overlap_scheduler: bool = False
    moe_config: MoeConfig = Field(default_factory=MoeConfig)
    enable_iter_perf_stats: bool = False
    print_iter_log: bool = False
    stream_interval: int = 1


def update_llm_args_with_extra_dict(llm_args: Dict, llm_args_dict: Dict, extra_llm_api_options=None) -> Dict:
    if "speculative_config" in llm_args_dict:
        llm_args_dict["speculative_config"] = DecodingBaseConfig.from_dict(llm_args_dict["speculative_config"])
        logger.warning("overriding")
    return llm_args | llm_args_dict


DOCSTRING = generate_api_docs_as_docstring(TorchLlmArgs, indent=4)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose llm_args is the text above and whose other files are the stand-in's."""
    shutil.copytree(STAND_IN / "tensorrt_llm", tmp_path / "tensorrt_llm", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tensorrt_llm/llmapi/llm_args.py").write_text(ARGUMENTS)
    (tmp_path / "tensorrt_llm/version.py").write_text('__version__ = "9.9"\n')
    return tmp_path


def check(*arguments: str, path: Path | None = None) -> tuple[int, str]:
    """Exit code and output, in a process of its own: the check changes what `import` finds."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, "-m", "trtserve.plugins.engines.tensorrt_llm.check_api", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50, check=False)
    return done.returncode, done.stdout + done.stderr


def edit(checkout: Path, file: str, old: str, new: str) -> None:
    path = checkout / "tensorrt_llm" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_nothing_to_look_at(tmp_path):
    assert check() == (3, "no TensorRT-LLM is installed\n")
    assert check("--source", str(tmp_path)) == (3, f"no TensorRT-LLM at {tmp_path}\n")


def test_the_stand_in_has_every_name():
    code, output = check(path=STAND_IN)
    assert (code, [line for line in output.splitlines()[1:] if not line.startswith("ok ")]) == (0, []), output
    assert "deepseek_r1/wide_ep_disagg decode" in output


def test_a_checkout_without_libraries(checkout):
    code, output = check("--source", str(checkout))
    assert (code, [line for line in output.splitlines()[1:] if not line.startswith("ok ")]) == (0, []), output
    assert output.startswith("TensorRT-LLM 9.9 in ")


def test_a_later_version_that_converts_more_by_itself(checkout):
    """Blocks are merged and made objects, and pydantic chooses the kind of speculation."""
    file = "llmapi/llm_args.py"
    for kind in ("Eagle", "MTP"):
        edit(checkout, file, f'decoding_type: ClassVar[str] = "{kind}"', f'decoding_type: Literal["{kind}"] = "{kind}"')
    union = "Union[EagleDecodingConfig, MTPDecodingConfig]"
    edit(checkout, file, f"Optional[{union}]", f'Optional[Annotated[{union}, Field(discriminator="decoding_type")]]')
    edit(checkout, file, "import Any, ", "import Annotated, Any, ")
    edit(checkout, file, "num_nextn_predict_layers: int = 1", "num_nextn_predict_layers: int = Field(1, init=False)")
    edit(checkout, file, 'if "speculative_config" in', 'if "absent" in')
    merging = 'KvCacheConfig(**llm_args["kv_cache_config"] | llm_args_dict.get("kv_cache_config", {}))'
    edit(checkout, file, "llm_args | llm_args_dict", f'llm_args | llm_args_dict | {{"kv_cache_config": {merging}}}')
    code, output = check("--source", str(checkout))
    assert (code, [line for line in output.splitlines()[1:] if not line.startswith("ok ")]) == (0, []), output


def test_what_is_missing_is_named(checkout):
    edit(checkout, "llmapi/llm_args.py", "    tokens_per_block: int", "    block_size: int")
    edit(checkout, "llmapi/llm_args.py", "    num_nextn_predict_layers: int", "    next_n: int")
    edit(checkout, "llmapi/llm_args.py", "    enable_iter_perf_stats: bool", "    iter_stats: bool")
    edit(checkout, "llmapi/llm.py", "cache_salt: ", "salt: ")
    edit(checkout, "scheduling_params.py", "attention_dp_relax", "relax")
    edit(checkout, "executor/utils.py", "class RequestError", "class OneRequestError")
    edit(checkout, "_utils.py", '"parent_hash"', '"parent"')
    edit(checkout, "executor/result.py", "    stop_reason: int | str | None = None\n", "")
    code, output = check("--source", str(checkout))
    rows = {line[9:].split("  ")[0].strip(): line.rpartition("  ")[2].strip() for line in output.splitlines()[1:]}
    assert code == 1
    assert rows["agg agg"] == "enable_iter_perf_stats; kv_cache_config.tokens_per_block"
    assert "speculative_config.num_nextn_predict_layers" in rows["deepseek_r1/mtp_agg agg"]
    assert rows["LLM.generate_async"].endswith("; without cache_salt, which the engine looks for first")
    assert rows["SchedulingParams"] == "attention_dp_relax"
    assert rows["KV events"] == "parent_hash"
    assert rows["CompletionOutput"] == "stop_reason"
    assert "missing  executor.utils.RequestError" in output


def test_a_refused_value_is_told(checkout):
    edit(checkout, "llmapi/llm_args.py", '"UCX", ', "")
    edit(checkout, "llmapi/llm_args.py", '"Eagle"', '"Eagle4"')
    code, output = check("--source", str(checkout))
    assert code == 1
    assert "refused  disagg decode" in output and "cache_transceiver_config: " in output
    assert "decoding_type = Eagle" in output


def test_names_are_looked_up_where_values_cannot_be(checkout):
    edit(checkout, "llmapi/llm_args.py", "import torch\n", "import torch\nraise RuntimeError('no driver')\n")
    code, output = check("--source", str(checkout))
    assert code == 0
    assert "skipped  argument values" in output and "RuntimeError: no driver" in output
