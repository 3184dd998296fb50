"""The running engine: a model with its cache, queue and sampler, moved on one pass at a time."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from trtserve.plugins.api import (
    FinishReason,
    Output,
    PassStats,
    Request,
    RequestId,
    RequestRefused,
    StepOutputs,
    WorkerLoad,
)
from trtserve.plugins.engines.torch.batch import Scheduled, pack
from trtserve.plugins.engines.torch.decode_rows import DecodeRows
from trtserve.plugins.engines.torch.kv_store import KVStore
from trtserve.plugins.engines.torch.model import Model
from trtserve.plugins.engines.torch.prefix_cache import BlockChain, PrefixCache
from trtserve.plugins.engines.torch.request_checks import check_request
from trtserve.plugins.engines.torch.sampler import Sampled, Sampler
from trtserve.plugins.engines.torch.scheduler import Scheduler
from trtserve.plugins.engines.torch.sequence import Sequence


class Generation:
    """Turns requests into tokens. Holds every request from `add` until the output that ends it."""

    def __init__(
        self,
        model: Model,
        store: KVStore,
        decode_rows: DecodeRows | None,
        cache: PrefixCache,
        scheduler: Scheduler,
        sampler: Sampler,
        max_seq_len: int,
    ) -> None:
        self._model = model
        self.store = store
        self._decode_rows = decode_rows
        self.cache = cache
        self._scheduler = scheduler
        self._sampler = sampler
        self._max_seq_len = max_seq_len
        self._scratch: dict[str, Tensor] = {}
        self._cancelled: list[Output] = []
        self._generated_tokens_total = 0

    def add(self, request: Request) -> None:
        """Queue a request; raises RequestRefused if it can never be served."""
        check_request(request, self._model.vocab_size, self._max_seq_len)
        if self._scheduler.has(request.id):
            raise RequestRefused(f"request id {request.id} is in use: give each request an id of its own")
        chain = BlockChain(self.cache.block_size, request.cache_salt)
        self._scheduler.add(Sequence(request, chain, self._sampler.state(request)))

    def abort(self, request_id: RequestId) -> None:
        """End a request and give back its blocks; the next step reports it. Unknown ids are ignored."""
        sequence = self._scheduler.remove(request_id)
        if sequence is not None:
            self._cancelled.append(_output(sequence, FinishReason.CANCELLED))

    def has_work(self) -> bool:
        """Whether a sequence or something to report is left."""
        waits = self._scheduler.num_running or self._scheduler.num_waiting
        return bool(waits or self._cancelled or self.cache.has_events)

    @torch.inference_mode()
    def step(self) -> StepOutputs:
        """Run one pass and report it, with all requests that were aborted since the last one."""
        outputs, self._cancelled = self._cancelled, []
        begin = time.perf_counter()
        work = self._scheduler.schedule()
        stats = None
        if work:
            counts = _pass_counts(work)
            outputs += self._run(work)
            stats = PassStats(time.perf_counter() - begin, *counts)
        return StepOutputs(outputs, self.stats(), self.cache.take_events(), stats)

    def stats(self) -> WorkerLoad:
        """The load right now."""
        scheduler = self._scheduler
        return WorkerLoad(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            free_blocks=self.cache.pool.num_free,
            prompt_tokens_total=scheduler.prompt_tokens_total,
            cached_tokens_total=scheduler.cached_tokens_total,
            generated_tokens_total=self._generated_tokens_total,
            preemptions_total=scheduler.preemptions_total,
        )

    def _run(self, work: list[Scheduled]) -> list[Output]:
        batch = pack(work, self.store, self._scratch, self._decode_rows)
        logits = self._model.forward(batch.input_ids, batch.position_ids, batch.rows_to_keep, batch.paged)
        batch.paged.finish()
        sampled: list[Sampled] = []
        if batch.sampled:
            sampled = self._sampler.sample(logits, [sequence.sampling for sequence in batch.sampled])
        broken = {sequence for sequence, result in zip(batch.sampled, sampled, strict=True) if result.is_broken}
        # keys and values of a broken sequence must not become somebody's prefix
        self._scheduler.complete([item for item in work if item.sequence not in broken])
        return [self._advance(sequence, result) for sequence, result in zip(batch.sampled, sampled, strict=True)]

    def _advance(self, sequence: Sequence, result: Sampled) -> Output:
        """Append a token, and end the sequence if that was its last."""
        if result.is_broken:
            return self._fail(sequence)
        sequence.tokens.append(result.token_id)
        self._generated_tokens_total += 1
        reason = self._finish_reason(sequence, result.token_id)
        if reason is not None:
            self._scheduler.remove(sequence.request.id)
        return _output(sequence, reason, result)

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        sampling = sequence.request.sampling
        if token_id in sampling.stop_token_ids:
            return FinishReason.STOP
        if token_id in sequence.request.eos_token_ids and not sampling.ignore_eos:
            return FinishReason.STOP
        if sequence.num_generated >= sampling.max_tokens or len(sequence.tokens) >= self._max_seq_len:
            return FinishReason.LENGTH
        return None

    def _fail(self, sequence: Sequence) -> Output:
        # numbers that are not finite would reach whoever gets these blocks next, through their unused slots
        self.store.clear_blocks(self.cache.discard(sequence.block_ids))
        if self._decode_rows is not None:
            self._decode_rows.forget(sequence.block_ids)
        self._scheduler.remove(sequence.request.id)
        return _output(
            sequence,
            FinishReason.ERROR,
            error="the model gave no finite probabilities for this request: try again, or with a shorter prompt",
        )


def _output(
    sequence: Sequence, reason: FinishReason | None, result: Sampled | None = None, error: str | None = None
) -> Output:
    token_id = None if result is None else result.token_id
    cached_tokens = None if sequence.has_reported else sequence.cached_tokens
    sequence.has_reported = True
    return Output(
        request_id=sequence.request.id,
        token_ids=() if token_id is None else (token_id,),
        finish_reason=reason,
        stop_token_id=token_id if reason is FinishReason.STOP else None,
        cached_tokens=cached_tokens,
        logprobs=None if result is None or result.logprob is None else (result.logprob,),
        error=error,
    )


def _pass_counts(work: list[Scheduled]) -> tuple[int, int, int]:
    """Tokens in prefill, sequences that decode, and tokens which those read. Call before the pass moves them on."""
    decodes = [item.sequence for item in work if item.count == 1 and item.sequence.num_generated]
    prefill_tokens = sum(item.count for item in work) - len(decodes)
    return prefill_tokens, len(decodes), sum(sequence.num_computed + 1 for sequence in decodes)
