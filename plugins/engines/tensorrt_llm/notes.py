"""Risks that TensorRT-LLM's documentation and issues name: told, not refused.

#numbers are issues of NVIDIA/TensorRT-LLM.
"""

from __future__ import annotations

from trtserve.plugins.api import Role
from trtserve.plugins.engines.tensorrt_llm.facts import DEFAULT_MAX_NUM_TOKENS, Facts, Rule


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


def _timeout_of_pipelines(facts: Facts) -> str | None:
    if facts.config.role is not Role.PREFILL or facts.number("pipeline_parallel_size", 1) == 1:
        return None
    return "pipeline parallel prefill: kv_transfer_timeout_ms was never looked at there (#17124)"


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
    longest, tokens = facts.longest_prompt, facts.number("max_num_tokens", DEFAULT_MAX_NUM_TOKENS)
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
    *(_attention_backend, _reuse_while_moving, _no_transfer_timeout, _timeout_of_pipelines),
    *(_ignore_eos, _sampling_with_drafts, _chunks_and_drafts, _guided_decoding, _long_prompts, _moe_tokens, _no_stats),
)
