"""One curve of pass times, fitted on line: a quadratic by recursive least squares, and what differs from the textbook.

- Errors are relative: a sample weighs 1 / (predicted time of its pass)^2, as noise grows with the time of a pass.
- Plain forgetting winds up: after thousands of passes at the same x all that was known of other x is forgotten, and the
  next pass elsewhere bends the curve to its noise. So forgetting is towards a floor (information = 0.99 information +
  0.01 floor + new; such variants are surveyed in arXiv:2308.04259): what is known never sinks far below what a few
  passes spread over the whole range would have told.
- An error beyond three standard deviations counts as three, so that one page-in changes little, while a lasting change
  widens the deviation and is followed.
- While errors are mostly to one side, the speed has changed, and the past is forgotten ten times as fast. So are the
  very first passes, which are often slow and known to nobody as such.

Matrices are 3 x 3 and symmetric, written out: this runs once for each engine step, in a process without numpy.
"""

from __future__ import annotations

from math import inf, sqrt

from trtserve.plugins.routing_api import Curve

_FORGETTING = 0.99
_FIRST_FORGETTING = 0.5  # then the latest third of all passes counts, until 0.99 is reached
_FAST_FORGETTING = 0.9  # while half or more of the squared error is bias; by chance that is four deviations off
_FLOOR_PASSES = 10.0
_FLOOR_EVERY = 64  # passes; the floor depends on the curve, which moves slowly
_PRIOR_DEVIATION = 100.0  # of a coefficient, in units of (relative error of a pass) * (largest coefficient)
_MAX_DEVIATIONS = 3.0
_DEVIATION_RATE = 0.05  # of all means of recent passes
_MIN_VARIANCE = 0.02**2
_MIN_PASSES = 3
_MIN_FIRST_SHARE = 0.1
_LEAST_MS = 1e-9
_ROUNDING = 1e-9

_Vector = tuple[float, float, float]
_Symmetric = tuple[float, float, float, float, float, float]  # 00 01 02 11 12 22


