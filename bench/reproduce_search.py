"""Capacity of the best of several variants, without a full search for each of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from minserve.workload.capacity import LEVEL, Capacity, Measure, crossing, find_capacity

V = TypeVar("V", bound=Hashable)

# A variant is out where the coarse search sees it this far below the best one.
NEAR = 0.88
# A contender has to attain at a little more than the best capacity so far.
BETTER = 1.01
# Starts are near: brackets widen in small steps.
STEP = 1.2
COARSE_STEP, COARSE_TOLERANCE = 1.4, 0.13


@dataclass(slots=True)
class Best(Generic[V]):
    """What a search over variants found.

    Attributes:
        variant: with the highest capacity.
        capacity: of that one.
        coarse: capacities by the coarse search, of those it did not drop.
        num_contenders: variants that were measured in full.
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
    """The capacity of the best variant.

    With coarse measurements (fewer requests), each variant in turn is tried at `NEAR` times
    the best capacity so far; only who attains there is searched for. Who ends within `NEAR` of
    the best contends: in order of their coarse capacities, contenders are measured in full
    at `BETTER` times the best so far, and searched for where they attain. As long as coarse
    capacities are true to 12% between variants, the best one is never lost.

    Args:
        variants: those likely to be good first, which saves time.
        coarse: of a variant, attainment at (rate, seed), once to search by and once where it
            only decides whether that is enough; ``None`` for one variant alone, of which the
            start is near.
        full: the same with all requests.
        start: a rate to begin with.
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
    """Coarse capacities of all variants that are not dropped."""
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
    # Where none attains anywhere near, the full search finds out the same of one of them.
    return found or {variants[0]: start}


def geomean(values: Sequence[float]) -> float:
    """The geometric mean; NaN of none."""
    if not values:
        return math.nan
    return math.exp(math.fsum(map(math.log, values)) / len(values))
