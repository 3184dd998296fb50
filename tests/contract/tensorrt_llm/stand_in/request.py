"""One request in the engine: its sequences, its blocks, its way from queued to ended."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

from tensorrt_llm.disaggregated_params import DisaggregatedParams
from tensorrt_llm.executor.result import GenerationResult, Logprob, Response
from tensorrt_llm.sampling_params import SamplingParams

from .block_pool import BlockPool
from .sequence import Sequence


@dataclass(eq=False, slots=True)
class Request:
    id: int
    prompt: list[int]
    sampling: SamplingParams
    streaming: bool
    sequences: list[Sequence]
    result: GenerationResult
    params: DisaggregatedParams | None
    salt: str | None
    rank: int
    return_perf_metrics: bool
    arrival: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    blocks: int = 0
    cached_tokens: int = 0
    prefill_left: int = 0
    is_pulled: bool = True  # False while a generation_only request waits for its KV
    drafts_per_step: int = 0

    @property
    def is_context_only(self) -> bool:
        return self.params is not None and self.params.request_type == "context_only"

    @property
    def is_generation_only(self) -> bool:
        return self.params is not None and self.params.request_type == "generation_only"

    @property
    def has_ended(self) -> bool:
        return all(sequence.finish_reason is not None for sequence in self.sequences)

    def wanted_blocks(self, pool: BlockPool) -> int:
        """For all its life, as GUARANTEED_NO_EVICT books it."""
        longest = len(self.prompt) + max(sequence.max_tokens for sequence in self.sequences)
        return pool.blocks_for(longest) + (len(self.sequences) - 1) * pool.blocks_for(self.sequences[0].max_tokens)

    def cancel(self) -> list[Response]:
        """End what has not ended; one last response for each such sequence."""
        for sequence in self.sequences:
            sequence.finish_reason = sequence.finish_reason or "cancelled"
        return self.reports(1)

    def reports(self, stream_interval: int) -> list[Response]:
        """Responses that are due now, the last of all marked."""
        responses = []
        for sequence in self.sequences:
            if sequence.is_due(self.streaming, stream_interval):
                response = sequence.report()
                response.cached_tokens = self.cached_tokens
                response.prompt_logprobs = self._prompt_logprobs()
                if response.finish_reason is not None and self.return_perf_metrics:
                    response.perf_metrics = self._perf_metrics(sequence)
                responses.append(response)
        if responses and all(sequence.reported for sequence in self.sequences):
            responses[-1].is_final = True
        return responses

    def _prompt_logprobs(self) -> list[dict[int, Logprob]] | None:
        if not self.sampling.prompt_logprobs:
            return None
        return [{token: Logprob(-0.5, 1)} for token in self.prompt]

    def _perf_metrics(self, sequence: Sequence) -> Any:
        now = time.monotonic()
        first = self.first_token or now
        stamps = {"arrival_time": self.arrival, "first_scheduled_time": self.arrival, "first_token_time": first}
        stamps |= {"last_token_time": now, "kv_cache_transfer_start": 0.0, "kv_cache_transfer_end": 0.0}
        drafts = sequence.steps * self.drafts_per_step
        return SimpleNamespace(
            timing_metrics=SimpleNamespace(
                **{name: timedelta(seconds=stamp) for name, stamp in stamps.items()}, kv_cache_size=0
            ),
            kv_cache_metrics=SimpleNamespace(
                num_total_allocated_blocks=self.blocks,
                num_new_allocated_blocks=self.blocks,
                num_reused_blocks=0,
                num_missed_blocks=0,
            ),
            speculative_decoding=SimpleNamespace(
                acceptance_rate=sequence.accepted_drafts / drafts if drafts else 0.0,
                total_accepted_draft_tokens=sequence.accepted_drafts,
                total_draft_tokens=drafts,
            ),
            first_iter=0,
            last_iter=sequence.steps,
        )
