"""Prefill rates: three ways to ask, and what the program takes for granted about them."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from minserve.planner.admission.outlook import Tier
from minserve.planner.admission.prefill_rates import INFEASIBLE, PrefillRates
from minserve.planner.predict.eager import NO_MIXED, MixedLimit
from minserve.planner.predict.perf_model import BatchShape, PerfModel, Piece

WINDOW_S, GUARD_S, SHARE = 0.15, 0.003, 0.9


def random_device(rng: random.Random) -> PerfModel:
    """A flat piece and a steep one; what makes a batch eager costs nothing, little or much."""
    extra = (rng.choice([0.0, 0.002, 0.03]) for _ in range(2))
    flat = Piece(
        rng.choice([0.0, 1e-5]), rng.choice([0.0, 1e-4]), 1e-8, eager=next(extra), base=0.025
    )
    steep = Piece(rng.uniform(1e-5, 1e-3), 1e-5, 1e-8, 1e-9, eager=next(extra), base=0.003)
    mixed = rng.choice([NO_MIXED, MixedLimit(64, 16), MixedLimit(1000, 16)])
    model = PerfModel([flat, steep], mixed=mixed)
    model.drift = rng.choice([1.0, 0.8, 1.3])
    return model


def random_tiers(rng: random.Random, num_tiers: int) -> list[Tier]:
    return [
        Tier(tpot_s=rng.uniform(0.03, 0.2), context_tokens=rng.uniform(0, 900))
        for _ in range(num_tiers)
    ]


def rates_of(model: PerfModel, tiers: list[Tier]) -> PrefillRates:
    return PrefillRates(model, tiers, window_s=WINDOW_S, guard_s=GUARD_S, share=SHARE)


def random_rates(rng: random.Random, num_tiers: int) -> PrefillRates:
    return rates_of(random_device(rng), random_tiers(rng, num_tiers))


@pytest.mark.parametrize("num_tiers", [0, 1, 3])
def test_rates_agree_however_they_are_asked_for(num_tiers: int) -> None:
    infeasible = 0
    for seed in range(50):
        rng = random.Random(seed)
        rates = random_rates(rng, num_tiers)
        counts = np.array([[rng.randint(0, 80) for _ in range(num_tiers)] for _ in range(12)])
        counts = counts.reshape(12, num_tiers).astype(np.int64)
        single = [rates.one(row) for row in counts.tolist()]
        infeasible += single.count(INFEASIBLE)
        assert rates(counts) == pytest.approx(np.array(single))
        sums = rates.of_sums(counts[:5], counts)
        assert sums.shape == (5, 12)
        assert sums == pytest.approx(rates(counts[:5, None] + counts))
    assert num_tiers == 0 or infeasible > 20


def rate_by_the_clock(model: PerfModel, tiers: list[Tier], counts: list[int]) -> float:
    """By predictions of whole batches alone: the longest chunk that every batch can hold beside
    its share of the decodes, found by halving.
    """
    windows = [tier.tpot_s for tier, count in zip(tiers, counts, strict=True) if count]
    longest = min([WINDOW_S, *windows])
    rate = rate_in_windows(model, tiers, counts, longest)
    if rate == INFEASIBLE or not model.mixed.max_tokens:
        return rate
    # Graphs may be run in shorter batches: the best of many lengths.
    shorter = (longest * 0.98**i for i in range(180))
    graphed = (rate_in_windows(model, tiers, counts, one, graphs=True) for one in shorter)
    return max(rate, *graphed)


def rate_in_windows(
    model: PerfModel, tiers: list[Tier], counts: list[int], window: float, graphs: bool = False
) -> float:
    """In batches of a length, all of them graphs or not."""
    decodes = [count * window / tier.tpot_s for tier, count in zip(tiers, counts, strict=True)]
    contexts = sum(n * (tier.context_tokens + 1) for tier, n in zip(tiers, decodes, strict=True))

    def fits(num_tokens: float, *, eager: int) -> bool:
        shape = BatchShape(sum(decodes) + num_tokens, 1 + sum(decodes), contexts, contexts)
        return model.predict(replace(shape, eager=eager)) + GUARD_S <= SHARE * window

    if not fits(0.0, eager=0):
        return INFEASIBLE
    eager = 0 if graphs else 1
    if not fits(0.0, eager=eager):
        return 0.0
    low, high = 0.0, max(0.0, model.mixed.max_tokens - sum(decodes)) if graphs else 1e9
    for _ in range(30 if graphs else 80):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle, eager=eager) else (low, middle)
    return low / window


@pytest.mark.parametrize("num_tiers", [0, 1, 3])
def test_a_rate_is_what_every_batch_can_hold_by_its_predicted_time(num_tiers: int) -> None:
    found: Counter[str] = Counter()
    for seed in range(100):
        rng = random.Random(seed)
        model, tiers = random_device(rng), random_tiers(rng, num_tiers)
        counts = [rng.randint(0, 40) for _ in tiers]
        expected = rate_by_the_clock(model, tiers, counts)
        rel = 4e-2 if model.mixed.max_tokens else 1e-6  # lengths are tried, not found
        assert rates_of(model, tiers).one(counts) == pytest.approx(expected, rel=rel, abs=1e-6)
        found["some" if expected > 0 else "none" if expected == 0.0 else "infeasible"] += 1
    assert found["some"] > 20
    if num_tiers:
        assert min(found["none"], found["infeasible"]) > 1, "decodes keep their pace, or not"


def test_another_decode_never_leaves_prefill_more() -> None:
    for seed in range(100):
        rng = random.Random(seed)
        rates = random_rates(rng, 3)
        counts = np.array([[rng.randint(0, 30) for _ in range(3)] for _ in range(20)])
        more = counts + np.eye(3, dtype=np.int64)[rng.randrange(3)]
        assert (rates(more) <= rates(counts) + 1e-6).all()
