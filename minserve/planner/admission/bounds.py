"""Bounds on what may still be reached, by two relaxations of the admission program.

Both go through the candidates from the last deadline to the first and ask how a target is reached
with those that are left. One looks at time: prefills one after another, slowed only as much as so
many accepted ones must slow them (Moore's problem; the recursion is Lawler and Moore's, Management
Science, 1969). The other looks at memory alone. No set can reach what they rule out; what they let
pass may still be infeasible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minserve.planner.admission.fluid_clock import FluidClock

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Of quotients that are to be rounded up.
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Rest:
    """The candidates in deadline order, and the target that is to be reached with them.

    Attributes:
        works: ``[N]`` float64, prefill work in tokens.
        deadlines: ``[N]`` float64, deadlines in seconds.
        blocks: number of blocks of each candidate.
        units: value of each candidate in whole units; 0 for forced ones.
        seqs: number of sequences of each candidate.
        forced: True for each candidate that must be taken.
        target: number of units in all, at least 1.
        end_s: time in seconds; one unit may be missing if the last prefill is done by then. It is
            -inf if no unit may be missing.
    """

    works: Floats
    deadlines: Floats
    blocks: SequenceOf[int]
    units: SequenceOf[int]
    seqs: SequenceOf[int]
    forced: SequenceOf[bool]
    target: int
    end_s: float


def loosened(tokens: Floats) -> Floats:
    """Return a little more than these tokens, because rounding must not rule out what just fits."""
    return tokens * (1 + 1e-9) + 1e-6


def slowdown(rates: Floats, fastest: Floats, sizes: Ints) -> Floats:
    """Return the share of the fastest rate that is left at most beside so many accepted sequences.

    Args:
        rates: ``[J, C]`` rates at count vectors, above 0.
        fastest: ``[J]`` rates that are at least as high.
        sizes: ``[C]`` number of sequences in each count vector.

    Returns:
        ``[most + 1]``, never rising.
    """
    left = np.zeros(int(sizes.max()) + 1)
    np.maximum.at(left, sizes, (rates / fastest[:, None]).max(axis=0))
    return np.maximum.accumulate(left[::-1])[::-1]


def latest_s(rest: Rest, limits: SequenceOf[tuple[FluidClock, Floats]]) -> list[list[list[float]]]:
    """Return until when those accepted must be done, if the target is to be reached after all.

    Args:
        limits: clocks, and for each of them the `slowdown` relative to it, ``[most + 1]``.

    Returns:
        seconds, by clock, number of candidates behind, and units accepted.
    """
    num, target, pad = len(rest.works), rest.target, max(rest.units)
    # The least number of sequences that are accepted.
    under_way = np.where(rest.forced, rest.seqs, 0)
    dense = max(units / seqs for units, seqs in zip(rest.units, rest.seqs, strict=True))
    size = np.cumsum([0, *under_way])[:-1, None] + np.ceil(np.arange(target) / dense - ROUNDING)
    at = size.astype(np.int64)
    cost = rest.works[:, None] / np.stack([left.take(at, mode="clip") for _, left in limits])
    due = np.stack([clock.tokens(rest.deadlines) for clock, _ in limits])
    # In tokens: all clocks go through one recursion.
    latest = np.full((num + 1, len(limits), target + pad), np.inf)
    latest[num, :, :target] = -np.inf
    latest[num, :, target - 1] = [clock.tokens(np.array(rest.end_s)) for clock, _ in limits]
    for k in range(num - 1, -1, -1):
        row, later, units = latest[k, :, :target], latest[k + 1], rest.units[k]
        np.minimum(later[:, units : units + target], due[:, k, None], out=row)
        row -= cost[:, k]
        if not rest.forced[k]:
            np.maximum(row, later[:, :target], out=row)
    tokens = loosened(latest[:, :, :target])
    more = [math.inf] * (sum(rest.units) + 1 - target)
    return [
        [row + more for row in clock.times(tokens[:, kind]).tolist()]
        for kind, (clock, _) in enumerate(limits)
    ]


def least_blocks(rest: Rest) -> list[list[float]]:
    """Return how many more blocks the target takes at least.

    Returns:
        numbers of blocks, by number of candidates behind, and units accepted.
    """
    num, target, pad = len(rest.works), rest.target, max(rest.units)
    least = np.zeros((num + 1, target + pad))
    least[num, :target] = np.inf
    if rest.end_s > -np.inf:
        least[num, target - 1] = 0.0
    for k in range(num - 1, -1, -1):
        row, later, units = least[k, :target], least[k + 1], rest.units[k]
        np.add(later[units : units + target], rest.blocks[k], out=row)
        if not rest.forced[k]:
            np.minimum(row, later[:target], out=row)
    more = [0.0] * (sum(rest.units) + 1 - target)
    return [row + more for row in least[:, :target].tolist()]
