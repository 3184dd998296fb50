"""Contradictions that TensorRT-LLM's documentation and issues name, found before anything is loaded.

A rule looks at merged arguments (`LLMArguments.merged`) and gives a sentence or None. #numbers are issues of
NVIDIA/TensorRT-LLM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trtserve.plugins.api import EngineConfig, Role
from trtserve.plugins.engines.tensorrt_llm.options import TensorRTLLMOptions

_DEFAULT_GRAPH_BATCH = 128
_DEFAULT_MAX_NUM_TOKENS = 8192
_TRANSCEIVERS = ("UCX", "NIXL", "MOONCAKE", "DEFAULT")

_WHOLE_NUMBERS = (
    *("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size", "gpus_per_node"),
    *("moe_expert_parallel_size", "moe_tensor_parallel_size", "moe_cluster_parallel_size"),
    *("max_batch_size", "max_num_tokens", "max_seq_len", "max_beam_width"),
)


@dataclass(frozen=True, slots=True)
class Facts:
    """The arguments of one role's engine; what is absent counts as TensorRT-LLM's default."""

    arguments: Mapping[str, Any]
    config: EngineConfig
    options: TensorRTLLMOptions

    def number(self, name: str, default: int) -> int:
        value = self.arguments.get(name)
        return value if isinstance(value, int) else default

    def inner(self, name: str) -> Mapping[str, Any]:
        value = self.arguments.get(name)
        return value if isinstance(value, Mapping) else {}

    @property
    def world_size(self) -> int:
        sizes = ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size")
        product = 1
        for name in sizes:
            product *= self.number(name, 1)
        return product

    @property
    def draft_length(self) -> int:
        """Tokens drafted for each sequence in a pass; 0: no speculation."""
        return draft_length(self.arguments)

    @property
    def largest_graph(self) -> int:
        """Sequences of the largest CUDA graph that can be used; 0: there are none."""
        graphs = self.arguments.get("cuda_graph_config", {})
        if not isinstance(graphs, Mapping):
            return 0
        sizes = graphs.get("batch_sizes") or [graphs.get("max_batch_size") or _DEFAULT_GRAPH_BATCH]
        return int(min(max(sizes), self.number("max_batch_size", _DEFAULT_GRAPH_BATCH)))

    @property
    def longest_prompt(self) -> int | None:
        return longest_prompt(self.arguments)

    @property
    def moves_kv(self) -> bool:
        return self.config.role is not Role.AGG


def draft_length(arguments: Mapping[str, Any]) -> int:
    speculation = arguments.get("speculative_config")
    if not isinstance(speculation, Mapping):
        return 0
    length = speculation.get("num_nextn_predict_layers", speculation.get("max_draft_len"))
    return length if isinstance(length, int) else 1


def longest_prompt(arguments: Mapping[str, Any]) -> int | None:
    longest = arguments.get("max_seq_len")
    return longest - 1 if isinstance(longest, int) else None


Rule = Callable[[Facts], str | None]


def check_role(facts: Facts) -> tuple[list[str], list[str]]:
    """Problems and notes about one role's engine."""
    if problems := _wrong_types(facts):
        return problems, []
    return _said(REFUSALS, facts), _said(NOTES, facts)


def _said(rules: tuple[Rule, ...], facts: Facts) -> list[str]:
    return [text for rule in rules if (text := rule(facts)) is not None]


def _wrong_types(facts: Facts) -> list[str]:
    """What the rules calculate with, so they come second."""
    wrong = [
        f"{name}: {value!r} is not a whole number above 0"
        for name in _WHOLE_NUMBERS
        if (value := facts.arguments.get(name)) is not None and not _is_size(name, value)
    ]
    sizes = facts.inner("cuda_graph_config").get("batch_sizes")
    if sizes is not None and not (isinstance(sizes, list) and sizes and all(type(size) is int for size in sizes)):
        wrong.append(f"cuda_graph_config.batch_sizes: {sizes!r} is not a list of whole numbers")
    return wrong


