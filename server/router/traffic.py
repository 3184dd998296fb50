"""What is learnt of the traffic: how long answers are, and how often and how soon stored blocks are used again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

from trtserve.plugins.routing_api import Estimates
from trtserve.server.router.decayed_mean import DecayedMean

START = Estimates(output_tokens=256.0, reuse_probability=0.5, block_life_s=120.0)
"""Before any request: a chat whose user comes back every other time, after two minutes."""

_OUTPUT_HALF_LIFE = 100.0  # sequences
_REUSE_HALF_LIFE = 10_000.0  # blocks
_REUSE_START_WEIGHT = 1_000.0  # empty caches hit nothing: the first requests tell little
_LIFE_HALF_LIFE = 1_000.0  # remembered blocks
_EVICTION_HALF_LIFE = 100.0  # remembered blocks

_SAMPLE_MASK = 15
"""Last uses are remembered of hashes with these bits zero: a sixteenth. Hashes are uniform, so it is a fair sample, the
same one for uses and evictions, for a sixteenth of the time and memory."""


@dataclass(frozen=True, slots=True)
class TrafficOptions:
    """What an operator says instead of it being learnt; None: learnt."""

    output_tokens: float | None = None
    reuse_probability: float | None = None
    block_life_s: float | None = None


@dataclass(frozen=True, slots=True)
class TrafficReport:
    """What is learnt, whether pinned or not, for people."""

    learnt: Estimates
    pinned: TrafficOptions
    num_sequences: int  # that ended
    num_blocks: int  # that were sent
    num_reuses: int  # of remembered blocks: that `block_life_s` is learnt from
    num_remembered: int  # blocks whose last use is remembered


class Traffic:
    """The traffic of all workers. Deterministic; times are seconds of one clock that never goes back.

    `reuse_probability`: every use of a block, its first included, is followed by either another one or its eviction, so
    the share of hits among all uses is the chance of the former. Blocks of generated tokens count from when a prompt
    holds them.

    `max_remembered` bounds the memory: about 200 bytes each, and each stands for sixteen stored blocks. The block used
    longest ago is forgotten first; blocks that were forgotten teach nothing.
    """

    def __init__(self, options: TrafficOptions | None = None, max_remembered: int = 32_768) -> None:
        self._options = options or TrafficOptions()
        self._max_remembered = max_remembered
        self._last_use_s: OrderedDict[int, float] = OrderedDict()  # the longest ago comes first
        self._output_tokens = DecayedMean(START.output_tokens, _OUTPUT_HALF_LIFE)
        self._reuse = DecayedMean(START.reuse_probability, _REUSE_HALF_LIFE, _REUSE_START_WEIGHT)
        self._life_s = DecayedMean(START.block_life_s, _LIFE_HALF_LIFE)
        self._estimates: Estimates | None = None
        self._late: list[tuple[Sequence[int], int, float]] = []  # what `sent` has not counted yet

    @property
    def estimates(self) -> Estimates:
        """To be used for decisions; cheap."""
        self._count_late()
        if self._estimates is None:
            pinned = self._options
            self._estimates = Estimates(
                self._output_tokens.value if pinned.output_tokens is None else pinned.output_tokens,
                self._reuse.value if pinned.reuse_probability is None else pinned.reuse_probability,
                self._life_s.value if pinned.block_life_s is None else pinned.block_life_s,
            )
        return self._estimates

    def report(self) -> TrafficReport:
        """For people: dataclasses of numbers all the way down."""
        self._count_late()
        return TrafficReport(
            self._learnt(),
            self._options,
            self._output_tokens.num_samples,
            self._reuse.num_samples,
            self._life_s.num_samples,
            len(self._last_use_s),
        )

    def ended(self, generated_tokens: int) -> None:
        """A sequence came to its end."""
        self._output_tokens.add(generated_tokens)
        self._estimates = None

    def sent(self, hashes: Sequence[int], num_hit_blocks: int, now_s: float) -> None:
        """A request was bound to a worker that has the first `num_hit_blocks` of its blocks. `hashes` is kept until it
        is counted, when somebody asks: the request goes its way first."""
        if hashes:
            self._late.append((hashes, num_hit_blocks, now_s))

    def _count_late(self) -> None:
        if self._late:
            late, self._late = self._late, []
            for hashes, num_hit_blocks, sent_s in late:
                self._count(hashes, num_hit_blocks, sent_s)

    def _count(self, hashes: Sequence[int], num_hit_blocks: int, now_s: float) -> None:
        count = len(hashes)
        self._reuse.add(num_hit_blocks / count, count)
        used, ages, total_s = self._last_use_s, 0, 0.0
        for place in [place for place, block in enumerate(hashes) if not block & _SAMPLE_MASK]:
            block = hashes[place]
            last_s = used.get(block)
            if last_s is None:
                used[block] = now_s
                continue
            used[block] = now_s
            used.move_to_end(block)
            if place < num_hit_blocks:
                ages += 1
                total_s += now_s - last_s
        if ages:
            self._life_s.add(total_s / ages, ages)
        while len(used) > self._max_remembered:
            used.popitem(last=False)
        self._estimates = None

    def ages_s(self, hashes: Sequence[int], now_s: float) -> list[float]:
        """How long ago the blocks were last sent to any worker; of those among them that are remembered."""
        self._count_late()
        used = self._last_use_s
        return [now_s - used[block] for block in hashes if not block & _SAMPLE_MASK and block in used]

    def _learnt(self) -> Estimates:
        return Estimates(self._output_tokens.value, self._reuse.value, self._life_s.value)


class EvictionAge:
    """How old the blocks are that one worker evicts: what the next one to go will be like.

    The server does not see the order in which an engine would evict, but the last victims are much like the next ones.
    Evicted blocks that are not remembered are taken to be like those that are.
    """

    def __init__(self, traffic: Traffic) -> None:
        """`traffic` knows when blocks were last sent to any worker."""
        self._traffic = traffic
        self._age_s = DecayedMean(0.0, _EVICTION_HALF_LIFE, 0.0)

    @property
    def age_s(self) -> float | None:
        """Recent mean of the time since their last use; None before any eviction."""
        return self._age_s.value if self._age_s.num_samples else None

    def removed(self, hashes: Sequence[int], now_s: float) -> None:
        """The worker has evicted these blocks."""
        ages = self._traffic.ages_s(hashes, now_s)
        if ages:
            self._age_s.add(sum(ages) / len(ages), len(ages))

    def loss(self, life_s: float) -> float:
        """The chance, 0 to 1, that the block evicted next would have been used again: exp(-age / `life_s`), for uses
        that come after exponentially distributed times. 0 before any eviction, when there is nothing to lose, and for
        a `life_s` of 0."""
        age_s = self.age_s
        return exp(-age_s / life_s) if age_s is not None and life_s > 0 else 0.0
