"""Arrival processes: as many as asked in the time asked, and as bursty."""

from __future__ import annotations

import random
import statistics
from itertools import pairwise

import pytest

from minserve.errors import WorkloadError
from minserve.workload.arrivals import check_burstiness, gamma_arrivals, recorded_arrivals


def gaps_of(times: list[float]) -> list[float]:
    return [later - now for now, later in pairwise(times)]


def variation(values: list[float]) -> float:
    return statistics.pstdev(values) / statistics.fmean(values)


@pytest.mark.parametrize("count", [1, 2, 50])
def test_drawn_arrivals_are_exactly_as_many_as_asked_within_the_time(count: int) -> None:
    times = gamma_arrivals(count, 20.0, random.Random(0), burstiness=0.3)
    assert len(times) == count
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] < 20.0


@pytest.mark.parametrize(("burstiness", "expected"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_gaps_vary_as_the_burstiness_says(burstiness: float, expected: float) -> None:
    times = gamma_arrivals(20_000, 1000.0, random.Random(3), burstiness=burstiness)
    assert variation(gaps_of(times)) == pytest.approx(expected, rel=0.05)


def test_the_same_seed_draws_the_same() -> None:
    first, again, other = (gamma_arrivals(9, 1.0, random.Random(seed)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("burstiness", [0, -1, float("nan"), float("inf")])
def test_a_burstiness_that_cannot_be_drawn_is_refused(burstiness: float) -> None:
    with pytest.raises(WorkloadError, match="burstiness"):
        check_burstiness(burstiness)


TIMES = [100.0, 100.1, 100.2, 107.0]


def test_a_whole_recording_keeps_its_gaps_to_another_scale() -> None:
    times = recorded_arrivals(TIMES, 10.0, 0, 4, 5.0)
    assert times == pytest.approx([0.0, 0.05, 0.1, 3.5])


def test_a_stretch_is_contiguous_and_goes_on_with_the_beginning() -> None:
    # Gaps of rows 2, 3, 0: 6.8, 3 (to the beginning again), 0.1; twice as slow as recorded.
    times = recorded_arrivals(TIMES, 10.0, 2, 3, 2 * 9.9)
    assert times == pytest.approx([0.0, 13.6, 19.6])


def test_a_recording_repeats_where_it_is_too_short() -> None:
    times = recorded_arrivals(TIMES, 10.0, 0, 8, 20.0)
    assert times[4:] == pytest.approx([10.0 + time for time in times[:4]])


def test_arrivals_at_once_stay_at_once_and_before_the_end() -> None:
    assert recorded_arrivals([0.0, 0.0, 0.0], 0.0, 0, 3, 5.0) == [0.0, 0.0, 0.0]
    times = recorded_arrivals([0.0, 4.0, 4.0], 10.0, 0, 2, 5.0)
    assert times == pytest.approx([0.0, 5.0 * 4 / 4])
    assert times[-1] < 5.0