def _is_size(name: str, value: object) -> bool:
    """-1 lets TensorRT-LLM choose how experts are divided."""
    return type(value) is int and (value > 0 or (value == -1 and name.startswith("moe_")))


# ------------------------------------------------------------------ what is refused


def _device(facts: Facts) -> str | None:
    device = facts.config.device
    if device in ("auto", "cuda"):
        return None
    cure = "it needs GPUs" if device == "cpu" else f"give --gpus {device.partition(':')[2]} instead"
    return f"--device {device} is not for TensorRT-LLM: {cure}"


def _block_size(facts: Facts) -> str | None:
    tokens, ours = facts.inner("kv_cache_config").get("tokens_per_block"), facts.config.block_size
    if tokens != ours:
        return f"kv_cache_config.tokens_per_block {tokens} is not --block-size {ours}: say it there alone"
    return None if ours & (ours - 1) == 0 else f"--block-size {ours} is not a power of 2, as TensorRT-LLM wants it"


def _graphs_and_drafts(facts: Facts) -> str | None:
    tokens = facts.number("max_num_tokens", _DEFAULT_MAX_NUM_TOKENS)
    each = facts.draft_length + 1
    needed = facts.largest_graph * each
    if each == 1 or tokens >= needed:
        return None
    return (
        f"max_num_tokens {tokens} is below {needed}, which speculation needs: CUDA graphs of {facts.largest_graph} "
        f"sequences with {each} tokens each; raise it, or lower cuda_graph_config's batch sizes"
    )


def _graph_sizes(facts: Facts) -> str | None:
    graphs = facts.inner("cuda_graph_config")
    sizes, largest = graphs.get("batch_sizes"), graphs.get("max_batch_size")
    if not sizes or not largest or largest == max(sizes):
        return None
    return f"cuda_graph_config.max_batch_size {largest} is not the largest of its batch_sizes, {max(sizes)}; give one"


def _overlap_on_prefill(facts: Facts) -> str | None:
    if facts.config.role is not Role.PREFILL or facts.arguments.get("disable_overlap_scheduler"):
        return None
    return "disable_overlap_scheduler must be true on prefill workers: TensorRT-LLM up to 1.2 has no overlap there"


def _events_without_reuse(facts: Facts) -> str | None:
    cache = facts.inner("kv_cache_config")
    if not cache.get("event_buffer_max_size") or cache.get("enable_block_reuse", True):
        return None
    return "kv_cache_config.event_buffer_max_size: there are no KV events without enable_block_reuse; set it to 0"


def _transceiver(facts: Facts) -> str | None:
    if not facts.moves_kv:
        return None
    backend = facts.inner("cache_transceiver_config").get("backend")
    if backend in _TRANSCEIVERS:
        return None
    if backend is None:
        return "cache_transceiver_config.backend is null, which turns transfers off; mode disagg needs one"
    if backend == "MPI":
        return "cache_transceiver_config.backend MPI needs all workers in one MPI world, which trtserve's are not"
    return f"KV cannot move by {str(backend).lower()} between TensorRT-LLM engines; --transfer takes auto, ucx or nixl"


def _transceiver_buffer(facts: Facts) -> str | None:
    buffer = facts.inner("cache_transceiver_config").get("max_tokens_in_buffer")
    longest = facts.longest_prompt
    if facts.config.role is not Role.PREFILL or buffer is None or longest is None or buffer >= longest:
        return None
    return f"cache_transceiver_config.max_tokens_in_buffer {buffer} does not hold the longest prompt, {longest} tokens"


def _beams(facts: Facts) -> str | None:
    width = facts.number("max_beam_width", 1)
    return (
        None if width == 1 else f"max_beam_width {width}: trtserve has no beam search, and disaggregation none at all"
    )


