"""`Scatter`: how fast a device is now against its profile, and how far its times scatter.

Expected time and risk are kept apart. Work that lasts for many iterations is planned by the
expected time, since the sum of many times scatters by a small share of itself. Work that must end
before a near deadline is planned by a bound for the few iterations until then.

The ratio of measured to expected time is followed as a mean, not as a median: times are skewed, and
it is their sum that must fit. A change of speed is told from scatter by a cumulative sum (Page,
"Continuous inspection schemes", Biometrika 1954), so that a step is followed within a few
iterations, while between two steps the estimate is calm.
"""

from __future__ import annotations

import math
from copy import copy
from functools import lru_cache
from statistics import NormalDist

# One observation moves the drift by this share of its surprise where nothing has changed.
DRIFT_RATE = 0.03
# By how much that leaves the drift unsure, as a share of the variance of one iteration.
DRIFT_UNSURE = DRIFT_RATE / (2.0 - DRIFT_RATE)
# The same for the scatter, which changes less.
SCATTER_RATE = 1 / 256
# What is believed before anything was seen weighs as much as so many observations.
PRIOR_WEIGHT = 8.0
# The same for the drift, at first and after each change.
FIRST_WEIGHT = 4.0
# Standard deviations by which one observation counts at most: a machine that stands still once
# is no slower machine.
MOST_SURPRISE = 3.0
# The same for the ratio of the times, upwards: of a skewed scatter the tail is a part of the mean.
MOST_RATIO = 3.0
# A change is believed once surprises, each less `SLACK`, add up to `ALARM`; both in standard
# deviations. From this scatter down, small surprises are none.
SLACK, ALARM = 1.0, 6.0
LEAST_SCATTER = 0.03
# A machine that stands still at times cannot be planned around; past this, caution would only
# make it slower.
MOST_BOUND = 3.0
# A variance of logarithms below this is none.
TINY = 1e-12


class Scatter:
    """Follows ratios of measured to profiled seconds.

    Args:
        margin: the profile's own measure of scatter: a factor on the expected time that one
            iteration stays within, except in a share ``risk`` of cases.
        risk: chance that one iteration exceeds the margin.

    Attributes:
        drift: ratio of measured to profiled seconds, as expected now.
        variance: variance of one iteration's ratio of measured to expected seconds.
        num_observations: number of iterations observed.
    """

    def __init__(self, margin: float, risk: float) -> None:
        self.drift = 1.0
        self.num_observations = 0
        quantile = _normal_quantile(max(min(risk, 0.5), 1e-9))
        sigma = math.log(min(max(margin, 1.0), MOST_BOUND)) / max(quantile, 1e-3)
        self.variance = math.expm1(sigma * sigma)
        self._since_change = 0
        self._up, self._down = _Cusum(), _Cusum()

    def observe(self, ratio: float, rate: float = 1.0) -> None:
        """Learn from an iteration that took ``ratio`` times its expected seconds.

        Args:
            ratio: measured over expected seconds.
            rate: share of a surprise that is the device's; the rest has another cause.
        """
        if not 0.0 < ratio < math.inf:
            return
        self.num_observations += 1
        sigma = max(math.sqrt(self.variance), LEAST_SCATTER)
        # The logarithms of a skewed scatter with mean 1 have a mean below 0.
        surprise = math.log(ratio) / sigma + sigma / 2
        surprise = max(-MOST_SURPRISE, min(MOST_SURPRISE, surprise))
        if rate == 1.0 and self._has_changed(surprise, ratio):
            return
        seen = min(ratio, 1.0 + MOST_SURPRISE * sigma, MOST_RATIO)
        weight = max(SCATTER_RATE, 1.0 / (self.num_observations + PRIOR_WEIGHT))
        self.variance += weight * ((seen - 1.0) ** 2 - self.variance)
        self._since_change += 1
        weight = max(DRIFT_RATE, 1.0 / (self._since_change + FIRST_WEIGHT))
        self.drift *= 1.0 + rate * weight * (min(ratio, MOST_RATIO) - 1.0)

    def rescaled(self, factor: float) -> Scatter:
        """Return a scatter for the same seconds against another profile, whose own seconds are
        smaller by ``factor``.

        Its drift counts no more than a first guess, since it holds for some batches alone.
        """
        other = copy(self)
        other.drift = factor * self.drift
        other._since_change = 0
        other._up, other._down = _Cusum(), _Cusum()
        return other

    def risk(self, factor: float) -> float:
        """Return the chance that one iteration takes more than ``factor`` times its expected
        seconds.
        """
        square = math.log1p(self.variance * (1.0 + DRIFT_UNSURE))
        if square < TINY:
            return 0.0 if factor >= 1.0 else 1.0
        return 0.5 * math.erfc((math.log(factor) + square / 2) / math.sqrt(2.0 * square))

    def bound(self, iterations: float, risk: float) -> float:
        """Return a factor on expected seconds, at least 1, which bounds so many iterations in a
        row.

        Their sum stays within it except in a share ``risk`` of cases. The sum of skewed times is
        taken to be lognormal, with its true mean and variance (Fenton, "The sum of log-normal
        probability distributions", 1960). The possible error of the drift itself is added, which
        does not average out.
        """
        variance = self.variance * (1.0 / max(iterations, 1.0) + DRIFT_UNSURE)
        square = math.log1p(variance)
        factor = math.exp(_normal_quantile(risk) * math.sqrt(square) - square / 2)
        return min(max(1.0, factor), MOST_BOUND)

    def _has_changed(self, surprise: float, ratio: float) -> bool:
        """Return True if the device has another speed now, which is believed at once."""
        for run, sign in ((self._up, 1.0), (self._down, -1.0)):
            run.add(sign * surprise - SLACK, self.drift * min(ratio, MOST_RATIO))
            if run.total > ALARM:
                self.drift = run.ratios / run.length
                self._since_change = run.length
                self._up, self._down = _Cusum(), _Cusum()
                return True
        return False


class _Cusum:
    """One side of a CUSUM: surprises of one sign in a row.

    Attributes:
        total: sum of the surprises, 0 or more.
        ratios: sum of the ratios of measured to profiled seconds since the total was 0.
        length: number of these ratios.
    """

    __slots__ = ("length", "ratios", "total")

    def __init__(self) -> None:
        self.total, self.ratios, self.length = 0.0, 0.0, 0

    def add(self, surprise: float, ratio: float) -> None:
        self.total += surprise
        self.ratios += ratio
        self.length += 1
        if self.total <= 0.0:
            self.total, self.ratios, self.length = 0.0, 0.0, 0


@lru_cache(maxsize=4096)
def _normal_quantile(risk: float) -> float:
    return NormalDist().inv_cdf(1.0 - risk)
