"""Capacities of several replicas: slow motion changes nothing, results are kept and gone on with."""

from __future__ import annotations

from pathlib import Path

import pytest
from replicas import Results, by_scenario, capacity_table

from minserve.errors import WorkloadError
from minserve.simulator.simulation import simulate
from parts.replicas.overhead import routing_us
from parts.replicas.runs import ROUTERS, ReplicaCase, Slowed

SETTINGS = {"seconds": 30.0}


@pytest.mark.parametrize(
    ("scenario", "rate"), [("chatbot", 16.0), ("coding", 16.0), ("tools", 200.0)]
)
def test_slow_motion_attains_about_the_same(scenario: str, rate: float) -> None:
    """The planner's guard time is not slowed, so some requests may differ."""
    found = []
    for factor in (1.0, 4.0):
        slowed = Slowed.of(scenario, factor)
        workload = slowed.scenario.draw(rate / factor, seed=3, num_requests=150)
        verdicts = simulate(workload, slowed.setup(ReplicaCase(scenario, 2, "slo"))).verdicts
        found.append(sum(verdict.attained for verdict in verdicts) / len(verdicts))
    assert found[0] == pytest.approx(found[1], abs=0.04)
    assert 0.1 < found[0] < 0.95


def test_results_are_kept_and_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results = Results.open(path, SETTINGS)
    results.runs["case"] = {"2": [{"attainment": 0.5}]}
    results.capacity["case"] = 1.5
    results.save()
    again = Results.open(path, SETTINGS)
    assert (again.runs, again.capacity) == (results.runs, results.capacity)
    with pytest.raises(WorkloadError, match="another"):
        Results.open(path, {"seconds": 12.0})


def test_one_replica_counts_for_every_router() -> None:
    cases = [
        ReplicaCase("chatbot", 1, "slo"),
        *(ReplicaCase("chatbot", 2, router) for router in ROUTERS),
    ]
    rates = {case.name: 4.0 * case.replicas for case in cases}
    assert by_scenario(rates, cases)["chatbot"] == {r: {"1": 4.0, "2": 8.0} for r in ROUTERS}
    results = Results(None, SETTINGS, capacity=rates, expected={cases[0].name: 4.2})
    assert capacity_table(results, cases).splitlines()[1].split()[-3:] == ["4.00", "4.20", "4.00"]


@pytest.mark.parametrize("router", ROUTERS)
def test_decisions_between_many_replicas_are_timed(router: str) -> None:
    assert 0 < routing_us(router, seed=0)["p50"] <= routing_us(router, seed=0)["p99"]
