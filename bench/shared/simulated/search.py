"""Capacity of the best of several variants, without a full search for each of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from minserve.workload.capacity import LEVEL, Capacity, Measure, crossing, find_capacity

V = TypeVar("V", bound=Hashable)

# A variant is dropped if the coarse search sees it this far below the best variant.
NEAR = 0.88
# A contender has to attain at a little more than the best capacity so far.
BETTER = 1.01
# Starts are near the result, so brackets widen in small steps.
STEP = 1.2
COARSE_STEP, COARSE_TOLERANCE = 1.4, 0.13


@dataclass(slots=True)
class Best(Generic[V]):
    """The result of a search over variants.

    Attributes:
        variant: the variant with the highest capacity.
        capacity: capacity of that variant.
        coarse: capacities of the coarse search, for variants that it did not drop.
        num_contenders: number of variants that were measured in full.
    """

    variant: V
    capacity: Capacity
    coarse: dict[V, float] = field(default_factory=dict)
    num_contenders: int = 1


def best_of(
    variants: Sequence[V],
    coarse: Callable[[V], tuple[Measure, Measure]] | None,
    full: Callable[[V], tuple[Measure, Measure]],
    start: float,
    *,
    repeats: int = 1,
    tolerance: float = 0.05,
) -> Best[V]:
    """Return the best variant with its capacity.

    With coarse measurements (fewer requests), each variant in turn is tried at `NEAR` times the
    best capacity so far, and searched for only if it attains there. A variant that ends within
    `NEAR` of the best contends. In the order of their coarse capacities, contenders are measured
    in full at `BETTER` times the best so far, and searched for if they attain. As long as coarse
    capacities are right to 12% between variants, the best one is never lost.

    Args:
        variants: variants that are likely to be good come first, which saves time.
        coarse: returns for a variant two measures of attainment at (rate, seed): one to search
            with, and one that only decides whether it is enough. ``None`` for a single variant
            whose start is near.
        full: the same functions with all requests.
        start: the rate with which the search begins.
    """
    found = {variants[0]: start} if coarse is None else _coarse(variants, coarse, start)
    most = max(found.values())
    contenders = sorted((v for v in found if found[v] >= NEAR * most), key=lambda v: -found[v])
    best: Best[V] | None = None
    for variant in contenders:
        capacity, begin = Capacity(), found[variant]
        measure, decide = full(variant)
        if best is not None:
            begin = BETTER * (best.capacity.rate or begin)
            each = capacity.attainment[begin] = [decide(begin, seed) for seed in range(repeats)]
            if sum(each) / repeats < LEVEL:
                continue
        find_capacity(
            measure, begin, repeats=repeats, tolerance=tolerance, step=STEP, into=capacity
        )
        if best is None or (capacity.rate or 0.0) > (best.capacity.rate or 0.0):
            best = Best(variant, capacity)
    best.coarse, best.num_contenders = found, len(contenders)
    return best


def _coarse(
    variants: Sequence[V], coarse: Callable[[V], tuple[Measure, Measure]], start: float
) -> dict[V, float]:
    """Return the coarse capacities of all variants that are not dropped."""
    found: dict[V, float] = {}
    for variant in variants:
        measure, decide = coarse(variant)
        begin, capacity = max(found.values(), default=start), Capacity()
        if found:
            near = {NEAR * begin: decide(NEAR * begin, 0)}
            if near[NEAR * begin] < LEVEL:
                continue
            near[begin] = measure(begin, 0)
            if near[begin] < LEVEL:
                found[variant] = crossing(near)
                continue
            capacity.attainment[begin] = [near[begin]]
        find_capacity(measure, begin, tolerance=COARSE_TOLERANCE, step=COARSE_STEP, into=capacity)
        if capacity.rate is not None:
            found[variant] = capacity.rate
    # If none attains anywhere near, the full search finds the same result with one of them.
    return found or {variants[0]: start}


def geomean(values: Sequence[float]) -> float:
    """Return the geometric mean; NaN without values."""
    if not values:
        return math.nan
    return math.exp(math.fsum(map(math.log, values)) / len(values))
