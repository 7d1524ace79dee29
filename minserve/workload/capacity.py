"""Capacity: the most requests per second at which enough of them keep their SLO.

It is found by binary search on the rate. Attainment at one rate is a sample (arrivals and lengths
are drawn), so each rate is tried with several seeds, and the interval around the answer comes from
resampling these (Efron, "Bootstrap methods", Annals of Statistics 7, 1979).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

LEVEL = 0.9
RESAMPLES = 1000
# Share of the bootstrap's distribution of capacities that lies inside the interval.
CONFIDENCE = 0.95
# The search gives up beyond this many doublings or halvings.
MOST_DOUBLINGS = 12

Measure = Callable[[float, int], float]


@dataclass(slots=True)
class Capacity:
    """The result of a search for a capacity.

    Attributes:
        attainment: by rate in requests per second, the share that attained in each repeat.
        level: share of requests that counts as enough.
        complete: False if the search was cut short; what was measured is kept nevertheless.
    """

    attainment: dict[float, list[float]] = field(default_factory=dict)
    level: float = LEVEL
    complete: bool = False

    @property
    def rate(self) -> float | None:
        """The capacity in requests per second, interpolated linearly between measured rates.

        It is ``None`` if the capacity is below all measured rates.
        """
        return crossing({rate: _mean(each) for rate, each in self.attainment.items()}, self.level)

    def interval(self, seed: int = 0) -> tuple[float | None, float | None]:
        """Return bounds between which `rate` would lie with other seeds, with `CONFIDENCE`.

        A bound is ``None`` if it is below all measured rates.
        """
        if not self.attainment:
            return None, None
        rng = random.Random(seed)
        found = []
        for _ in range(RESAMPLES):
            means = {
                r: _mean(rng.choices(each, k=len(each))) for r, each in self.attainment.items()
            }
            found.append(crossing(means, self.level))
        found.sort(key=lambda one: -math.inf if one is None else one)
        outside = (1 - CONFIDENCE) / 2
        last = len(found) - 1
        return found[round(outside * last)], found[round((1 - outside) * last)]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        low, high = self.interval()
        return {
            "capacity": _rounded(self.rate),
            "interval": [_rounded(low), _rounded(high)],
            "level": self.level,
            "complete": self.complete,
            "attainment": {
                f"{rate:.4g}": [round(one, 4) for one in each]
                for rate, each in sorted(self.attainment.items())
            },
        }


def find_capacity(
    measure: Measure,
    start: float,
    *,
    repeats: int = 1,
    tolerance: float = 0.05,
    level: float = LEVEL,
    step: float = 2.0,
    into: Capacity | None = None,
) -> Capacity:
    """Search for the capacity: bracket it by doubling and halving the rate, then bisect.

    Args:
        measure: returns the attainment at (rate, repeat); the repeat serves as a seed.
        start: the first rate that is tried, in requests per second.
        repeats: number of measurements per rate.
        tolerance: the bracket's width at the end, relative to its lower end.
        step: factor between tried rates; less than 2 if the start is known to be near.
        into: collects the results, so that they are kept if the search is interrupted.
    """
    result = Capacity(level=level) if into is None else into

    def attains(rate: float) -> bool:
        if rate not in result.attainment:
            each: list[float] = []
            result.attainment[rate] = each
            try:
                for repeat in range(repeats):
                    each.append(measure(rate, repeat))
            finally:
                if not each:
                    del result.attainment[rate]
        return _mean(result.attainment[rate]) >= level

    low = high = start
    if attains(start):
        for _ in range(MOST_DOUBLINGS):
            low, high = high, high * step
            if not attains(high):
                break
    else:
        for _ in range(MOST_DOUBLINGS):
            high, low = low, low / step
            if attains(low):
                break
    while low < high and high / low > 1 + tolerance:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if attains(middle) else (low, middle)
    result.complete = True
    return result


def crossing(attainment: Mapping[float, float], level: float = LEVEL) -> float | None:
    """Return the rate at which attainment falls below a level for the last time.

    The rate is interpolated linearly between measured rates.

    Args:
        attainment: by rate in requests per second.

    Returns:
        the highest measured rate if it still attains the level (the capacity is at least this);
        ``None`` if no measured rate attains it.
    """
    rates = sorted(attainment)
    if not rates:
        return None
    if attainment[rates[-1]] >= level:
        return rates[-1]
    for low, high in reversed(list(pairwise(rates))):
        if attainment[low] >= level:
            fallen = (attainment[low] - level) / (attainment[low] - attainment[high])
            return low + fallen * (high - low)
    return None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _rounded(rate: float | None) -> float | None:
    return None if rate is None else round(rate, 4)