def _expert_sizes(facts: Facts) -> str | None:
    tensor = facts.number("tensor_parallel_size", 1)
    experts = facts.number("moe_expert_parallel_size", -1)
    given = {
        "moe_expert_parallel_size": experts,
        "moe_tensor_parallel_size": facts.number("moe_tensor_parallel_size", -1),
        "moe_cluster_parallel_size": facts.number("moe_cluster_parallel_size", -1),
    }
    sizes = {name: size for name, size in given.items() if size > 0}
    product = 1
    for size in sizes.values():
        product *= size
    is_whole = {"moe_expert_parallel_size", "moe_tensor_parallel_size"} <= sizes.keys()
    if product == tensor or (not is_whole and tensor % product == 0):
        return None
    named = " × ".join(f"{name} {size}" for name, size in sizes.items())
    must = "be" if is_whole else "divide"
    return f"{named} must {must} tensor_parallel_size, which is {tensor}"


def _nodes(facts: Facts) -> str | None:
    per_node = facts.number("gpus_per_node", facts.world_size)
    if facts.world_size <= per_node or facts.world_size % per_node == 0:
        return None
    return f"{facts.world_size} GPUs are no whole number of nodes with gpus_per_node {per_node}"


def _attention_dp(facts: Facts) -> str | None:
    if facts.arguments.get("enable_attention_dp"):
        return None
    named = [name for name in ("enable_lm_head_tp_in_adp", "attention_dp_config") if facts.arguments.get(name)]
    return f"{' and '.join(named)} without enable_attention_dp" if named else None


def _single_process(facts: Facts) -> str | None:
    if not facts.options.single_process or facts.world_size == 1:
        return None
    return f"single_process is for one GPU; this worker has {facts.world_size}"


def _speculation(facts: Facts) -> str | None:
    speculation = facts.inner("speculative_config")
    kind = str(speculation.get("decoding_type")).lower()
    if kind in ("medusa", "lookahead"):
        return f"speculative_config.decoding_type {kind}: it is not in the PyTorch backend"
    if kind in ("eagle", "eagle3", "draft_target") and speculation.get("speculative_model") is None:
        return "speculative_config.speculative_model: the draft model's folder or hub id is needed"
    return None


REFUSALS: tuple[Rule, ...] = (
    *(_device, _block_size, _graphs_and_drafts, _graph_sizes, _overlap_on_prefill, _events_without_reuse),
    *(_transceiver, _transceiver_buffer, _beams, _expert_sizes, _nodes, _attention_dp, _single_process, _speculation),
)


# ------------------------------------------------------------------ what someone should know


def _attention_backend(facts: Facts) -> str | None:
    backend = facts.arguments.get("attn_backend", "TRTLLM")
    if not facts.moves_kv or backend == "TRTLLM":
        return None
    return f"attn_backend {backend}: wrong output was seen where tensor_parallel_size differs between roles (#6507)"


def _reuse_while_moving(facts: Facts) -> str | None:
    if not facts.moves_kv or not facts.inner("kv_cache_config").get("enable_block_reuse", True):
        return None
    return (
        "block reuse: 1.2.0rc6 could evict a block before it was sent and hang (#12542); "
        "enable_prefix_caching: false for the role avoids that"
    )


def _no_transfer_timeout(facts: Facts) -> str | None:
    transceiver = facts.inner("cache_transceiver_config")
    if not facts.moves_kv or transceiver.get("kv_transfer_timeout_ms") is not None:
        return None
    return "no kv_transfer_timeout_ms: a transfer that never completes holds its KV for ever (#12476)"


def _ignore_eos(facts: Facts) -> str | None:
    mtp = str(facts.inner("speculative_config").get("decoding_type")).upper() == "MTP"
    return "MTP: requests with ignore_eos draft after the answer's end, where little is accepted" if mtp else None


def _sampling_with_drafts(facts: Facts) -> str | None:
    speculation = facts.inner("speculative_config")
    if not speculation or speculation.get("allow_advanced_sampling"):
        return None
    return (
        "speculation in one model accepts greedily, so temperature and top_p count for little; "
        "speculative_config.allow_advanced_sampling, where this version has it, makes them count"
    )


def _chunks_and_drafts(facts: Facts) -> str | None:
    overlaps = not facts.arguments.get("disable_overlap_scheduler")
    if not (facts.draft_length and facts.arguments.get("enable_chunked_prefill") and overlaps):
        return None
    return "speculation with chunked prefill and the overlap scheduler has failed an assertion (#16101)"


