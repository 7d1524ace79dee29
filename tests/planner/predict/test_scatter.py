"""`Scatter`: the drift is a mean, bounds cover their share of sums, changes of speed are followed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

import pytest

from minserve.planner.predict.scatter import MOST_BOUND, Scatter

Draw = Callable[[random.Random], float]


def lognormal(sigma: float) -> Draw:
    return lambda rng: math.exp(rng.gauss(0.0, sigma))


def gamma(shape: float) -> Draw:
    return lambda rng: rng.gammavariate(shape, 1.0 / shape)


def two_speeds(rng: random.Random) -> float:
    """Nine of ten iterations are quick, the others take half as long again."""
    return (1.5 if rng.random() < 0.1 else 1.0) * rng.uniform(0.98, 1.02)


def feed(scatter: Scatter, times: Iterator[float]) -> None:
    """Show it measured times, as ratios to what it expects."""
    for seconds in times:
        scatter.observe(seconds / scatter.drift)


def settled(draw: Draw, seed: int = 0, num: int = 3000) -> Scatter:
    rng = random.Random(seed)
    scatter = Scatter(1.1, 0.1)
    feed(scatter, (draw(rng) for _ in range(num)))
    return scatter


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.2, 0.4])
def test_the_drift_is_the_mean_of_a_skewed_scatter_not_its_median(sigma: float) -> None:
    rng, scatter, seen = random.Random(2), Scatter(1.1, 0.1), []
    for i in range(20_000):
        scatter.observe(math.exp(rng.gauss(0.0, sigma)) / scatter.drift)
        if i >= 1000:
            seen.append(scatter.drift)
    assert sum(seen) / len(seen) == pytest.approx(math.exp(sigma**2 / 2), rel=0.01)


@pytest.mark.parametrize(
    "draw",
    [lognormal(0.05), lognormal(0.2), lognormal(0.4), gamma(25.0), two_speeds],
    ids=["lognormal 0.05", "lognormal 0.2", "lognormal 0.4", "gamma", "two speeds"],
)
@pytest.mark.parametrize("iterations", [1, 4, 16, 64])
def test_a_bound_covers_its_share_of_drawn_sums_of_so_many_iterations(
    draw: Draw, iterations: int
) -> None:
    """The scatter of the drift itself included: sums are drawn from where it stands by then."""
    rng, scatter, missed, num = random.Random(3), settled(draw), {0.1: 0, 0.02: 0}, 1500
    for _ in range(num):
        sums = sum(draw(rng) for _ in range(iterations)) / (iterations * scatter.drift)
        for risk in missed:
            missed[risk] += sums > scatter.bound(iterations, risk)
        feed(scatter, (draw(rng) for _ in range(5)))
    assert missed[0.1] / num == pytest.approx(0.1, abs=0.06)
    # A mixture of two speeds has a broader shoulder than a lognormal, until many are added up.
    assert missed[0.02] / num < (0.11 if draw is two_speeds and iterations <= 16 else 0.045)


def test_the_bound_of_many_iterations_is_far_below_that_of_one() -> None:
    scatter = settled(lognormal(0.2))
    bounds = [scatter.bound(n, 0.01) for n in (1, 4, 16, 64, 256)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > 1.45
    assert bounds[-1] < 1.1


@pytest.mark.parametrize("sigma", [0.05, 0.2, 0.4])
def test_the_risk_of_a_bound_is_the_risk_that_it_was_made_for(sigma: float) -> None:
    scatter = settled(lognormal(sigma))
    for risk in (0.3, 0.1, 0.01):
        assert scatter.risk(scatter.bound(1, risk)) == pytest.approx(risk, rel=1e-6)


def test_a_device_that_does_not_scatter_is_bound_by_the_expected_time() -> None:
    scatter = settled(lambda _: 1.0, num=5000)
    assert scatter.bound(1, 0.001) < 1.001
    assert scatter.risk(1.01) < 1e-6
    assert scatter.risk(0.99) > 0.99


@pytest.mark.parametrize("factor", [0.5, 1.5, 2.0])
@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.2])
def test_a_step_of_the_speed_is_followed_within_a_second_of_short_iterations(
    factor: float, sigma: float
) -> None:
    """A second is some 25 iterations of 40 ms; without that it would take a hundred."""
    late = 0
    for seed in range(20):
        scatter, rng = settled(lognormal(sigma), seed), random.Random(seed)
        before = scatter.bound(1, 0.01)
        feed(scatter, (factor * lognormal(sigma)(rng) for _ in range(25)))
        late += abs(scatter.drift / factor - 1.0) > 0.15
        # A step is no scatter.
        assert scatter.bound(1, 0.01) < 1.35 * before + 0.15
    assert late <= 2


def test_a_stall_is_no_change_of_speed() -> None:
    rng = random.Random(5)
    scatter = settled(lognormal(0.05))
    for _ in range(20):
        feed(scatter, iter([20.0]))
        assert scatter.drift < 1.15
        feed(scatter, (lognormal(0.05)(rng) for _ in range(100)))
        assert scatter.drift == pytest.approx(1.0, abs=0.06)
    assert scatter.bound(1, 0.01) < 1.3


def test_what_is_only_half_the_devices_doing_moves_it_half_as_far() -> None:
    whole, half = settled(lognormal(0.02)), settled(lognormal(0.02))
    start = whole.drift
    whole.observe(1.05)
    half.observe(1.05, 0.5)
    assert 0 < half.drift - start < 0.6 * (whole.drift - start)


def test_a_machine_that_stands_still_at_times_is_not_waited_for() -> None:
    scatter = settled(lambda r: 50.0 if r.random() < 0.3 else 1.0)
    assert scatter.bound(1, 0.001) <= MOST_BOUND
    assert Scatter(100.0, 0.1).bound(1, 0.001) <= MOST_BOUND


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("inf"), float("nan")])
def test_what_is_no_time_teaches_nothing(ratio: float) -> None:
    scatter = Scatter(1.1, 0.1)
    scatter.observe(ratio)
    assert (scatter.drift, scatter.num_observations) == (1.0, 0)


@pytest.mark.parametrize("factor", [0.1, 3.0, 10.0])
def test_a_large_step_is_not_overshot(factor: float) -> None:
    scatter, rng = settled(lognormal(0.05)), random.Random(0)
    feed(scatter, (factor * lognormal(0.05)(rng) for _ in range(60)))
    assert scatter.drift == pytest.approx(factor, rel=0.1)


def test_another_profile_changes_what_is_believed_of_the_speed_and_not_of_the_scatter() -> None:
    learned = settled(lambda rng: 1.4 * math.exp(rng.gauss(0.0, 0.1)))
    other = learned.rescaled(0.5)
    assert other.drift == pytest.approx(learned.drift / 2)
    assert other.variance == learned.variance
    assert other.bound(1, 0.1) == learned.bound(1, 0.1)
    # It is a first guess: where it was wrong, a few iterations put it right, and nothing else.
    drift = learned.drift
    feed(other, iter([1.0] * 8))
    assert other.drift == pytest.approx(1.0, abs=0.1)
    assert learned.drift == drift
