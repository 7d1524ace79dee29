"""Prefill rates with speculation, against the plain formula at every vector of lengths."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest

from minserve.planner.admission.outlook import Tier
from minserve.planner.admission.prefill_rates import (
    INFEASIBLE,
    PrefillRates,
    TierSpeculation,
)
from minserve.planner.predict.acceptance import cautious_tokens
from minserve.planner.predict.perf_model import PerfModel, Piece

WINDOW_S, GUARD_S, SHARE, LONGEST = 0.2, 0.003, 0.9, 4
SETTINGS = {"window_s": WINDOW_S, "guard_s": GUARD_S, "share": SHARE}


def random_device(rng: random.Random) -> PerfModel:
    draft = {"draft_steps": rng.choice([0.0, 1e-3]), "draft_tokens": rng.choice([0.0, 2e-5])}
    draft["eager"] = rng.choice([0.0, 0.004])
    flat = Piece(rng.choice([0.0, 1e-5]), rng.choice([0.0, 1e-4]), 1e-8, base=0.025, **draft)
    steep = Piece(rng.uniform(1e-5, 1e-3), 1e-5, 1e-8, 1e-9, base=0.003, **draft)
    return PerfModel([flat, steep])


def random_tiers(rng: random.Random, num: int) -> list[Tier]:
    tpots = sorted(rng.uniform(0.03, 0.2) for _ in range(num))
    return [Tier(tpot_s=tpot, context_tokens=rng.uniform(0, 900)) for tpot in tpots]


def plain_formula(
    model: PerfModel,
    tiers: list[Tier],
    acceptance: tuple[float, ...],
    lengths: tuple[int, ...],
    counts: tuple[int, ...],
) -> float:
    """Tokens per second left to prefills, where each tier drafts at its length."""
    tpots = [
        tier.tpot_s * cautious_tokens(a, length)
        for tier, a, length in zip(tiers, acceptance, lengths, strict=True)
    ]
    window = min([WINDOW_S, *(t for t, count in zip(tpots, counts, strict=True) if count)])
    rate = float("inf")
    for p in model.pieces:
        left = SHARE * window - GUARD_S - p.base - p.seqs - p.draft_steps * max(lengths)
        for tier, count, tpot, length in zip(tiers, counts, tpots, lengths, strict=True):
            # One verification: the newest token and the drafts, each attending one further.
            pairs = sum(tier.context_tokens + 1 + place for place in range(length + 1))
            own = p.tokens * (1 + length) + p.seqs + p.attention_pairs * pairs
            own += p.context_tokens * (tier.context_tokens + 1 + length) + p.draft_tokens * length
            left -= count * window / tpot * own
        if left < 0:
            return INFEASIBLE
        left = max(0.0, left - p.eager)  # decodes alone are a graph
        if left == 0.0:
            rate = 0.0
        elif p.tokens > 0:
            rate = min(rate, left / p.tokens / window)
    return rate


def enumeration(tiers: list[Tier], acceptance: tuple[float, ...]) -> set[tuple[int, ...]]:
    """One tier's length bounds the batch; the others take the shortest that does not."""
    stretched = [
        [tier.tpot_s * cautious_tokens(a, n) for n in range(LONGEST + 1)]
        for tier, a in zip(tiers, acceptance, strict=True)
    ]
    found = {(0,) * len(tiers)}
    for own in stretched:
        for window in own:
            found.add(
                tuple(
                    next((n for n, t in enumerate(other) if t >= window), other.index(max(other)))
                    for other in stretched
                )
            )
    return found


def example(seed: int, num: int) -> tuple[PerfModel, list[Tier], tuple, tuple, random.Random]:
    rng = random.Random(seed)
    model, tiers = random_device(rng), random_tiers(rng, num)
    acceptance = tuple(rng.choice([0.0, 0.3, 0.6, 0.8, 0.95]) for _ in tiers)
    return model, tiers, acceptance, tuple(rng.randint(0, 20) for _ in tiers), rng


def speculative(
    model: PerfModel, tiers: list[Tier], acceptance: tuple[float, ...], *near: tuple[int, ...]
) -> PrefillRates:
    speculation = TierSpeculation(acceptance=acceptance, max_tokens=LONGEST, near=near)
    return PrefillRates(model, tiers, speculation=speculation, **SETTINGS)


