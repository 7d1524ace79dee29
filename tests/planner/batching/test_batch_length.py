"""How long a batch may be: a line without scatter, a weighing with it, and what credit that builds."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minserve.planner.batching.batch_length import CALM, URGENT, allowed_s
from minserve.planner.predict.perf_model import BatchShape, PerfModel, Piece

SHAPE = BatchShape.of([(0, 10)])
# Decodes take 25 ms, and a second of prefills is worth 12 requests: 850 tokens each.
LEAST_S, PER_S = 0.025, 12.0


def model_with(sigma: float) -> PerfModel:
    """A model that has seen so much scatter."""
    model, rng = PerfModel([Piece(tokens=7e-5, base=0.025)], margin=1.0), random.Random(0)
    for _ in range(4000):
        model.observe(SHAPE, model.profiled(SHAPE) * math.exp(rng.gauss(0.0, sigma)))
    return model


QUIET, NOISY, WILD = model_with(0.0), model_with(0.2), model_with(0.4)


def test_without_scatter_the_nearest_deadline_is_the_limit_whatever_is_to_gain() -> None:
    stakes = [(0.05, 1.0), (0.08, 1.0)]
    for gain in (0.0, PER_S * CALM, PER_S * URGENT):
        found = allowed_s(stakes, QUIET, gain_per_s=gain, least_s=LEAST_S, most_s=1.0)
        assert found == pytest.approx(0.05, rel=0.005)


def test_the_more_it_scatters_the_shorter_the_batch() -> None:
    lengths = [
        allowed_s([(0.05, 1.0)] * 3, one, gain_per_s=PER_S, least_s=LEAST_S, most_s=1.0)
        for one in (QUIET, NOISY, WILD)
    ]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[1] < 0.9 * lengths[0]


def test_more_promises_in_danger_make_it_shorter_and_more_to_gain_longer() -> None:
    def found(num: int, gain: float) -> float:
        return allowed_s([(0.05, 1.0)] * num, NOISY, gain_per_s=gain, least_s=0.0, most_s=1.0)

    assert found(1, PER_S) > found(4, PER_S) > found(20, PER_S)
    assert found(4, 4 * PER_S) > found(4, PER_S) > found(4, PER_S / 4)


def test_with_nothing_to_gain_there_is_hardly_a_risk() -> None:
    """Best effort comes in every iteration: 1% in each would break most of the long outputs."""
    found = allowed_s([(0.05, 1.0)], NOISY)
    assert NOISY.risk(0.05 / found) < 0.001


def test_nobody_is_endangered_where_no_prefill_would_begin_in_time() -> None:
    """Before the first token of a prefill the batch takes 30 ms more, and 25 are left."""
    found = allowed_s(
        [(0.05, 1.0)], NOISY, gain_per_s=1000.0, least_s=LEAST_S, start_s=0.03, most_s=1.0
    )
    assert NOISY.risk(0.05 / found) < 0.01


def test_nobody_is_endangered_for_more_than_there_is_to_do() -> None:
    """Ten tokens are waiting: they fit beside the decodes, and nothing longer is worth a risk."""
    found = allowed_s(
        [(0.05, 1.0)], NOISY, gain_per_s=1000.0, least_s=LEAST_S, most_s=LEAST_S + 0.001
    )
    assert NOISY.risk(0.05 / found) < 0.01


@settings(max_examples=200, derandomize=True)
@given(
    st.lists(st.tuples(st.floats(0.03, 0.5), st.floats(0.1, 5.0)), min_size=1, max_size=80),
    st.floats(0.1, 100.0),
    st.sampled_from([0.0, 0.01, 0.1]),
)
def test_the_length_is_worth_as_much_as_the_best_of_a_fine_grid(
    stakes: list[tuple[float, float]], gain: float, start_s: float
) -> None:
    """Against brute force: expected value over thousands of lengths."""
    stakes = sorted(stakes)
    soonest, least_s = stakes[0][0], 0.02

    def worth(seconds: float) -> float:
        loss = sum(value * NOISY.risk(left / seconds) for left, value in stakes)
        return gain * max(0.0, seconds - least_s - start_s) - loss

    found = allowed_s(stakes, NOISY, gain_per_s=gain, least_s=least_s, start_s=start_s, most_s=10.0)
    shortest = max(least_s, soonest / NOISY.bound(1, 0.0005))
    longest = soonest / NOISY.bound(1, 0.3)
    if longest <= shortest:
        return
    grid = [shortest + (longest - shortest) * i / 2000 for i in range(2001)]
    best = max(grid, key=worth)
    # Ten lengths are compared, and deadlines apart by 3% are taken as one.
    step = 0.12 * (gain * best + sum(v * NOISY.risk(left / best) for left, v in stakes))
    assert worth(found) >= worth(best) - step - 0.02


@pytest.mark.parametrize("sigma", [0.1, 0.2])
def test_a_decode_is_kept_further_ahead_the_more_it_scatters(sigma: float) -> None:
    """A decode with a pace of 50 ms and endless prefills beside it, on the device itself."""
    ahead, late = {}, {}
    for scatter in (0.0, sigma):
        model, rng = model_with(scatter), random.Random(1)
        credit, credits, late[scatter] = 0.05, [], 0
        for _ in range(600):
            p = allowed_s([(credit, 1.0)], model, gain_per_s=PER_S, least_s=LEAST_S, most_s=1.0)
            credit -= p * math.exp(rng.gauss(0.0, scatter) - scatter**2 / 2)
            if credit < 0:
                late[scatter] += 1
                credit = 0.0
            credit += 0.05
            credits.append(credit)
        ahead[scatter] = sum(credits) / len(credits)
    assert late[0.0] == 0
    assert ahead[0.0] == pytest.approx(0.05, rel=0.01)
    assert ahead[sigma] > (1 + sigma) * ahead[0.0]
    assert late[sigma] < 0.06 * 600
