"""The simulated engine as a replay needs it: its scheduler without a clock, with tokens that cost nothing to make."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from trtserve.plugins.api import (
    EngineConfig,
    EngineInfo,
    PassStats,
    Request,
    RequestId,
    SamplingParams,
    TokenIds,
    TokenLogprob,
)
from trtserve.plugins.engines.sim.limits import ModelSizes, SchedulerLimits, scheduler_limits
from trtserve.plugins.engines.sim.options import SimOptions
from trtserve.plugins.engines.sim.scheduler import Scheduler
from trtserve.plugins.engines.sim.speculation import Speculation
from trtserve.plugins.engines.sim.timing import PassTiming
from trtserve.server.workers.warm_up import Probe, first_token, probes

_MASK_64 = (1 << 64) - 1


def own_token(request_id: int) -> int:
    """A token id that only one request uses: negative, as no trace's are."""
    return -1 - request_id


class OwnTokens:
    """Says the request's own token again and again, so that no other request makes the same blocks."""

    __slots__ = ("_state", "_token_id")

    def __init__(self, request: Request) -> None:
        self._token_id = own_token(request.id)
        self._state = int(request.id)

    @property
    def draw(self) -> int:
        return self._state >> 48

    def next(self, may_end: bool) -> int:
        # Knuth's linear congruential generator (MMIX): `draw` decides how many drafted tokens are right.
        self._state = (self._state * 6364136223846793005 + 1442695040888963407) & _MASK_64
        return self._token_id

    def take(self, count: int) -> TokenIds:
        return array("i", (self._token_id,)) * count

    def logprob(self, token_id: int, num_top: int) -> TokenLogprob:
        return TokenLogprob(token_id, 0.0)


class OwnTokenSource:
    """The model of a replay, a `TokenSource`."""

    def stream(self, request: Request) -> OwnTokens:
        return OwnTokens(request)


@dataclass(frozen=True, slots=True)
class ReplayedEngine:
    """Makes the schedulers of equal workers."""

    limits: SchedulerLimits
    timing: PassTiming
    num_draft_tokens: int
    acceptance_rate: float

    @classmethod
    def of(cls, config: EngineConfig) -> ReplayedEngine:
        """Options about faults and starting mean nothing here. Raises ValueError where sizes do not fit together,
        pydantic.ValidationError for wrong options."""
        options = SimOptions.model_validate(dict(config.options))
        scale = options.slow_factor / options.speedup
        timing = options.timing()
        scaled = {name: value * scale for name, value in asdict(timing).items() if name.endswith("_ms")}
        return cls(
            scheduler_limits(config, ModelSizes()),
            PassTiming(**scaled, usage_limit=timing.usage_limit),
            options.num_draft_tokens,
            options.acceptance_rate,
        )

    @property
    def info(self) -> EngineInfo:
        limits = self.limits
        return EngineInfo(
            block_size=limits.block_size,
            num_blocks=limits.num_blocks,
            max_num_seqs=limits.max_num_seqs,
            max_num_tokens=limits.max_num_tokens,
            max_seq_len=limits.max_seq_len,
            vocab_size=1 << 31,
            publishes_kv_events=limits.enable_prefix_caching,
            caches_prefixes=limits.enable_prefix_caching,
        )

    def scheduler(self) -> Scheduler:
        drafts = Speculation(self.num_draft_tokens, self.acceptance_rate) if self.num_draft_tokens else None
        return Scheduler(self.limits, self.timing, OwnTokenSource(), drafts)

    def warm_up(self) -> Iterator[PassStats]:
        """The passes of a worker's warm-up, which the router learns from. They leave nothing in the worker's cache."""
        for probe in (first_token(self.info), *probes(self.info)):
            yield from self._passes(probe)

    def _passes(self, probe: Probe) -> Iterator[PassStats]:
        scheduler = self.scheduler()
        sampling = SamplingParams(probe.max_tokens, ignore_eos=True)
        for number in range(probe.num_sequences):
            prompt = array("i", (own_token(number),)) * probe.prompt_tokens
            scheduler.add(Request(RequestId(number), prompt, sampling))
        while scheduler.has_work():
            step = scheduler.run_pass()
            if step.stats is not None:
                yield step.stats