@pytest.mark.parametrize("num", [1, 2, 3])
def test_near_the_given_counts_the_best_of_the_enumeration_is_found(num: int) -> None:
    longer = 0
    for seed in range(60):
        model, tiers, acceptance, counts, rng = example(seed, num)
        others = tuple(n + rng.randint(0, 10) for n in counts)
        rates = speculative(model, tiers, acceptance, counts, others)
        for near in (counts, others):
            by_lengths = {
                lengths: plain_formula(model, tiers, acceptance, lengths, near)
                for lengths in enumeration(tiers, acceptance)
            }
            assert rates.one(near) == pytest.approx(max(by_lengths.values()))
            chosen = rates.lengths(near)
            assert by_lengths[chosen] == pytest.approx(rates.one(near))
            longer += any(chosen)
    assert 20 < longer < 120, "speculation pays for some and not for others"


@pytest.mark.parametrize("num", [1, 2])
def test_no_vector_of_lengths_leaves_prefills_much_more(num: int) -> None:
    shares = []
    for seed in range(60):
        model, tiers, acceptance, counts, _ = example(seed, num)
        best = max(
            plain_formula(model, tiers, acceptance, lengths, counts)
            for lengths in product(range(LONGEST + 1), repeat=num)
        )
        found = speculative(model, tiers, acceptance, counts).one(counts)
        assert found <= best + 1e-6
        if best > 0:
            shares.append(max(0.0, found) / best)
    assert len(shares) > 20
    assert sum(share > 0.97 for share in shares) >= 0.9 * len(shares)


def test_far_from_the_given_counts_the_rates_are_those_of_some_lengths() -> None:
    for seed in range(30):
        model, tiers, acceptance, counts, rng = example(seed, 2)
        rates = speculative(model, tiers, acceptance, counts)
        for _ in range(10):
            far = tuple(rng.randint(0, 60) for _ in tiers)
            chosen = rates.lengths(far)
            expected = plain_formula(model, tiers, acceptance, chosen, far)
            assert rates.one(far) == pytest.approx(expected)


@pytest.mark.parametrize("num", [0, 1, 3])
def test_speculative_rates_agree_however_they_are_asked_for(num: int) -> None:
    for seed in range(30):
        model, tiers, acceptance, counts, rng = example(seed, num)
        rates = speculative(model, tiers, acceptance, counts, (0,) * num)
        table = np.array([[rng.randint(0, 40) for _ in range(num)] for _ in range(8)])
        table = table.reshape(8, num).astype(np.int64)
        assert rates(table) == pytest.approx(np.array([rates.one(row) for row in table.tolist()]))
        assert rates.of_sums(table[:3], table) == pytest.approx(rates(table[:3, None] + table))


def test_speculation_never_leaves_prefills_less_and_another_decode_never_more() -> None:
    gained = 0
    for seed in range(80):
        model, tiers, acceptance, counts, rng = example(seed, 3)
        rates, plain = (
            speculative(model, tiers, acceptance, counts),
            PrefillRates(model, tiers, **SETTINGS),
        )
        table = np.array([[rng.randint(0, 40) for _ in range(3)] for _ in range(20)])
        assert (rates(table) >= plain(table) - 1e-9).all()
        more = table + np.eye(3, dtype=np.int64)[rng.randrange(3)]
        assert (rates(more) <= rates(table) + 1e-6).all()
        gained += (rates(table) > plain(table) + 1.0).any()
    assert gained > 20


def test_thresholds_are_the_chances_of_the_last_tokens_worth_drafting() -> None:
    found = 0
    for seed in range(40):
        model, tiers, acceptance, counts, _ = example(seed, 3)
        rates = speculative(model, tiers, acceptance, counts)
        lengths, thresholds = rates.lengths(counts), rates.thresholds(counts)
        assert thresholds.keys() == {tier for tier, length in enumerate(lengths) if length}
        for tier, threshold in thresholds.items():
            assert threshold == pytest.approx(acceptance[tier] ** lengths[tier])
            assert 0.0 < threshold < 1.0
            found += 1
    assert found > 10


def test_drafts_are_needed_where_decodes_alone_do_not_keep_their_pace() -> None:
    found = set()
    for seed in range(60):
        model, tiers, acceptance, counts, rng = example(seed, 2)
        rates = speculative(model, tiers, acceptance, counts)
        many = tuple(rng.choice([1, 10, 100]) * count for count in counts)
        needed = rates.need_drafts(many)
        assert needed == (PrefillRates(model, tiers, **SETTINGS).one(many) < 0)
        found.add(needed)
    assert found == {True, False}


def test_drafts_that_are_never_accepted_change_nothing() -> None:
    for seed in range(20):
        model, tiers, _, counts, _ = example(seed, 2)
        rates = speculative(model, tiers, (0.0, 0.0), counts)
        assert rates.one(counts) == pytest.approx(
            PrefillRates(model, tiers, **SETTINGS).one(counts)
        )
        assert rates.lengths(counts) == (0, 0)
