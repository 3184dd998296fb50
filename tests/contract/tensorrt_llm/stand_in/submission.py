"""From `generate_async`'s arguments to a request: every rule that a caller can break, checked before it is enqueued."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from tensorrt_llm.disaggregated_params import DisaggregatedParams, checked
from tensorrt_llm.executor.result import GenerationResult
from tensorrt_llm.sampling_params import SamplingParams
from tensorrt_llm.scheduling_params import SchedulingParams

from .engine import Engine
from .environment import variable
from .model_folder import ModelFolder
from .request import Request
from .sequence import Sequence
from .tokens import TokenStream, bias_entries, digest
from .violations import documented, violated

INPUT_KEYS = {
    "prompt",
    "prompt_token_ids",
    "query_token_ids",
    "multi_modal_data",
    "multi_modal_embeddings",
    "mm_processor_kwargs",
}


class Submissions:
    def __init__(self, engine: Engine, folder: ModelFolder) -> None:
        self._engine = engine
        self._folder = folder
        self._settings = engine.settings

    def request(
        self, result_class: type[GenerationResult], request_id: int, inputs: Any, sampling: SamplingParams | None,
        streaming: bool, params: DisaggregatedParams | None, scheduling: SchedulingParams | None, salt: str | None,
        loop: asyncio.AbstractEventLoop | None,
    ) -> Request:  # fmt: skip
        """Raises what the library raises, and ContractViolation where it would go wrong later."""
        prompt = self._prompt(inputs)
        sampling = self._prepared(SamplingParams() if sampling is None else sampling)
        if params is not None:
            self._check_disaggregation(checked(params), sampling, len(prompt))
        if params is not None and params.request_type == "context_only":
            sampling.max_tokens = 1
        self._check_length(prompt, params)
        rank = self._rank(scheduling)
        result = result_class(
            request_id, prompt, sampling.n, bool(sampling.logprobs), params, loop, self._engine.abort
        )  # fmt: skip
        request = Request(
            request_id, prompt, sampling, streaming, self._sequences(prompt, sampling), result, params, salt, rank,
            sampling.return_perf_metrics, drafts_per_step=self._settings.draft_tokens,
        )  # fmt: skip
        _log(request, scheduling)
        return request

    def _prompt(self, inputs: Any) -> list[int]:
        if isinstance(inputs, dict):
            if inputs.keys() - INPUT_KEYS:
                raise violated(f"inputs has unknown keys: {sorted(inputs.keys() - INPUT_KEYS)}")
            inputs = inputs.get("prompt_token_ids", inputs.get("prompt"))
        if isinstance(inputs, str):
            raise NotImplementedError("the stand-in has no tokenizer: give token ids")
        if type(inputs) is not list or not inputs or any(type(token) is not int for token in inputs):
            raise violated(f"the prompt is no non-empty list of ints but {type(inputs).__name__}")
        if not all(0 <= token < self._folder.vocab_size for token in inputs):
            raise violated(f"the prompt has token ids outside the vocabulary of {self._folder.vocab_size}")
        return inputs

    def _prepared(self, sampling: SamplingParams) -> SamplingParams:
        """Changes the object as the library does: it must not be given again."""
        if not isinstance(sampling, SamplingParams):
            raise documented(TypeError(f"The sampling_params must be SamplingParams, got {type(sampling).__name__}"))
        if sampling._stand_in_used:
            raise violated("a SamplingParams object is used a second time; the first request has changed it")
        sampling._stand_in_used = True
        if sampling.end_id is None:
            if self._settings.args.skip_tokenizer_init:
                raise documented(ValueError("tokenizer is required to reset end_id if it is None, or you can explicitly"
                                            " specify the end_id for sampling_params"))  # fmt: skip
            sampling.end_id = next(iter(sorted(self._folder.end_ids)), -1)
        elif sampling.stop or sampling.bad:
            raise documented(RuntimeError(f"{sampling.stop or sampling.bad} is not processed by tokenizer"))
        if sampling.max_tokens is None or sampling.max_tokens < 1:
            raise violated(f"max_tokens is {sampling.max_tokens}: requests would serialize, or the engine would die")
        if sampling.use_beam_search or (sampling.best_of or 1) != sampling.n:
            raise NotImplementedError("the stand-in has no beam search and no best_of")
        sampling._stream_interval = self._settings.stream_interval
        sampling.return_perf_metrics |= self._settings.args.return_perf_metrics
        return sampling

    def _check_disaggregation(self, params: DisaggregatedParams, sampling: SamplingParams, num_tokens: int) -> None:
        if params.request_type == "context_and_generation":
            return
        if self._engine.disaggregation is None:
            raise violated(f"a {params.request_type} request where cache_transceiver_config.backend is None")
        if sampling.n > 1:
            raise violated(f"a {params.request_type} request with n = {sampling.n}")
        if params.request_type == "context_only" and not self._settings.args.disable_overlap_scheduler:
            raise violated("a context_only request where disable_overlap_scheduler is False")
        self._engine.disaggregation.check(params, num_tokens)

    def _check_length(self, prompt: list[int], params: DisaggregatedParams | None) -> None:
        limit = self._settings.max_num_tokens
        if self._settings.args.enable_chunked_prefill or (params and params.request_type == "generation_only"):
            return
        if len(prompt) > limit:
            raise documented(ValueError(f"The sum of prompt length ({len(prompt)}) and query length (0) should not"
                                        f" exceed max_num_tokens ({limit})"))  # fmt: skip

    def _rank(self, scheduling: SchedulingParams | None) -> int:
        """The attention-DP rank that takes the request: the one asked for if it is not relaxed, else the emptiest."""
        pools = self._engine.pools
        emptiest = min(range(len(pools)), key=lambda rank: pools[rank].used_blocks)
        if scheduling is None or scheduling.attention_dp_rank is None:
            return emptiest
        rank = scheduling.attention_dp_rank
        if not self._settings.args.enable_attention_dp:
            raise violated("attention_dp_rank is given, but attention DP is off")
        if type(rank) is not int or not 0 <= rank < len(pools):
            raise violated(f"attention_dp_rank is {rank!r}, of {len(pools)} ranks")
        return rank if getattr(scheduling, "attention_dp_relax", False) is False else emptiest

    def _sequences(self, prompt: list[int], sampling: SamplingParams) -> list[Sequence]:
        try:
            bias = bias_entries(sampling.embedding_bias, self._folder.vocab_size)
        except (TypeError, ValueError) as error:
            raise violated(f"embedding_bias: {error}") from error
        bias |= dict.fromkeys(sampling.bad_token_ids or (), -1000.0)
        room = max(1, self._settings.max_seq_len - len(prompt))
        max_tokens = min(sampling.max_tokens or 1, room)
        environment, state = self._engine.environment, digest(prompt)
        seed = 0 if sampling._greedy_decoding else sampling.seed or 0
        return [
            Sequence(
                TokenStream(self._folder, environment, state, index, bias, seed=seed), sampling, max_tokens,
                environment.trims_end_token, index,
            )
            for index in range(sampling.n)
        ]  # fmt: skip


def _log(request: Request, scheduling: SchedulingParams | None) -> None:
    """One line for each request, for tests that ask what arrived."""
    path = variable("REQUESTS")
    if not path:
        return
    names = [name for name in SamplingParams.__dataclass_fields__ if not name.startswith("_")]
    given = {name: getattr(request.sampling, name) for name in names if name != "embedding_bias"}
    line = {
        "id": request.id,
        "prompt_token_ids": request.prompt,
        "sampling_params": {name: value for name, value in given.items() if value is not None},
        "embedding_bias": request.sequences[0].stream.bias,
        "request_type": request.params.request_type if request.params else None,
        "streaming": request.streaming,
        "cache_salt": request.salt,
        "attention_dp_rank": request.rank,
        "scheduling_params": repr(scheduling),
    }
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, default=repr) + "\n")