def _guided_decoding(facts: Facts) -> str | None:
    if facts.arguments.get("guided_decoding_backend") is not None:
        return None
    return "no guided_decoding_backend: requests for JSON, a grammar or a regular expression are refused"


def _long_prompts(facts: Facts) -> str | None:
    longest, tokens = facts.longest_prompt, facts.number("max_num_tokens", _DEFAULT_MAX_NUM_TOKENS)
    if facts.arguments.get("enable_chunked_prefill"):
        return None
    if longest is None:
        return f"no chunked prefill: prompts above max_num_tokens {tokens} are refused"
    if longest <= tokens:
        return None
    whose = "prompts that a decode worker has to compute itself" if facts.config.role is Role.DECODE else "prompts"
    return f"no chunked prefill: {whose} are refused above max_num_tokens {tokens}, though max_seq_len is {longest + 1}"


def _moe_tokens(facts: Facts) -> str | None:
    """moe_config.max_num_tokens counts the tokens of all ranks together."""
    tokens = facts.inner("moe_config").get("max_num_tokens")
    ranks = facts.number("moe_expert_parallel_size", 1)
    advised = facts.number("max_batch_size", 1) * ranks
    if not facts.arguments.get("enable_attention_dp") or not isinstance(tokens, int) or tokens >= advised:
        return None
    return f"moe_config.max_num_tokens {tokens} is below max_batch_size × moe_expert_parallel_size, {advised}"


def _no_stats(facts: Facts) -> str | None:
    if facts.arguments.get("enable_iter_perf_stats"):
        return None
    return "enable_iter_perf_stats is off: the router does not learn the engine's own load"


NOTES: tuple[Rule, ...] = (
    *(_attention_backend, _reuse_while_moving, _no_transfer_timeout, _ignore_eos, _sampling_with_drafts),
    *(_chunks_and_drafts, _guided_decoding, _long_prompts, _moe_tokens, _no_stats),
)


# ------------------------------------------------------------------ between roles


def check_roles(roles: Mapping[Role, Mapping[str, Any]]) -> list[str]:
    """What does not go together between the merged arguments of prefill and decode engines."""
    if not {Role.PREFILL, Role.DECODE} <= roles.keys():
        return []
    prefill, decode = roles[Role.PREFILL], roles[Role.DECODE]
    problems = [
        f"{name}: {ours!r} for prefill and {theirs!r} for decode; both must have the same"
        for (name, ours), theirs in zip(_alike(prefill).items(), _alike(decode).values(), strict=True)
        if ours != theirs
    ]
    if prefill.get("pipeline_parallel_size", 1) > 1 and decode.get("tensor_parallel_size", 1) > 1:
        problems.append(
            "pipeline parallel prefill with tensor parallel decode hangs (#14020); use tensor parallel only"
        )
    buffer = decode.get("cache_transceiver_config", {}).get("max_tokens_in_buffer")
    prompts = [longest for side in (prefill, decode) if (longest := longest_prompt(side)) is not None]
    if buffer is not None and prompts and buffer < min(prompts):
        problems.append(
            f"cache_transceiver_config.max_tokens_in_buffer {buffer} of decode does not hold the longest prompt, "
            f"{min(prompts)} tokens"
        )
    return problems


def _alike(arguments: Mapping[str, Any]) -> dict[str, Any]:
    cache = arguments.get("kv_cache_config", {})
    transceiver = arguments.get("cache_transceiver_config", {})
    speculation = arguments.get("speculative_config") or {}
    return {
        "dtype": arguments.get("dtype", "auto"),
        "kv_cache_config.dtype": cache.get("dtype", "auto"),
        "kv_cache_config.tokens_per_block": cache.get("tokens_per_block"),
        "cache_transceiver_config.backend": transceiver.get("backend"),
        "speculative_config.decoding_type": speculation.get("decoding_type"),
        "speculative_config draft length": draft_length(arguments),
    }
