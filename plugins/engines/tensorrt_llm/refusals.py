"""Contradictions that TensorRT-LLM's documentation and issues name, and that trtserve refuses.

#numbers are issues of NVIDIA/TensorRT-LLM.
"""

from __future__ import annotations

from trtserve.plugins.api import Role
from trtserve.plugins.engines.tensorrt_llm.facts import DEFAULT_MAX_NUM_TOKENS, Facts, Rule

_TRANSCEIVERS = ("UCX", "NIXL", "MOONCAKE", "DEFAULT")


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
    tokens = facts.number("max_num_tokens", DEFAULT_MAX_NUM_TOKENS)
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
