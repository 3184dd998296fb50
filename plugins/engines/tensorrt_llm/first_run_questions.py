"""The questions that only a GPU can answer, each a function that asks and says what it saw.

Numbers 1 to 8 are the open questions of docs/first_gpu_run.md in its order, the others follow from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

PROMPT = [11 + (37 * position) % 200 for position in range(70)]
GREEDY: Mapping[str, Any] = {"top_k": 1, "ignore_eos": True}
EXPECTED_STATS = {
    "": ("iter", "iterLatencyMS", "numActiveRequests", "numQueuedRequests"),
    "kvCacheStats": ("maxNumBlocks", "freeNumBlocks", "usedNumBlocks", "tokensPerBlock", "cacheHitRate"),
    "inflightBatchingStats": ("numContextRequests", "numGenRequests", "numPausedRequests"),
}


class Ask(Protocol):
    """Gives a side a command and returns its answer; raises SideError for an error and for a side that died."""

    def __call__(self, do: str, **arguments: Any) -> Any: ...


class SideError(RuntimeError):
    """A side answered with an error, was silent too long, or ended."""


def disaggregated_fields(prefill: Ask, decode: Ask) -> dict[str, Any]:
    """1. Which fields DisaggregatedParams has, disagg_request_id among them or not; and the other names."""
    described: dict[str, Any] = prefill("describe")
    described["has_disagg_request_id"] = "disagg_request_id" in described["fields"]["DisaggregatedParams"]
    return described


def first_token_in_decode(prefill: Ask, decode: Ask) -> dict[str, Any]:
    """2. Whether the decode's stream repeats the token that the prefill sampled."""
    whole = _tokens(decode("generate", prompt=PROMPT, sampling=dict(GREEDY)))
    handed = _prefilled(prefill)
    steps = decode(
        "generate", prompt=PROMPT, sampling=dict(GREEDY), streaming=True,
        disaggregated={**handed, "request_type": "generation_only"},
    )["steps"]  # fmt: skip
    by_diffs = [token for step in steps for token in step[0]["token_ids_diff"]]
    return {
        "first_gen_tokens": handed["first_gen_tokens"],
        "aggregated": whole,
        "token_ids_at_the_end": steps[-1][0]["token_ids"],
        "token_ids_repeat_it": steps[-1][0]["token_ids"] == whole,
        "token_ids_diff_repeat_it": by_diffs == whole,
        "first_steps": [step[0]["token_ids_diff"] for step in steps[:3]],
    }


def sampling_parameters(prefill: Ask, decode: Ask) -> dict[str, Any]:
    """3. Which sampling parameters change what is sampled as they must. None: this prompt could not tell."""

    def sampled(**fields: Any) -> list[int]:
        bias = fields.pop("bias", None)
        return _tokens(decode("generate", prompt=PROMPT, sampling={**GREEDY, **fields}, bias=bias))

    greedy = sampled()
    hot = {"top_k": None, "temperature": 5.0}
    heats = sampled(**hot, seed=1) != greedy
    repeats = len(set(greedy)) < len(greedy)
    return {
        "greedy_is_stable": sampled() == greedy,
        "temperature": heats,
        "seed": sampled(**hot, seed=1) == sampled(**hot, seed=1) != sampled(**hot, seed=2) if heats else None,
        "top_p": sampled(**hot, top_p=1e-6, seed=1) == greedy if heats else None,
        "min_p": sampled(**hot, min_p=0.9999, seed=1) == greedy if heats else None,
        "bad_token_ids": greedy[0] not in sampled(bad_token_ids=[greedy[0]]),
        "embedding_bias": set(sampled(bias={"42": 1000.0})) == {42},
        "no_repeat_ngram_size": _no_repeats(sampled(no_repeat_ngram_size=1)) if repeats else None,
        "repetition_penalty": sampled(repetition_penalty=5.0) != greedy if repeats else None,
        "presence_penalty": sampled(presence_penalty=2.0) != greedy if repeats else None,
        "frequency_penalty": sampled(frequency_penalty=2.0) != greedy if repeats else None,
        "stop_token_ids": len(sampled(stop_token_ids=[greedy[3]])) <= 3,
        "max_tokens": len(sampled(max_tokens=3)) == 3,
    }


def statistics_names(prefill: Ask, decode: Ask) -> dict[str, Any]:
    """4. The names in an iteration's statistics, and which of those that are read are not there."""
    decode("generate", prompt=PROMPT, sampling=dict(GREEDY))
    items = decode("stats", timeout_s=1.0)
    last = items[-1] if items else {}
    missing = [
        f"{block}.{name}".lstrip(".")
        for block, names in EXPECTED_STATS.items()
        for name in names
        if name not in (last.get(block) or {} if block else last)
    ]
    return {"iterations": len(items), "missing": missing, "last": last}


