"""The simulated engine in real time: a `StepEngine` whose passes last as long as the timing model says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from trtserve.plugins.api import (
    EngineConfig,
    EngineInfo,
    KVLayout,
    KVRows,
    PassStats,
    Request,
    RequestId,
    StepOutputs,
    TokenIds,
    WorkerLoad,
)
from trtserve.plugins.engines.sim.faults import Faults
from trtserve.plugins.engines.sim.limits import read_model_sizes, scheduler_limits
from trtserve.plugins.engines.sim.options import SimOptions
from trtserve.plugins.engines.sim.pacing import Pacer
from trtserve.plugins.engines.sim.prefix_rows import PrefixRows
from trtserve.plugins.engines.sim.scheduler import Scheduler
from trtserve.plugins.engines.sim.speculation import Speculation

MAX_LOGPROBS = 20


class SimEngine:
    """Everything an engine does but the mathematics. `interrupt` may be called by any thread, all else by one.

    It is a `StepEngine` and a `KVStoreEngine`.

    clock: seconds, monotonic. sleep: waits that many seconds, or less once the engine is interrupted.
    """

    def __init__(
        self,
        config: EngineConfig,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self._config = config
        self._options = SimOptions.model_validate(dict(config.options))
        self._interrupted = threading.Event()
        self._sleep = self._interrupted.wait if sleep is None else sleep
        self._pacer = Pacer(self._options.slow_factor / self._options.speedup, clock, self._sleep)
        self._faults = Faults(self._options, hang=self._hang)
        self._scheduler: Scheduler | None = None
        self._prefix_rows: PrefixRows | None = None

    def start(self, progress: Callable[[str], None]) -> EngineInfo:
        """Raises RuntimeError with the option fail_start, ValueError if the limits do not fit together."""
        progress("simulating")
        if self._options.start_s:
            self._sleep(self._options.start_s)
        if self._options.fail_start:
            raise RuntimeError("The simulated engine was told not to start: leave out its option fail_start.")
        config, model = self._config, read_model_sizes(self._config.model_path)
        limits = scheduler_limits(config, model)
        vocab_size = model.vocab_size or self._options.vocab_size
        self._scheduler = Scheduler(
            limits, self._options.timing(), self._options.token_model(vocab_size, config.seed), self._speculation()
        )
        self._prefix_rows = PrefixRows(
            self._scheduler.pool, self._options.row_bytes(limits.block_size), limits.enable_prefix_caching
        )
        return EngineInfo(
            block_size=limits.block_size,
            num_blocks=limits.num_blocks,
            max_num_seqs=limits.max_num_seqs,
            max_num_tokens=limits.max_num_tokens,
            max_seq_len=limits.max_seq_len,
            vocab_size=vocab_size,
            publishes_kv_events=limits.enable_prefix_caching,
            caches_prefixes=limits.enable_prefix_caching,
            max_logprobs=MAX_LOGPROBS,
        )

    def add(self, request: Request) -> None:
        self._started.add(request)
        self._faults.watch(request)

    def abort(self, request_id: RequestId) -> None:
        self._started.abort(request_id)

    def has_work(self) -> bool:
        return self._started.has_work()

    def step(self) -> StepOutputs:
        """Run one pass and wait until its time is over."""
        scheduler = self._started
        began_s = self._pacer.begin()
        self._faults.before_pass(scheduler)
        step = scheduler.run_pass()
        if step.stats is None:
            return step
        duration_s = self._pacer.finish(began_s, step.stats.duration_s)
        stats = step.stats
        lasted = PassStats(duration_s, stats.prefill_tokens, stats.decode_sequences, stats.context_tokens)
        return StepOutputs(step.outputs, step.load, step.events, lasted, step.rank)

    def stats(self) -> WorkerLoad:
        return self._started.load()

    def kv_layout(self) -> KVLayout:
        return self._kv.layout()

    def attach_rows(self, rows: KVRows) -> None:
        """Raises ValueError where the rows are not as `kv_layout` says."""
        self._kv.attach(rows)

    def stored_blocks(self, tokens: TokenIds, cache_salt: str) -> int:
        return self._kv.stored_blocks(tokens, cache_salt)

    def read_kv(self, tokens: TokenIds, cache_salt: str, first_block: int, rows: Sequence[int]) -> int:
        return self._kv.read(tokens, cache_salt, first_block, rows)

    def write_kv(self, tokens: TokenIds, cache_salt: str, first_block: int, rows: Sequence[int]) -> int:
        """Raises WrongKVBytes, and stores nothing, where a row does not hold its block."""
        return self._kv.write(tokens, cache_salt, first_block, rows)

    def interrupt(self) -> None:
        """End the wait of a step under way, a simulated hang included, and every later one."""
        self._interrupted.set()

    def close(self) -> None:
        self.interrupt()

    @property
    def _kv(self) -> PrefixRows:
        if self._prefix_rows is None:
            raise RuntimeError("The simulated engine has no KV before it is started: call start first.")
        return self._prefix_rows

    @property
    def _started(self) -> Scheduler:
        if self._scheduler is None:
            raise RuntimeError("The simulated engine is not started: call start first.")
        return self._scheduler

    def _speculation(self) -> Speculation | None:
        options = self._options
        return Speculation(options.num_draft_tokens, options.acceptance_rate) if options.num_draft_tokens else None

    def _hang(self) -> None:
        self._interrupted.wait()
