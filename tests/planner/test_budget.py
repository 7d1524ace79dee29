"""Prefill rates: three ways to ask, and what the program takes for granted about them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from minserve.planner.budget import INFEASIBLE, PrefillRates
from minserve.planner.outlook import Tier
from minserve.planner.perf_model import PerfModel, Piece


def random_rates(rng: random.Random, num_tiers: int) -> PrefillRates:
    flat = Piece(rng.choice([0.0, 1e-5]), rng.choice([0.0, 1e-4]), 1e-8, base=0.025)
    steep = Piece(rng.uniform(1e-5, 1e-3), 1e-5, 1e-8, 1e-9, base=0.003)
    tiers = [
        Tier(tpot_s=rng.uniform(0.03, 0.2), context_tokens=rng.uniform(0, 900))
        for _ in range(num_tiers)
    ]
    return PrefillRates(PerfModel([flat, steep]), tiers, window_s=0.15, guard_s=0.003, share=0.9)


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


def test_another_decode_never_leaves_prefill_more() -> None:
    for seed in range(100):
        rng = random.Random(seed)
        rates = random_rates(rng, 3)
        counts = np.array([[rng.randint(0, 30) for _ in range(3)] for _ in range(20)])
        more = counts + np.eye(3, dtype=np.int64)[rng.randrange(3)]
        assert (rates(more) <= rates(counts) + 1e-6).all()
