"""The evaluation: the best variant is found, runs are cut short harmlessly, and it goes on."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from reproduce_cases import Case, Size, attainment, cut_below
from reproduce_jobs import Point
from reproduce_plan import Plan, jobs_of
from reproduce_run import FILE, Store
from reproduce_search import best_of, geomean

from minserve.workload.capacity import LEVEL

CHATS = Case(scenario="chatbot", device="opt-6.7b-a100", policy="sarathi", token_budget=512)


@pytest.mark.parametrize("seed", range(20))
def test_the_best_variant_is_never_lost(seed: int) -> None:
    rng = random.Random(seed)
    capacities = {name: rng.uniform(0.5, 8.0) for name in "abcdefg"}

    def falling(variant: str, rate: float) -> float:
        return max(0.0, 1.0 - 0.1 * (rate / capacities[variant]) ** 4)

    found = best_of(
        list(capacities),
        # The coarse look errs, by a few percent.
        lambda variant, rate: falling(variant, rate * (1.03 if variant in "ace" else 0.98)),
        lambda variant, rate, _: falling(variant, rate),
        start=rng.uniform(0.3, 10.0),
    )
    most = max(capacities.values())
    assert capacities[found.variant] > 0.95 * most
    assert found.capacity.rate == pytest.approx(capacities[found.variant], rel=0.05)


def test_a_geometric_mean() -> None:
    assert geomean([1.0, 4.0]) == pytest.approx(2.0)
    assert math.isnan(geomean([]))


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_what_is_cut_short_could_not_have_attained(repeats: int) -> None:
    cut = cut_below(repeats)
    assert (cut + repeats - 1) / repeats < LEVEL


def test_a_run_that_is_cut_short_says_no_less_than_the_whole_one() -> None:
    setup = CHATS.setup(0)
    overloaded, light = CHATS.workload(20.0, 150, 0), CHATS.workload(1.0, 40, 0)
    whole = attainment(overloaded, setup)
    assert whole <= attainment(overloaded, setup, cut=0.75) < 0.75
    assert attainment(light, setup, cut=0.75) == attainment(light, setup) > LEVEL


def test_results_are_kept_and_a_broken_line_is_measured_again(tmp_path: Path) -> None:
    job = Point(case=CHATS, rate=1.0, size=Size(requests=40, repeats=1, tolerance=0.1, coarse=20))
    other = replace(job, rate=2.0)
    store = Store(tmp_path)
    store.add(job, {"attainment": 0.5}, 1.5)
    with (tmp_path / FILE).open("a", encoding="utf-8") as file:
        file.write('{"key": "broken')
    again = Store(tmp_path)
    assert again(job) == {"attainment": 0.5}
    assert job in again
    assert other not in again
    again.add(other, {"attainment": 0.4}, 1.0)
    assert Store(tmp_path)(other) == {"attainment": 0.4}
    assert Store(tmp_path).seconds_of([job, other]) == pytest.approx(2.5)


def test_every_setting_of_a_job_is_in_its_key() -> None:
    job = Point(case=CHATS, rate=1.0, size=Size(requests=40, repeats=1, tolerance=0.1, coarse=20))
    others = [
        replace(job, rate=1.1),
        replace(job, case=replace(CHATS, max_speculation=2)),
        replace(job, size=replace(job.size, requests=41)),
    ]
    assert len({one.key for one in (job, *others)}) == 4


def test_the_plan_asks_only_for_what_is_not_known() -> None:
    jobs = jobs_of(Plan(quick=True), ["capacity"], lambda _: None)
    assert len(jobs) == len({job.key for job in jobs}) > 20
