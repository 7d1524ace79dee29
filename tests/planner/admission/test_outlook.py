"""What those who run already will hold and need, against stepping through time."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from itertools import combinations

import numpy as np
import pytest

from minserve.planner.admission.outlook import Demand, Holding, build_outlook, group_tiers


def held_at(holdings: list[Holding], time: float, now: float) -> float:
    """Blocks held right after that moment."""
    held = 0.0
    for one in holdings:
        if math.isinf(one.end_s):
            held += one.blocks_end
        elif time < one.end_s:
            grown = (time - now) / (one.end_s - now)
            held += one.blocks_now + (one.blocks_end - one.blocks_now) * grown
    return held


@pytest.mark.parametrize("seed", range(40))
def test_free_blocks_are_what_is_left_at_the_worst_moment_to_come(seed: int) -> None:
    rng = random.Random(seed)
    now = rng.uniform(0, 100)
    holdings = []
    for _ in range(rng.randint(1, 12)):
        first = rng.randint(1, 40)
        end = math.inf if rng.random() < 0.15 else now + rng.uniform(0.01, 5)
        holdings.append(Holding(first, first + rng.randint(0, 30), end))
    demands = [Demand(0, now, now + rng.uniform(0.1, 5)) for _ in range(3)]
    outlook = build_outlook(
        now, now + rng.uniform(0.1, 6), demands, holdings,
        num_tiers=1, num_blocks=1000, free_seqs=8,
    )  # fmt: skip
    steps = np.linspace(now, now + 6, 6001)
    ends = [one.end_s - 1e-9 for one in holdings if not math.isinf(one.end_s)]
    for start, free in zip(outlook.starts, outlook.free_blocks, strict=True):
        times = [start, *(t for t in (*steps, *ends) if t > start)]
        worst = max(held_at(holdings, time, now) for time in times)
        assert 1000 - math.ceil(worst + 1e-6) <= free <= 1000 - math.ceil(worst - 1e-6)


def test_outputs_that_end_in_turn_never_hold_all_their_blocks_at_once() -> None:
    in_turn = [Holding(10, 10 + 10 * i, 1.0 * i) for i in range(1, 5)]
    outlook = build_outlook(0.0, 0.5, [], in_turn, num_tiers=0, num_blocks=200, free_seqs=8)
    assert 200 - sum(one.blocks_end for one in in_turn) == 60
    # Each grows by 10 a second: 4 x 20 at 1 s, 3 x 30 at 2 s, 2 x 40 at 3 s, 50 at 4 s.
    assert outlook.free_blocks.tolist() == [110]


def test_nobody_holds_nothing() -> None:
    outlook = build_outlook(3.0, 4.0, [], [], num_tiers=2, num_blocks=50, free_seqs=1)
    assert outlook.free_blocks.tolist() == [50]


def test_what_begins_after_the_horizon_takes_nothing_before_it() -> None:
    demands = [Demand(0, 0.0, 9.0), Demand(0, 5.0, 9.0)]
    outlook = build_outlook(0.0, 1.0, demands, [], num_tiers=1, num_blocks=10, free_seqs=8)
    assert outlook.starts.tolist() == [0.0, 1.0]
    assert outlook.counts.tolist() == [[1], [2]]


@pytest.mark.parametrize("seed", range(20))
def test_tiers_demand_as_little_as_any(seed: int) -> None:
    rng = random.Random(seed)
    paces = [(rng.choice([0.03, 0.04, 0.05, 0.07, 0.1, 0.3, 2.0]), 10) for _ in range(15)]
    tiers, index = group_tiers(paces)
    distinct = sorted({tpot for tpot, _ in paces})
    assert len(tiers) == min(3, len(distinct))

    def demanded(begins: Iterable[float]) -> float:
        """Tokens per second if every pace joins the nearest tier that is not slower."""
        tight = sorted(begins)
        return sum(1 / max(b for b in tight if b <= tpot) for tpot, _ in paces)

    assert all(tiers[index[tpot]].tpot_s <= tpot for tpot in distinct)
    found = demanded(tier.tpot_s for tier in tiers)
    others = combinations(distinct[1:], len(tiers) - 1)
    assert found == pytest.approx(min(demanded([distinct[0], *other]) for other in others))
