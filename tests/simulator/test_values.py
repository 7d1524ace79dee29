"""Classes that are equal but for their value, on a device that cannot keep all their SLOs."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest
from toy import run, single

from minserve.slo.objectives import SLO
from minserve.workload.conversation import Conversation

# Requests per second of which about nine in ten keep their SLO.
CAPACITY = 38.0


def workload(rate: float, values: Mapping[str, float]) -> list[Conversation]:
    """Poisson arrivals of two classes, of which every fifth request is gold."""
    slos = {
        name: SLO(ttft_slowdown=24, tpot_slowdown=4, name=name, value=value)
        for name, value in values.items()
    }
    rng, now, found = random.Random(0), 0.0, []
    for _ in range(250):
        now += max(1, round(rng.expovariate(rate) * 4096)) / 4096
        slo = slos["gold" if rng.random() < 0.2 else "plain"]
        found.append(single(now, rng.randint(50, 300), rng.randint(2, 16), slo))
    return found


def attainment(policy: str, rate: float, **values: float) -> dict[str, float]:
    verdicts = run(workload(rate, values), policy=policy).verdicts
    kept = {name: [one.attained for one in verdicts if one.name == name] for name in values}
    return {name: sum(each) / len(each) for name, each in kept.items()}


def test_within_capacity_values_matter_little() -> None:
    for gold in (1, 4):
        kept = attainment("dp", CAPACITY, gold=gold, plain=1)
        assert kept["plain"] > 0.87
        assert kept["gold"] > 0.95


@pytest.mark.parametrize(("policy", "least"), [("dp", 0.93), ("edf", 0.78)])
def test_at_twice_the_capacity_the_valued_class_keeps_its_slos(policy: str, least: float) -> None:
    alike = attainment(policy, 2 * CAPACITY, gold=1, plain=1)
    assert alike["gold"] < 0.75
    assert alike["plain"] < 0.7
    valued = attainment(policy, 2 * CAPACITY, gold=4, plain=1)
    assert valued["gold"] >= max(least, alike["gold"] + 0.2)
    assert valued["plain"] < alike["plain"]
    turned = attainment(policy, 2 * CAPACITY, gold=1, plain=4)
    assert turned["gold"] < alike["gold"]
    assert turned["plain"] > valued["plain"]