class CurveFit:
    """A quadratic fitted by recursive least squares; never falling and never negative over its range.

    The range is from the least to the greatest input seen, for good: the floor keeps what was learnt of inputs that
    come no more, and a range that shrank would make the time of a rare long prompt jump.
    """

    def __init__(self, start: Curve) -> None:
        self.num_passes = 0
        self._start = start
        self._low = self._high = 0.0
        self._unit = start.high  # inputs are counted in it, so that powers of them are of like size
        self._coefficients: _Vector = (start.constant, start.linear * self._unit, start.quadratic * self._unit**2)
        self._information: _Symmetric = (0.0,) * 6
        self._covariance: _Symmetric = (0.0,) * 6
        self._floor: _Symmetric = (0.0,) * 6
        self._mean_pass_ms = 0.0
        self._bias = 0.0
        self._variance = 1.0  # of relative errors; at first anything is believed

    @property
    def is_known(self) -> bool:
        """Whether the fit's range is of what was seen, no longer the start curve's."""
        return self.num_passes >= _MIN_PASSES

    def doubt(self, x: float) -> float:
        """The variance of the fit at `x`, in units that are the same for all curves of one worker."""
        z = x / self._unit
        g0, g1, g2 = _product(self._covariance, (1.0, z, z * z))
        return g0 + (g1 + g2 * z) * z if self.is_known else inf

    def learn(self, x: float, y_ms: float, pass_ms: float) -> bool:
        """A pass that took `pass_ms` (more than 0) in all, `y_ms` of them for this curve; whether that has changed."""
        if not self.num_passes:
            if y_ms < _MIN_FIRST_SHARE * pass_ms:
                return False  # the rest of another curve's error; no scale to begin with
            self._begin(x, y_ms, pass_ms)
        self.num_passes += 1
        if not self._low <= x <= self._high:
            self._low, self._high = min(self._low, x), max(self._high, x)
            self._set_floor()
        elif not self.num_passes % _FLOOR_EVERY:
            self._set_floor()
        rate = max(_DEVIATION_RATE, 1.0 / self.num_passes)
        self._mean_pass_ms += rate * (pass_ms - self._mean_pass_ms)
        z = x / self._unit
        c0, c1, c2 = self._coefficients
        error_ms = y_ms - (c0 + (c1 + c2 * z) * z)
        # By the prediction, as weighing by the time itself would favour passes that happened to be short; but not by
        # one that is so far off that a pass would weigh as much as many, or next to nothing.
        weight = 1.0 / min(max(pass_ms - error_ms, pass_ms / 2), pass_ms * 8)
        self._update((weight, weight * z, weight * z * z), error_ms * weight)
        return True

    def curve(self) -> Curve:
        """The fit, or where that falls or is negative within its range the best fit that does neither: least squares
        with the slope at that end, or the value at the low end, held at zero. Noise at the end of a flat curve so
        bends it a little; a fit that falls throughout becomes a constant."""
        low, high = (self._low, self._high) if self.is_known else (self._start.low, self._start.high)
        c, p = self._coefficients, self._covariance
        a, b = low / self._unit, high / self._unit
        for _ in range(3):  # each round holds one more of three conditions
            broken = _broken_condition(c, a, b)
            if broken is None:
                break
            c, p = _hold_at_zero(c, p, broken, self._covariance)
        else:
            if _broken_condition(c, a, b):
                c0, c1, c2 = self._coefficients
                middle = (a + b) / 2
                c = max(0.0, c0 + (c1 + c2 * middle) * middle), 0.0, 0.0
        rounding = 1e-12 * (abs(c[0]) + (abs(c[1]) + abs(c[2]) * a) * a)
        lift = max(0.0, rounding - (c[0] + (c[1] + c[2] * a) * a))
        return Curve(c[0] + lift, c[1] / self._unit, c[2] / self._unit**2, low, high)

    def _begin(self, x: float, y_ms: float, pass_ms: float) -> None:
        """Scale the start curve to the first sample."""
        scale = y_ms / self._start.at(x)
        c0, c1, c2 = self._coefficients
        self._coefficients = c0 * scale, c1 * scale, c2 * scale
        self._low = self._high = x
        self._mean_pass_ms = pass_ms
        self._set_floor()
        prior = self._prior()
        self._information, self._covariance = _inverted(prior, 0.0, 0.0, prior, 0.0, prior)

    def _prior(self) -> float:
        """The least information that there is on each coefficient."""
        return 1.0 / (_PRIOR_DEVIATION * max(_LEAST_MS, *map(abs, self._coefficients))) ** 2

    def _set_floor(self) -> None:
        """What `_FLOOR_PASSES` passes would tell, a third of them at each end of the range and in its middle."""
        f00 = f11 = f22 = self._prior()
        f01 = f02 = f12 = 0.0
        c0, c1, c2 = self._coefficients
        low, high = self._low / self._unit, self._high / self._unit
        least = self._mean_pass_ms / 2  # the fit may be far off yet, even negative
        for z in (low, (low + high) / 2, high):
            weight = _FLOOR_PASSES / 3 / max(least, c0 + (c1 + c2 * z) * z) ** 2
            f00, f01, f02 = f00 + weight, f01 + weight * z, f02 + weight * z * z
            f11, f12, f22 = f11 + weight * z * z, f12 + weight * z**3, f22 + weight * z**4
        self._floor = f00, f01, f02, f11, f12, f22

    def _forgetting(self) -> float:
        if self._bias**2 > self._variance / 2:
            return _FAST_FORGETTING
        return min(_FORGETTING, max(_FIRST_FORGETTING, 1.0 - 3.0 / self.num_passes))

    def _update(self, x: _Vector, error: float) -> None:
        """One step of least squares: regressors and error in relative units."""
        x0, x1, x2 = x
        p = self._covariance
        g0, g1, g2 = _product(p, x)
        spread = 1.0 + x0 * g0 + x1 * g1 + x2 * g2  # where little is known, much may be wrong
        limit = _MAX_DEVIATIONS * sqrt(self._variance * spread)
        error = min(max(error, -limit), limit)
        self._bias += _DEVIATION_RATE * (error / sqrt(spread) - self._bias)
        rate = max(_DEVIATION_RATE, 1.0 / (self.num_passes + 1))
        self._variance = max(_MIN_VARIANCE, self._variance + rate * (error * error / spread - self._variance))
        r00, r01, r02, r11, r12, r22 = self._information
        f00, f01, f02, f11, f12, f22 = self._floor
        keep, add = self._forgetting(), 1 - _FORGETTING
        self._information, p = _inverted(
            keep * r00 + add * f00 + x0 * x0,
            keep * r01 + add * f01 + x0 * x1,
            keep * r02 + add * f02 + x0 * x2,
            keep * r11 + add * f11 + x1 * x1,
            keep * r12 + add * f12 + x1 * x2,
            keep * r22 + add * f22 + x2 * x2,
        )
        self._covariance = p
        g0, g1, g2 = _product(p, x)
        c0, c1, c2 = self._coefficients
        self._coefficients = c0 + g0 * error, c1 + g1 * error, c2 + g2 * error