def abort_in_transfer(prefill: Ask, decode: Ask) -> dict[str, Any]:
    """5. Whether a context_only request may be aborted while its KV waits to be pulled. Asked last: it may kill."""
    _prefilled(prefill)
    try:
        healthy = prefill("abort_last")
        after = _tokens(prefill("generate", prompt=PROMPT[:40], sampling=dict(GREEDY)))
    except SideError as error:
        return {"safe": False, "what": str(error)}
    return {"safe": healthy and bool(after), "healthy": healthy}


def events_without_requests(prefill: Ask, decode: Ask) -> dict[str, Any]:
    """6. What get_kv_cache_events_async does when no request comes for longer than its timeout."""
    fresh = [token + 1 for token in PROMPT]
    decode("generate", prompt=fresh, sampling=dict(GREEDY))
    first, again = decode("events", timeout_s=1.0), decode("events", timeout_s=1.0)
    decode("generate", prompt=[token + 1 for token in fresh], sampling=dict(GREEDY))
    later = decode("events", timeout_s=1.0)
    return {
        "events_after_a_request": len(first["events"]),
        "ended_after_s": first["took_s"],
        "then_ended_after_s": again["took_s"],
        "then_events": len(again["events"]),
        "after_a_new_request": len(later["events"]),
        "sample": first["events"][-1:],
    }


def parsers(prefill: Ask, decode: Ask) -> dict[str, Any]:
    """7. Which tool and reasoning parsers trtllm-serve has."""
    found: dict[str, Any] = prefill("parsers")
    return found


def relaxed_ranks(prefill: Ask, decode: Ask) -> dict[str, Any]:
    """8. The default of attention_dp_relax."""
    return {"attention_dp_relax": prefill("describe")["fields"]["SchedulingParams"].get("attention_dp_relax")}


def end_token_in_output(prefill: Ask, decode: Ask) -> dict[str, Any]:
    """9. Whether token_ids end with the end token, when that ended them."""
    end = prefill("describe")["end_id"]
    output = decode("generate", prompt=PROMPT, bias={str(end): 1000.0}, sampling={"top_k": 1})["steps"][-1][0]
    return {"end_id": end, "kept": output["token_ids"] == [end], **output}


def early_ends(prefill: Ask, decode: Ask) -> dict[str, Any]:
    """10. With n > 1: whether a sequence that ends before another one tells its finish reason, and when."""
    sampling = {"n": 4, "temperature": 1.0, "top_p": 1.0, "max_tokens": 200, "seed": 3}
    steps = decode("generate", prompt=PROMPT, sampling=sampling, streaming=True)["steps"]
    early = [output["finish_reason"] for step in steps[:-1] for output in step]
    return {
        "finish_reasons_at_the_end": [output["finish_reason"] for output in steps[-1]],
        "lengths": [len(output["token_ids"]) for output in steps[-1]],
        "told_before_the_end": any(reason is not None for reason in early),
    }


def merging(prefill: Ask, decode: Ask) -> dict[str, Any]:
    """11. Whether update_llm_args_with_extra_dict merges inside of kv_cache_config."""
    merged: dict[str, Any] = prefill("merging")
    return {**merged, "deep": "dtype" in merged["kv_cache_config"]}


def logprobs(prefill: Ask, decode: Ask) -> dict[str, Any]:
    """12. How many log probabilities a token has for logprobs = 1, 2, 5."""
    counts = {}
    for asked in (1, 2, 5):
        step = decode("generate", prompt=PROMPT, sampling={**GREEDY, "logprobs": asked, "max_tokens": 3})["steps"][-1][
            0
        ]
        counts[str(asked)] = step["num_logprobs"]
    return counts


QUESTIONS: tuple[Callable[[Ask, Ask], dict[str, Any]], ...] = (
    disaggregated_fields, relaxed_ranks, parsers, merging, statistics_names, events_without_requests,
    end_token_in_output, early_ends, logprobs, sampling_parameters, first_token_in_decode, abort_in_transfer,
)  # fmt: skip
"""In the order they are asked: what may kill comes last."""


def _prefilled(prefill: Ask) -> dict[str, Any]:
    asked = {"request_type": "context_only"}
    output = prefill("generate", prompt=PROMPT, sampling=dict(GREEDY), disaggregated=asked)["steps"][-1][0]
    if "disaggregated" not in output:
        raise SideError(f"the prefill gave no disaggregated_params: {output}")
    handed: dict[str, Any] = output["disaggregated"]
    return handed


def _tokens(answer: Mapping[str, Any]) -> list[int]:
    tokens: list[int] = answer["steps"][-1][0]["token_ids"]
    return tokens


def _no_repeats(tokens: list[int]) -> bool:
    return len(set(tokens)) == len(tokens)
