"""The search for a number of replicas, against trying them all."""

from __future__ import annotations

import pytest
from toy import TOY, run, singles

from minserve.simulator.sizing import Sizing, find_replicas


@pytest.mark.parametrize("start", [1, 2, 5, 9, 40])
@pytest.mark.parametrize("needed", [1, 2, 3, 7, 8, 13, 40])
def test_finds_the_smallest_number_from_wherever_it_begins(start: int, needed: int) -> None:
    tried = []

    def measure(number: int) -> float:
        tried.append(number)
        return 0.95 if number >= needed else 0.5

    found = find_replicas(measure, start, 40)
    assert found.complete
    assert found.replicas == needed
    assert len(set(tried)) == len(tried), "nothing is measured twice"
    assert needed == 1 or found.attainment[needed - 1] == 0.5
    values = found.to_dict()
    assert values["attainment"] == 0.95
    assert values["one_fewer"] == (None if needed == 1 else 0.5)


def test_says_where_no_number_is_enough() -> None:
    found = find_replicas(lambda _: 0.1, 3, 20)
    assert found.complete
    assert found.replicas is None
    assert max(found.attainment) == 20
    assert found.to_dict()["replicas"] is None


def test_keeps_what_was_measured_before_it_was_cut_short() -> None:
    sizing = Sizing()

    def measure(number: int) -> float:
        if number > 4:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        find_replicas(measure, 1, 64, into=sizing)
    assert sizing.attainment == {1: 0.0, 2: 0.0, 4: 0.0}
    assert not sizing.complete


def test_is_right_about_simulated_replicas() -> None:
    workload = singles(60.0, 150)

    def measure(number: int) -> float:
        verdicts = run(workload, device=TOY, replicas=number, policy="sarathi").verdicts
        return sum(verdict.attained for verdict in verdicts) / len(verdicts)

    shares = {number: measure(number) for number in range(1, 9)}
    smallest = min(number for number, share in shares.items() if share >= 0.9)
    assert smallest > 1
    assert find_replicas(measure, 1, 8).replicas == smallest