def _broken_condition(c: _Vector, low: float, high: float) -> _Vector | None:
    """The functional, of coefficients, that ought not to be negative and is most: slope at an end, value at `low`."""
    slack = -_ROUNDING * (abs(c[0]) + abs(c[1]) + abs(c[2]))
    slope_low, slope_high = c[1] + 2 * c[2] * low, c[1] + 2 * c[2] * high
    if min(slope_low, slope_high) < slack:
        return 0.0, 1.0, 2 * (high if slope_high < slope_low else low)
    if c[0] + (c[1] + c[2] * low) * low < slack:
        return 1.0, low, low * low
    return None


def _hold_at_zero(c: _Vector, p: _Symmetric, condition: _Vector, unheld: _Symmetric) -> tuple[_Vector, _Symmetric]:
    """The best coefficients with `condition` times them zero, and the covariance within that plane.

    unheld: the covariance before anything was held.
    """
    g0, g1, g2 = _product(p, condition)
    variance = g0 * condition[0] + g1 * condition[1] + g2 * condition[2]
    before = unheld[0] * condition[0] ** 2 + unheld[3] * condition[1] ** 2 + unheld[5] * condition[2] ** 2
    if variance <= _ROUNDING * before:
        return c, p  # what was held before leaves no freedom but rounding
    f = (c[0] * condition[0] + c[1] * condition[1] + c[2] * condition[2]) / variance
    return (c[0] - f * g0, c[1] - f * g1, c[2] - f * g2), (
        p[0] - g0 * g0 / variance,
        p[1] - g0 * g1 / variance,
        p[2] - g0 * g2 / variance,
        p[3] - g1 * g1 / variance,
        p[4] - g1 * g2 / variance,
        p[5] - g2 * g2 / variance,
    )


def _product(p: _Symmetric, x: _Vector) -> _Vector:
    x0, x1, x2 = x
    p00, p01, p02, p11, p12, p22 = p
    return p00 * x0 + p01 * x1 + p02 * x2, p01 * x0 + p11 * x1 + p12 * x2, p02 * x0 + p12 * x1 + p22 * x2


def _inverted(r00: float, r01: float, r02: float, r11: float, r12: float, r22: float) -> tuple[_Symmetric, _Symmetric]:
    """A symmetric positive matrix and its inverse. One that is singular, but for rounding, is made less so first."""
    a, b, c = r11 * r22 - r12 * r12, r02 * r12 - r01 * r22, r01 * r12 - r02 * r11
    determinant = r00 * a + r01 * b + r02 * c
    if determinant <= 1e-13 * r00 * r11 * r22:
        ridge = 1.000001
        return _inverted(r00 * ridge, r01, r02, r11 * ridge, r12, r22 * ridge)
    f = 1.0 / determinant
    return (r00, r01, r02, r11, r12, r22), (
        a * f,
        b * f,
        c * f,
        (r00 * r22 - r02 * r02) * f,
        (r01 * r02 - r00 * r12) * f,
        (r00 * r11 - r01 * r01) * f,
    )
