"""What the relaxations rule out, on cases small enough to see."""

from __future__ import annotations

import math

import numpy as np
import pytest

from minserve.planner.admission.bounds import Rest, latest_s, least_blocks, slowdown
from minserve.planner.admission.fluid_clock import FluidClock

NEVER = -math.inf


def rest_of(
    works: list[float],
    deadlines: list[float],
    *,
    target: int,
    end_s: float = NEVER,
    blocks: list[int] | None = None,
    forced: list[bool] | None = None,
    seqs: list[int] | None = None,
) -> Rest:
    forced = forced or [False] * len(works)
    return Rest(
        works=np.array(works),
        deadlines=np.array(deadlines),
        blocks=blocks or [1] * len(works),
        units=[0 if one else 1 for one in forced],
        seqs=seqs or [1] * len(works),
        forced=forced,
        target=target,
        end_s=end_s,
    )


def plain_clock(rate: float = 100.0) -> FluidClock:
    return FluidClock(np.array([0.0]), np.array([rate]))


def test_a_clock_turns_time_into_tokens_and_back() -> None:
    clock = FluidClock(np.array([10.0, 12.0]), np.array([100.0, 50.0]))
    assert clock.tokens(np.array([9.0, 11.0, 14.0])).tolist() == [-math.inf, 100.0, 300.0]
    assert clock.times(np.array([-1.0, 100.0, 300.0])).tolist() == [-math.inf, 11.0, 14.0]


def test_the_latest_start_leaves_time_for_those_still_needed() -> None:
    # 1 s and 2 s of work, due at 2 s and 3.5 s: both only from 0.5 s on, one of them later.
    rest = rest_of([100.0, 200.0], [2.0, 3.5], target=2)
    (latest,) = latest_s(rest, [(plain_clock(), np.ones(3))])
    assert latest[0] == pytest.approx([0.5, 1.5, math.inf], abs=1e-6)
    assert latest[1] == pytest.approx([NEVER, 1.5, math.inf], abs=1e-6)
    assert latest[2] == [NEVER, NEVER, math.inf]


def test_one_unit_may_be_missing_where_all_is_done_early() -> None:
    rest = rest_of([100.0], [2.0], target=2, end_s=1.7)
    (latest,) = latest_s(rest, [(plain_clock(), np.ones(2))])
    assert latest[0] == pytest.approx([0.7, 1.7], abs=1e-6)


def test_accepted_ones_slow_those_behind_them() -> None:
    rest = rest_of([100.0, 100.0], [2.0, 4.0], target=2)
    (latest,) = latest_s(rest, [(plain_clock(), np.array([1.0, 0.5]))])
    # The second runs at half speed, from 2 s on at the latest; so does one behind the first.
    assert latest[0] == pytest.approx([1.0, 2.0, math.inf], abs=1e-6)


def test_every_output_of_an_accepted_request_slows_those_behind_it() -> None:
    left = np.array([1.0, 0.9, 0.8, 0.5])
    rest = rest_of([100.0, 100.0], [2.0, 3.5], target=2, seqs=[3, 3])
    assert latest_s(rest, [(plain_clock(), left)])[0][0][0] == pytest.approx(0.5, abs=1e-6)
    # For all that the bound knows, only the smallest may have been accepted.
    rest = rest_of([100.0, 100.0], [2.0, 3.5], target=2, seqs=[3, 1])
    assert latest_s(rest, [(plain_clock(), left)])[0][0][0] == pytest.approx(1.0, abs=1e-6)
    rest = rest_of([100.0, 100.0], [1.4, 3.0], target=1, forced=[True, False], seqs=[2, 1])
    assert latest_s(rest, [(plain_clock(), left)])[0][1][0] == pytest.approx(1.75, abs=1e-6)


def test_forced_ones_cannot_be_passed_over() -> None:
    rest = rest_of([100.0, 100.0], [2.0, 3.0], target=1, forced=[True, False])
    assert latest_s(rest, [(plain_clock(), np.ones(3))])[0][0][0] == pytest.approx(1.0, abs=1e-6)
    free = rest_of([100.0, 100.0], [2.0, 3.0], target=1)
    assert latest_s(free, [(plain_clock(), np.ones(3))])[0][0][0] == pytest.approx(2.0, abs=1e-6)


def test_slowdown_is_that_of_the_lightest_and_never_rises() -> None:
    rates = np.array([[100.0, 80.0, 90.0, 30.0], [50.0, 45.0, 20.0, 25.0]])
    left = slowdown(rates, np.array([100.0, 50.0]), np.array([0, 1, 1, 2]))
    assert left.tolist() == [1.0, 0.9, 0.5]


def test_least_blocks_are_those_of_the_smallest() -> None:
    rest = rest_of([1.0] * 3, [9.0] * 3, target=2, blocks=[5, 3, 4])
    least = least_blocks(rest)
    assert least[0] == [7.0, 3.0, 0.0, 0.0]
    assert least[2] == [math.inf, 4.0, 0.0, 0.0]
    spared = least_blocks(rest_of([1.0] * 3, [9.0] * 3, target=2, blocks=[5, 3, 4], end_s=9.0))
    assert spared[0] == [3.0, 0.0, 0.0, 0.0]
    forced = rest_of([1.0] * 2, [9.0] * 2, target=1, blocks=[5, 3], forced=[True, False])
    assert least_blocks(forced)[0][0] == 8.0
