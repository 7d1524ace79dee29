"""Statistics of pairs of turns: differences with their spread, capacities with their intervals."""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minserve.workload.capacity import CONFIDENCE, LEVEL, RESAMPLES, crossing
from shared.paired.turns import RULE, Cell, Pairs

# 97.5% quantiles of Student's t by degrees of freedom, from 1; for more the normal's is close.
T_QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16,
               2.14, 2.13, 2.12, 2.11, 2.10, 2.09, 2.09)  # fmt: skip
NORMAL_QUANTILE = 1.96


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference of two servers' attainments within pairs.

    Attributes:
        mean: attainment of ours minus theirs; NaN without pairs.
        spread: standard deviation over pairs; NaN for fewer than two pairs.
        half: half the width of the mean's 95% interval, by Student's t; NaN for fewer than two.
    """

    mean: float
    spread: float
    half: float
    num_pairs: int

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> Difference:
        """Return the difference over pairs.

        Args:
            pairs: attainments of ours and theirs.
        """
        each = [ours - theirs for ours, theirs in pairs]
        count = len(each)
        if count < 2:
            return cls(each[0] if each else math.nan, math.nan, math.nan, count)
        spread = statistics.stdev(each)
        quantile = T_QUANTILES[count - 2] if count - 2 < len(T_QUANTILES) else NORMAL_QUANTILE
        return cls(statistics.fmean(each), spread, quantile * spread / math.sqrt(count), count)

    @property
    def is_below(self) -> bool:
        """True if ours is less, beyond what the spread explains."""
        return self.mean + self.half < 0

    @property
    def is_above(self) -> bool:
        return self.mean - self.half > 0

    def to_dict(self) -> dict[str, Any]:
        """Return the difference as JSON values."""
        return {
            "mean": rounded(self.mean),
            "spread": rounded(self.spread),
            "interval": [rounded(self.mean - self.half), rounded(self.mean + self.half)],
            "pairs": self.num_pairs,
        }


@dataclass(frozen=True, slots=True)
class BoundedValue:
    """A capacity, or a ratio of two: a number, and whether it is only a bound.

    Attributes:
        bound: ``at least`` or ``at most`` if rates beyond the value were not tried, else "".
    """

    value: float
    bound: str = ""

    def __str__(self) -> str:
        return f"{self.bound} {self.value:.2f}".strip()


Curve = Mapping[float, Sequence[tuple[float, float]]]


@dataclass(frozen=True, slots=True)
class Capacities:
    """The capacities of two servers, from the pairs of all rates.

    Attributes:
        ours, theirs: requests per second at which attainment falls below `LEVEL`.
        ratio: ours over theirs; ``None`` if both are bounds that do not bound their ratio.
        intervals: 95% intervals of ``ours``, ``theirs`` and ``ratio``, by resampling pairs; rates
            beyond the tried ones count as the nearest tried rate.
    """

    ours: BoundedValue
    theirs: BoundedValue
    ratio: BoundedValue | None
    intervals: Mapping[str, tuple[float, float]]

    @classmethod
    def of(cls, curve: Curve, *, seed: int = 0) -> Capacities | None:
        """Return the capacities of two servers.

        Args:
            curve: by rate, the attainments of both servers in each pair.
            seed: seed of the resampling.

        Returns:
            the capacities; ``None`` without any pair.
        """
        curve = {rate: list(pairs) for rate, pairs in sorted(curve.items()) if pairs}
        if not curve:
            return None
        ours, theirs = _points(curve)
        rng = random.Random(seed)
        drawn: dict[str, list[float]] = {"ours": [], "theirs": [], "ratio": []}
        for _ in range(RESAMPLES):
            again = {rate: rng.choices(pairs, k=len(pairs)) for rate, pairs in curve.items()}
            one, other = _points(again)
            for name, value in (
                ("ours", one.value), ("theirs", other.value), ("ratio", one.value / other.value)
            ):  # fmt: skip
                drawn[name].append(value)
        intervals = {name: _interval(values) for name, values in drawn.items()}
        return cls(ours, theirs, _ratio(ours, theirs), intervals)

    def to_dict(self) -> dict[str, Any]:
        """Return the capacities as JSON values."""
        return {
            name: None
            if point is None
            else {
                "value": rounded(point.value),
                "bound": point.bound,
                "interval": [rounded(one) for one in self.intervals[name]],
            }
            for name, point in (("ours", self.ours), ("theirs", self.theirs), ("ratio", self.ratio))
        }


def curve_of(pairs: Pairs, cells: Sequence[Cell], one: str, other: str) -> Curve:
    """Return by rate the attainments of two servers in the pairs that may be compared.

    Args:
        cells: cells of one group.
    """
    return {
        cell.rate: [(a.attainment, b.attainment) for a, b in pairs.kept(cell, one, other)]
        for cell in cells
    }


def by_group(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """Return groups of cells that differ only by their rate, in the order they first came."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.group, []).append(cell)
    return groups


def rounded(one: float) -> float | None:
    """Return a number for JSON, which has no NaN or infinity; ``None`` for these."""
    return round(one, 4) if math.isfinite(one) else None


def mean(values: Iterable[float]) -> float | None:
    """Return the mean for JSON; ``None`` without values."""
    each = list(values)
    return rounded(statistics.fmean(each)) if each else None


def left_out_words(each: Iterable[Mapping[str, int]]) -> str:
    """Return the rule by which pairs are left out, and how many were left out.

    Args:
        each: numbers of pairs by their fault.
    """
    total = sum((Counter(one) for one in each), Counter[str]())
    counts = ", ".join(f"{count} ({fault})" for fault, count in total.items())
    return f"{RULE}: {counts or 'none'}"


def percent(share: float | None) -> str:
    """Return a share in percent, for tables."""
    return "-" if share is None else f"{100 * share:.1f}"


def in_percent(difference: Mapping[str, Any]) -> str:
    """Return a difference, as `Difference.to_dict` returns it, in percent with its interval."""
    if difference["mean"] is None:
        return "-"
    low, high = difference["interval"]
    bounds = "" if low is None else f" ({100 * low:+.0f} to {100 * high:+.0f})"
    return f"{100 * difference['mean']:+.1f}{bounds}"


def _points(curve: Curve) -> tuple[BoundedValue, BoundedValue]:
    """Return the capacities of both servers, linearly between the means at each rate."""
    lowest, highest = min(curve), max(curve)
    found = []
    for side in (0, 1):
        rate = crossing(
            {rate: statistics.fmean(pair[side] for pair in pairs) for rate, pairs in curve.items()},
            LEVEL,
        )
        if rate is None:
            found.append(BoundedValue(lowest, "at most"))
        else:
            found.append(BoundedValue(rate, "at least" if rate == highest else ""))
    return found[0], found[1]


def _ratio(ours: BoundedValue, theirs: BoundedValue) -> BoundedValue | None:
    """Return the ratio; if theirs is a bound, the ratio is bounded from the other side."""
    opposite = {"": "", "at least": "at most", "at most": "at least"}
    bounds = {ours.bound, opposite[theirs.bound]} - {""}
    if len(bounds) > 1:
        return None
    return BoundedValue(ours.value / theirs.value, next(iter(bounds), ""))


def _interval(values: Sequence[float]) -> tuple[float, float]:
    ordered, outside = sorted(values), (1 - CONFIDENCE) / 2
    last = len(ordered) - 1
    return ordered[round(outside * last)], ordered[round((1 - outside) * last)]
