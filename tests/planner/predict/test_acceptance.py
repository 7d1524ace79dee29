"""Acceptance: what is expected of drafts, by enumeration, and how the estimate follows the truth."""

from __future__ import annotations

import random
from itertools import product

import pytest
from replay import make_sequence

from minserve.planner.predict.acceptance import (
    FIRST_GUESS,
    MOST,
    AcceptanceEstimator,
    cautious_tokens,
    expected_tokens,
)
from minserve.request import Sequence

RATES = [0.0, 0.1, 0.5, 0.83, 0.98, 1.0]


def distribution(acceptance: float, length: int) -> dict[int, float]:
    """Probability of each number of tokens, over every outcome of every draft."""
    found = dict.fromkeys(range(1, length + 2), 0.0)
    for outcome in product([True, False], repeat=length):
        probability, num = 1.0, 0
        for accepted in outcome:
            probability *= acceptance if accepted else 1.0 - acceptance
        while num < length and outcome[num]:
            num += 1
        found[num + 1] += probability
    return found


def sequence(name: str) -> Sequence:
    return make_sequence(name, [1, 2, 3], 100)


def feed(
    estimator: AcceptanceEstimator, seq: Sequence, rate: float, rng: random.Random, times: int = 100
) -> None:
    """Verify drafts of four tokens, each accepted at that rate."""
    for _ in range(times):
        num = 0
        while num < 4 and rng.random() < rate:
            num += 1
        estimator.verified(seq, 4, num)


@pytest.mark.parametrize("acceptance", RATES)
@pytest.mark.parametrize("length", [0, 1, 2, 5, 8])
def test_expected_tokens_are_the_mean_over_all_outcomes(acceptance: float, length: int) -> None:
    mean = sum(num * p for num, p in distribution(acceptance, length).items())
    assert expected_tokens(acceptance, length) == pytest.approx(mean)


@pytest.mark.parametrize("acceptance", RATES)
@pytest.mark.parametrize("length", [0, 1, 2, 5, 8])
@pytest.mark.parametrize("num_verifications", [1, 8, 50])
def test_cautious_tokens_are_a_standard_error_below_the_mean(
    acceptance: float, length: int, num_verifications: int
) -> None:
    outcomes = distribution(acceptance, length)
    mean = sum(num * p for num, p in outcomes.items())
    variance = sum((num - mean) ** 2 * p for num, p in outcomes.items())
    cautious = mean - (variance / num_verifications) ** 0.5
    found = cautious_tokens(acceptance, length, num_verifications)
    assert found == pytest.approx(max(1.0, cautious), abs=1e-6)
    assert 1.0 <= found <= expected_tokens(acceptance, length) + 1e-9


def test_means_of_verifications_rarely_fall_short_of_cautious_tokens() -> None:
    rng, short = random.Random(0), 0
    for _ in range(2000):
        total = 0
        for _ in range(8):
            num = 0
            while num < 4 and rng.random() < 0.7:
                num += 1
            total += num + 1
        short += total / 8 < cautious_tokens(0.7, 4, 8)
    assert 0.08 < short / 2000 < 0.25, "a standard error is exceeded one time in six"


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.6, 0.9])
def test_the_estimate_converges_to_the_true_rate(rate: float) -> None:
    found = []
    for seed in range(20):
        estimator, seq = AcceptanceEstimator(), sequence("a")
        feed(estimator, seq, rate, random.Random(seed), 200)
        found.append(estimator.rate(seq))
    assert sum(found) / len(found) == pytest.approx(rate, abs=0.04)
    assert all(abs(one - rate) < 0.2 for one in found)


def test_before_anything_was_seen_the_first_guess_holds() -> None:
    estimator = AcceptanceEstimator()
    assert estimator.rate(sequence("a")) == estimator.shared_rate == FIRST_GUESS
    assert estimator.coverage == 1.0


def test_no_estimate_is_certain() -> None:
    estimator, seq = AcceptanceEstimator(), sequence("a")
    for _ in range(5000):
        estimator.verified(seq, 8, 8)
    assert estimator.rate(seq) == estimator.shared_rate == MOST
    for _ in range(5000):
        estimator.verified(seq, 8, 0)
    assert 0.0 <= estimator.rate(seq) < 0.1


def test_tokens_behind_a_rejected_one_count_for_nothing() -> None:
    first, second = AcceptanceEstimator(), AcceptanceEstimator()
    for length, estimator in ((3, first), (8, second)):
        for _ in range(10):
            estimator.verified(sequence("a"), length, 2)
    assert first.rate(sequence("a")) == second.rate(sequence("a"))


def test_sequences_are_kept_apart_and_newcomers_are_like_all() -> None:
    estimator, rng = AcceptanceEstimator(), random.Random(1)
    good, bad, new = sequence("good"), sequence("bad"), sequence("new")
    for _ in range(100):
        feed(estimator, good, 0.95, rng, 1)
        feed(estimator, bad, 0.1, rng, 1)
    assert estimator.rate(good) > 0.8
    assert estimator.rate(bad) < 0.3
    assert estimator.rate(bad) < estimator.rate(new) == estimator.shared_rate < estimator.rate(good)


def test_a_sequence_whose_text_changes_is_followed() -> None:
    estimator, seq, rng = AcceptanceEstimator(), sequence("a"), random.Random(2)
    feed(estimator, seq, 0.95, rng, 300)
    for rate, lowest, highest in ((0.05, 0.0, 0.35), (0.95, 0.75, 1.0)):
        feed(estimator, seq, rate, rng, 150)
        assert lowest < estimator.rate(seq) < highest


def test_who_is_not_drafted_for_is_believed_to_be_like_all_again() -> None:
    estimator, rng = AcceptanceEstimator(), random.Random(3)
    given_up, other = sequence("given up"), sequence("other")
    feed(estimator, given_up, 0.0, rng, 30)
    for _ in range(300):
        feed(estimator, other, 0.8, rng, 1)
        estimator.verified(given_up, 0, 0)
    assert estimator.rate(given_up) > 0.6


def test_only_the_sequences_kept_are_remembered() -> None:
    estimator, rng = AcceptanceEstimator(), random.Random(4)
    kept, gone = sequence("kept"), sequence("gone")
    feed(estimator, kept, 0.0, rng)
    feed(estimator, gone, 0.95, rng)
    before = estimator.rate(kept)
    estimator.keep_only(["kept", "never seen"])
    assert estimator.rate(kept) == before
    assert estimator.rate(gone) == estimator.shared_rate


def test_coverage_is_the_share_of_decodes_that_could_be_drafted_for() -> None:
    estimator = AcceptanceEstimator()
    for i in range(20_000):
        estimator.asked(i % 4 == 0)
    assert estimator.coverage == pytest.approx(0.25, abs=0.01)
