"""How long a pass of one type of worker takes, learnt from the passes that its workers report.

    pass    = prefill(n) + decode(u)
    prefill = c0 + c1 n + c2 n^2   n: new prompt tokens of the pass; no prefill without any
    decode  = d0 + d1 u + d2 u^2   u: KV tokens read by the decoding sequences / KV tokens of the worker, 1 at most

How a curve is fitted: `curve_fit.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from trtserve.plugins.api import PassStats
from trtserve.plugins.routing_api import Curve, PassTimes
from trtserve.server.router.curve_fit import CurveFit
from trtserve.server.router.decayed_mean import DecayedMean

START = PassTimes(
    prefill=Curve(constant=10.0, linear=0.02, quadratic=0.0, low=1.0, high=8192.0),
    decode=Curve(constant=5.0, linear=20.0, quadratic=0.0, low=0.0, high=1.0),
)
"""Before any pass, to the order of magnitude: a model of ten billion parameters on one GPU of the data-centre kind. The
first pass of a kind scales its curve to itself; the range stays until there were three."""

_DECODES_EVERY_S = 0.0005
_PREFILLS_EVERY_S = 0.005
_ERROR_HALF_LIFE = 50.0
_MIN_PASS_MS, _MAX_PASS_MS = 1e-6, 1e9  # beyond, a clock is wrong


@dataclass(frozen=True, slots=True)
class CurveReport:
    """One learnt curve, for people."""

    curve: Curve
    num_passes: int  # that it learnt from
    relative_error: float | None  # recent mean of |predicted - actual| / actual of its passes; None: there were none


@dataclass(frozen=True, slots=True)
class PassTimeReport:
    """What is learnt, whether pinned or not, for people."""

    prefill: CurveReport
    decode: CurveReport
    pinned: PassTimes | None


class PassTimeModel:
    """The pass times of one type of worker. Deterministic; not thread-safe.

    With `pinned`, `times` gives that whatever is observed; what would be used without is learnt and in `report()`.
    """

    def __init__(self, pinned: PassTimes | None = None) -> None:
        self.pinned = pinned
        self._prefill = CurveFit(START.prefill)
        self._decode = CurveFit(START.decode)
        self._prefill_error = DecayedMean(0.0, _ERROR_HALF_LIFE, 0.0)
        self._decode_error = DecayedMean(0.0, _ERROR_HALF_LIFE, 0.0)
        self._learnt = START
        self._next_decode_s = self._next_prefill_s = 0.0

    @property
    def times(self) -> PassTimes:
        """To be used for decisions; the same object until a pass has changed it."""
        return self._learnt if self.pinned is None else self.pinned

    def report(self) -> PassTimeReport:
        """For people: dataclasses of numbers all the way down."""
        prefill, decode = self._learnt.prefill, self._learnt.decode
        return PassTimeReport(
            CurveReport(prefill, self._prefill.num_passes, _mean_or_none(self._prefill_error)),
            CurveReport(decode, self._decode.num_passes, _mean_or_none(self._decode_error)),
            self.pinned,
        )

    def wants(self, stats: PassStats, now_s: float) -> bool:
        """Whether to `observe` a pass that ended now. Passes are many and alike, from hundreds of workers thousands a
        second, and learning from one takes longer than anything else that is done about it."""
        if stats.prefill_tokens:
            if now_s < self._next_prefill_s:
                return False
            self._next_prefill_s = now_s + _PREFILLS_EVERY_S
        else:
            if now_s < self._next_decode_s:
                return False
            self._next_decode_s = now_s + _DECODES_EVERY_S
        return True

    def observe(self, stats: PassStats, kv_tokens: int) -> None:
        """Learn from a pass of a worker whose KV cache holds `kv_tokens`. One that tells nothing is ignored."""
        duration_ms, tokens = stats.duration_s * 1000, stats.prefill_tokens
        usage = min(1.0, stats.context_tokens / kv_tokens) if kv_tokens > 0 else 0.0
        if not _MIN_PASS_MS < duration_ms < _MAX_PASS_MS or (tokens <= 0 and usage <= 0):
            return
        learnt = self._learnt
        prefill_ms = learnt.prefill_ms(tokens)
        decode_ms = learnt.decode_ms(usage) if usage > 0 else 0.0
        error = abs(prefill_ms + decode_ms - duration_ms) / duration_ms
        (self._prefill_error if tokens > 0 else self._decode_error).add(error)
        fit = self._taught(tokens, usage)
        if fit is self._decode and fit.learn(usage, duration_ms - prefill_ms, duration_ms):
            self._learnt = PassTimes(learnt.prefill, fit.curve())
        elif fit is self._prefill and fit.learn(tokens, duration_ms - decode_ms, duration_ms):
            self._learnt = PassTimes(fit.curve(), learnt.decode)

    def _taught(self, tokens: int, usage: float) -> CurveFit | None:
        """Which curve a pass teaches.

        One with prompts and decodes teaches the curve that is less sure of it, given the other one; none while neither
        is known, as the whole would be taken for one of them. Only teaching prefill would not do: a worker under load
        may have prompts in every pass, and its decode at that load would never come to be known.
        """
        if tokens <= 0:
            return self._decode
        if usage <= 0:
            return self._prefill
        prefill, decode = self._prefill, self._decode
        if not decode.is_known and not prefill.is_known:
            return None
        return decode if decode.doubt(usage) > prefill.doubt(tokens) else prefill


def _mean_or_none(mean: DecayedMean) -> float | None:
    return mean.value if mean.num_samples else None
