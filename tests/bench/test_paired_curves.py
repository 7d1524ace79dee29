"""Differences and capacities of made-up pairs."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from paired import CELL, result

from shared.paired.curves import Capacities, Difference, by_group, curve_of, in_percent
from shared.paired.turns import Pairs

RATES = (1.0, 2.0, 4.0, 8.0)


def falling(capacity: float) -> Callable[[float], float]:
    """An attainment that reaches 90% at the capacity, on a straight line."""
    return lambda rate: max(0.0, min(1.0, 0.9 - 0.2 * (rate - capacity)))


def curve(
    ours: float, theirs: float, *, noise: float = 0.0, common: float = 0.0, seed: int = 0
) -> dict[float, list[tuple[float, float]]]:
    """Pairs of two servers with these capacities.

    Args:
        noise: of each turn; common: of each pair, alike for both.
    """
    rng = random.Random(seed)
    found: dict[float, list[tuple[float, float]]] = {}
    for rate in RATES:
        for _ in range(6):
            both = rng.gauss(0, common)
            one, other = (falling(x)(rate) + both + rng.gauss(0, noise) for x in (ours, theirs))
            found.setdefault(rate, []).append((one, other))
    return found


def test_capacities_lie_on_the_lines_between_rates() -> None:
    found = Capacities.of(curve(4.0, 2.0))
    assert found is not None
    assert (found.ours.value, found.theirs.value) == (pytest.approx(4.0), pytest.approx(2.0))
    assert found.ratio is not None
    assert found.ratio.value == pytest.approx(2.0)
    assert (found.ours.bound, found.theirs.bound, found.ratio.bound) == ("", "", "")
    assert found.intervals["ratio"] == (pytest.approx(2.0), pytest.approx(2.0))


def test_intervals_hold_the_truth_mostly_and_widen_with_noise() -> None:
    quiet = Capacities.of(curve(3.0, 1.5))
    assert quiet is not None
    assert quiet.ratio is not None
    widths = []
    for noise in (0.02, 0.06):
        held, width = 0, 0.0
        for seed in range(20):
            found = Capacities.of(curve(3.0, 1.5, noise=noise, seed=seed))
            assert found is not None
            low, high = found.intervals["ratio"]
            held += low <= quiet.ratio.value <= high
            width += high - low
        assert held >= 16
        widths.append(width)
    assert widths[0] < widths[1]


def test_the_same_seed_gives_the_same_interval() -> None:
    noisy = curve(4.0, 2.0, noise=0.05)
    assert Capacities.of(noisy) == Capacities.of(noisy)
    assert Capacities.of(noisy, seed=1) != Capacities.of(noisy)


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (50.0, 2.0, ("at least 8.00", "2.00", "at least 4.00")),
        (2.0, 50.0, ("2.00", "at least 8.00", "at most 0.25")),
        (2.0, 0.1, ("2.00", "at most 1.00", "at least 2.00")),
        (0.1, 2.0, ("at most 1.00", "2.00", "at most 0.50")),
        (50.0, 50.0, ("at least 8.00", "at least 8.00", "None")),
        (0.1, 0.1, ("at most 1.00", "at most 1.00", "None")),
        (50.0, 0.1, ("at least 8.00", "at most 1.00", "at least 8.00")),
    ],
)
def test_beyond_the_rates_that_were_tried_there_are_bounds(
    ours: float, theirs: float, words: tuple[str, str, str]
) -> None:
    found = Capacities.of(curve(ours, theirs))
    assert found is not None
    assert (str(found.ours), str(found.theirs), str(found.ratio)) == words
    json.dumps(found.to_dict(), allow_nan=False)


def test_no_pairs_have_no_capacity() -> None:
    assert Capacities.of({}) is None
    assert Capacities.of({1.0: []}) is None


def test_what_both_turns_of_a_pair_suffer_does_not_widen_their_difference() -> None:
    [*pairs] = curve(4.0, 2.0, common=0.3, noise=0.001)[4.0]
    found = Difference.of(pairs)
    assert found.mean == pytest.approx(0.4, abs=0.005)
    assert found.half < 0.005
    assert found.is_above
    assert not found.is_below


def test_a_difference_counts_beyond_its_spread_alone() -> None:
    wide = [(0.8, 0.9), (0.9, 0.8), (0.7, 0.9), (0.9, 0.9)]
    assert not Difference.of(wide).is_below
    even = [(0.8, 0.9), (0.81, 0.9), (0.79, 0.9), (0.8, 0.9)]
    assert Difference.of(even).is_below
    # By hand: standard deviation 0.00816, of the mean 0.00408, times 3.18.
    assert Difference.of(even).half == pytest.approx(0.013, abs=1e-4)


@pytest.mark.parametrize("count", [0, 1])
def test_few_pairs_prove_nothing(count: int) -> None:
    found = Difference.of([(0.1, 0.9)] * count)
    assert not found.is_below
    assert not found.is_above
    assert math.isnan(found.half)
    assert json.dumps(found.to_dict(), allow_nan=False)
    assert in_percent(found.to_dict()) == ("-80.0" if count else "-")


def test_curves_are_made_of_the_pairs_that_may_be_compared() -> None:
    faster = replace(CELL, rate=4.0)
    pairs = Pairs(
        [
            *(result(system, pair, 0.9) for pair in range(3) for system in "ab"),
            result("a", 0, 0.7, cell=faster),
            result("b", 0, 0.6, cell=faster, lone_before_s=0.3),
            result("a", 1, 0.8, cell=faster),
            result("b", 1, 0.6, cell=faster),
        ]
    )
    assert curve_of(pairs, [CELL, faster], "a", "b") == {2.0: [(0.9, 0.9)] * 3, 4.0: [(0.8, 0.6)]}


def test_cells_are_grouped_by_all_but_their_rate() -> None:
    busy = replace(CELL, busy=True)
    cells = [CELL, busy, replace(CELL, rate=4.0)]
    assert list(by_group(cells).values()) == [[CELL, cells[2]], [busy]]
