"""What a replay measures, and how it is summed up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from trtserve.plugins.api import TokenLogprob

_BINS_PER_S = 1_000_000


class Gaps:
    """Times between tokens: mean exact, quantiles to the microsecond."""

    def __init__(self) -> None:
        self.count = 0
        self.total_s = 0.0
        self._counts: Counter[int] = Counter()

    def add(self, gap_s: float, count: int) -> None:
        """`count` gaps of `gap_s` each."""
        self.count += count
        self.total_s += gap_s * count
        self._counts[round(gap_s * _BINS_PER_S)] += count

    @property
    def mean_s(self) -> float | None:
        """None without any gap."""
        return self.total_s / self.count if self.count else None

    def quantile_s(self, share: float) -> float | None:
        """As `quantile` of all gaps; None without any."""
        if not self.count:
            return None
        place = share * (self.count - 1)
        low = int(place)
        below, above = self._at(low), self._at(min(low + 1, self.count - 1))
        return (below + (above - below) * (place - low)) / _BINS_PER_S

    def _at(self, rank: int) -> int:
        """The bin of the gap with that many smaller ones before it."""
        for gap, count in sorted(self._counts.items()):
            rank -= count
            if rank < 0:
                return gap
        raise IndexError("the rank is below the count")


class MeasuredRequest:
    """The `OutputSink` of one request of a trace. Times are the clock's, in seconds."""

    __slots__ = (
        "_clock",
        "_gaps",
        "_last_s",
        "arrival_s",
        "cached_tokens",
        "dispatch_s",
        "ended_s",
        "first_s",
        "input_tokens",
        "worker",
    )

    def __init__(self, input_tokens: int, arrival_s: float, clock: Callable[[], float], gaps: Gaps) -> None:
        self.input_tokens = input_tokens
        self.arrival_s = arrival_s
        self.worker: int | None = None  # number of the one it was first placed on
        self.dispatch_s = arrival_s  # when
        self.first_s = arrival_s
        self.ended_s = arrival_s
        self.cached_tokens = 0
        self._clock = clock
        self._gaps = gaps
        self._last_s: float | None = None

    def placed(self, worker: int, held_s: float) -> None:
        """The router has chosen; only the first time counts, since later phases of a request wait for the earlier."""
        if self.worker is None:
            self.worker = worker
            self.dispatch_s = self.arrival_s + held_s

    def cached(self, num_tokens: int) -> None:
        self.cached_tokens = max(self.cached_tokens, num_tokens)

    def push(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None) -> None:
        """Tokens of several passes may come at once; they are taken to have come at equal distances."""
        now_s, count = self._clock(), len(token_ids)
        if self._last_s is None:
            self.first_s = self._last_s = now_s
            count -= 1
        if count:
            self._gaps.add((now_s - self._last_s) / count, count)
        self._last_s = self.ended_s = now_s


@dataclass(frozen=True, slots=True)
class Times:
    """Of one figure over all requests, milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values_s: Sequence[float]) -> Times:
        """`values_s`: at least one."""
        ordered = sorted(value * 1000 for value in values_s)
        mean = sum(ordered) / len(ordered)
        p50, p90, p99 = (quantile(ordered, share) for share in (0.5, 0.9, 0.99))
        return cls(mean, p50, p90, p99, ordered[-1])


@dataclass(frozen=True, slots=True)
class Moves:
    """Of a mode with prefill and decode workers."""

    local_share: float  # of prompts: computed on the decode worker
    moved_gb: float  # KV that went from worker to worker, 1e9 bytes


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """The figures of one replay."""

    requests: int
    hit_rate: float  # prompt tokens taken from prefix caches / prompt tokens
    ttft: Times
    e2e: Times
    itl_mean_ms: float | None  # None where no request has a second token
    itl_p99_ms: float | None
    held_share: float  # of requests: not placed at once
    hold_ms_mean: float  # over all requests
    decision_us_mean: float  # the only figure that is measured in real time
    assignments: Sequence[tuple[int, float]]  # per request of the trace: worker's number, ms from start to placement
    moves: Moves | None = None

    def summary(self) -> dict[str, object]:
        """The JSON object of `--json`."""
        ttft, e2e = self.ttft, self.e2e
        return {
            "requests": self.requests,
            "hit_rate": round(self.hit_rate, 6),
            "ttft_ms": _rounded(mean=ttft.mean, p50=ttft.p50, p90=ttft.p90, p99=ttft.p99, max=ttft.max),
            "itl_ms": _rounded(mean=self.itl_mean_ms, p99=self.itl_p99_ms),
            "e2e_ms": _rounded(mean=e2e.mean, p50=e2e.p50, p99=e2e.p99),
            "held_share": round(self.held_share, 6),
            "hold_ms_mean": round(self.hold_ms_mean, 4),
            "decision_us_mean": round(self.decision_us_mean, 2),
            **({} if self.moves is None else {"moves": _rounded(**asdict(self.moves))}),
        }


def summed_up(
    requests: Sequence[MeasuredRequest], gaps: Gaps, decision_us_mean: float, moves: Moves | None = None
) -> ReplayResult:
    """`requests`: in the order of the trace, all ended."""
    count = len(requests)
    holds_s = [request.dispatch_s - request.arrival_s for request in requests]
    return ReplayResult(
        requests=count,
        hit_rate=sum(request.cached_tokens for request in requests) / sum(request.input_tokens for request in requests),
        ttft=Times.of([request.first_s - request.arrival_s for request in requests]),
        e2e=Times.of([request.ended_s - request.arrival_s for request in requests]),
        itl_mean_ms=_ms(gaps.mean_s),
        itl_p99_ms=_ms(gaps.quantile_s(0.99)),
        held_share=sum(hold_s > 0 for hold_s in holds_s) / count,
        hold_ms_mean=sum(holds_s) / count * 1000,
        decision_us_mean=decision_us_mean,
        assignments=[(request.worker or 0, round(request.dispatch_s * 1000, 6)) for request in requests],
        moves=moves,
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """By linear interpolation between the two nearest; `ordered` grows and is not empty."""
    place = share * (len(ordered) - 1)
    low = int(place)
    above = ordered[min(low + 1, len(ordered) - 1)]
    return ordered[low] + (above - ordered[low]) * (place - low)


def _ms(value_s: float | None) -> float | None:
    return None if value_s is None else value_s * 1000


def _rounded(**values: float | None) -> dict[str, float | None]:
    return {name: None if value is None else round(value, 4) for name, value in values.items()}
