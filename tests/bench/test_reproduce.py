"""The evaluation's arithmetic: searches over variants, cuts, keys, resuming, tables."""

from __future__ import annotations

import json
import math
import os
import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import reproduce
from reproduce import evaluate, main

from minserve.devices import PUBLISHED
from minserve.planner.predict.perf_model import BatchShape
from minserve.simulator.simulation import simulate
from minserve.workload.capacity import LEVEL, Measure, find_capacity
from minserve.workload.verdict import Cause
from parts.reproduce.capacity_searches import baseline, chunks, promise
from parts.reproduce.plan import WITH, WITHOUT, Plan
from parts.reproduce.report import capacity_table, ratios, summary
from parts.reproduce.sections import SECTIONS, jobs_of
from shared.simulated import jobs
from shared.simulated.cases import Case, Size, attainment, cut_below, measures_of
from shared.simulated.jobs import Job, Point, Result, Search, case_of
from shared.simulated.run import FILE, ResultStore, run_all
from shared.simulated.search import best_of, geomean

OPT = "opt-6.7b-a100"
TINY = Size(requests=15, repeats=1, tolerance=0.2, coarse=8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Square(Job):
    """Something that takes no time; 3 cannot be done, and 7 is the end of its worker."""

    number: int

    def run(self) -> Result:
        if self.number == 7:
            os._exit(1)
        if self.number == 3:
            raise ValueError("not a 3")
        return {"square": self.number**2, "by": {1: "a key that is no text"}}


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyPlan(Plan):
    """A plan of a few seconds."""

    @property
    def combinations(self) -> tuple[tuple[str, str], ...]:
        return (("coding", OPT),)

    def size(self, scenario: str, device: str = OPT) -> Size:
        return TINY


def falling(capacity: float) -> Measure:
    """Attainment that falls through the level at a capacity."""
    return lambda rate, _: max(0.0, min(1.0, LEVEL + 0.5 * (1 - rate / capacity)))


def deciding(capacity: float) -> tuple[Measure, Measure]:
    """The same, and a bound of it just below the level where that is missed."""
    measure = falling(capacity)
    return measure, lambda rate, seed: max(measure(rate, seed), LEVEL - 0.001)


def test_the_best_of_many_variants_is_found_where_coarse_measurements_err_by_5_percent() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        true = {name: rng.uniform(0.5, 8.0) for name in range(rng.randint(2, 40))}
        seen = {name: true[name] * rng.uniform(0.95, 1.05) for name in true}
        calls = []

        def full(name: int, true=true, calls=calls) -> tuple[Measure, Measure]:
            calls.append(name)
            return deciding(true[name])

        best = best_of(list(true), lambda name, seen=seen: deciding(seen[name]), full, 3.0)
        assert best.capacity.rate == pytest.approx(max(true.values()), rel=0.03)
        assert true[best.variant] >= 0.97 * max(true.values())
        # Who is far from the best is never measured in full.
        assert all(true[name] > 0.75 * max(true.values()) for name in calls)


def test_variants_that_attain_nowhere_have_no_capacity() -> None:
    def low(_: str) -> tuple[Measure, Measure]:
        return (lambda *_: 0.1), (lambda *_: 0.1)

    best = best_of(["a", "b"], low, low, 1.0)
    assert best.capacity.rate is None


def test_smaller_steps_find_the_same_capacity() -> None:
    for step in (1.2, 2.0):
        found = find_capacity(falling(3.3), 1.0, step=step)
        assert found.rate == pytest.approx(3.3, rel=0.03)


def test_a_run_that_is_cut_short_leads_the_search_where_the_whole_run_would() -> None:
    case = Case(scenario="coding", device=OPT, policy="sarathi", token_budget=352)
    for repeats in (1, 2, 3):
        measure, decide = measures_of(case, 60, repeats)
        num_cut = 0
        for rate in (0.5, 2.0, 6.0, 12.0):
            for seed in range(repeats):
                whole = attainment(case.workload(rate, 60, seed), case.setup(seed), case.make)
                for cut in (measure, decide):
                    bound = cut(rate, seed)
                    assert bound >= whole
                    # Or even perfect repeats leave the mean below the level.
                    assert bound == whole or bound + repeats - 1 < LEVEL * repeats
                    num_cut += bound > whole
        assert num_cut


def test_no_cut_can_lift_a_mean_to_the_level() -> None:
    for repeats in range(1, 20):
        assert cut_below(repeats) == 0 or cut_below(repeats) + repeats - 1 < LEVEL * repeats


def test_the_geometric_mean() -> None:
    assert geomean([2.0, 8.0]) == pytest.approx(4.0)
    assert math.isnan(geomean([]))


def test_a_key_tells_of_every_setting() -> None:
    search = promise(Plan(), "coding", OPT, "dp", WITH)
    (case,) = search.cases
    others = [
        replace(search, start=1.0),
        replace(search, size=replace(search.size, requests=601)),
        replace(search, cases=(replace(case, noise=0.1),)),
        replace(search, cases=(replace(case, planner="no pending"),)),
        replace(search, cases=(case, replace(case, max_speculation=0))),
        Point(case=case, rate=search.start, size=search.size),
    ]
    assert len({job.key for job in (search, *others)}) == len(others) + 1
    assert replace(search).key == search.key


def test_a_broken_off_run_goes_on_where_it_was(tmp_path: Path) -> None:
    jobs = [Square(number=number) for number in (1, 2, 4)]
    run_all(lambda: jobs[:2], ResultStore(tmp_path), 2)
    # Killed in the middle of a line.
    with (tmp_path / FILE).open("a") as file:
        file.write('{"key": "half')
    store = ResultStore(tmp_path)
    assert [job in store for job in jobs] == [True, True, False]
    before = (tmp_path / FILE).read_text()
    done = run_all(lambda: jobs, store, 1)
    assert not done.errors
    assert (tmp_path / FILE).read_text().count("\n") == before.count("\n") + 1
    again = ResultStore(tmp_path)
    assert [again(job) for job in jobs] == [store(job) for job in jobs]
    assert again(jobs[2]) == {"square": 16, "by": {"1": "a key that is no text"}}


def test_a_job_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    jobs = [Square(number=number) for number in (3, 5)]
    store = ResultStore(tmp_path)
    done = run_all(lambda: jobs, store, 1)
    assert list(done.errors.values()) == ["ValueError: not a 3"]
    assert jobs[1] in store
    assert jobs[0] not in store


def test_a_worker_that_dies_ends_the_run_and_not_what_was_done(tmp_path: Path) -> None:
    jobs, store = [Square(number=number) for number in (2, 7)], ResultStore(tmp_path)
    done = run_all(lambda: jobs, store, 1)
    assert list(done.errors) == ["a worker"]
    assert jobs[0] in ResultStore(tmp_path)


def test_every_section_asks_until_it_has_what_it_needs() -> None:
    def found(job: Job) -> Result | None:
        if isinstance(job, Search):
            case = job.cases[-1]
            return {"capacity": 2.0, "best": {**vars_of(case), "ratio": list(case.ratio)}}
        return None

    for quick in (False, True):
        plan = Plan(quick=quick)
        for name in SECTIONS:
            first = jobs_of(plan, [name], lambda _: None)
            then = jobs_of(plan, [name], found)
            assert {job.key for job in first} <= {job.key for job in then}
    assert len(jobs_of(Plan(), ["bursts"], found)) == 4 + 8


def vars_of(case: Case) -> dict:
    return {name: getattr(case, name) for name in case.__slots__}


def test_a_case_survives_its_way_through_json() -> None:
    case = Case(scenario="tools", device="toolllama-7b-a100", policy="distserve", ratio=(2, 1))
    assert case_of(json.loads(json.dumps(vars_of(case)))) == case


def test_baselines_try_the_budgets_that_just_fit_the_paces() -> None:
    model = PUBLISHED[OPT].perf_model()
    tight, loose = chunks(OPT)[:2]
    for budget, pace in ((tight, 0.05), (loose, 0.1)):
        times = [model.predict(BatchShape.of([(0, budget + more)])) for more in (0, 16)]
        assert times[0] <= pace < times[1]
    cases = baseline(Plan(), "coding", OPT, "sarathi", WITH).cases
    without = baseline(Plan(), "coding", OPT, "sarathi", WITHOUT).cases
    assert set(without) < set(cases)


def test_the_ratio_is_over_the_best_baseline_of_all() -> None:
    rates = {"dp": 3.0, "edf": 2.5, "vllm": 0.5, "sarathi": 1.0, "fcfs": 0.2, "distserve": 1.5}

    def found(job: Job) -> Result | None:
        return {"capacity": rates[job.cases[0].policy]} if isinstance(job, Search) else None

    table = capacity_table(TinyPlan(), found)
    assert table["coding", OPT][WITH]["best"] == 1.5
    assert ratios(table, [("coding", OPT)], "best") == {"coding": 2.0}
    # Nothing is said of a mean over scenarios of which one is missing.
    assert ratios(table, [("coding", OPT), ("mixed", OPT)], "best") is None


def test_changed_promises_are_what_is_simulated() -> None:
    case = Case(scenario="coding", device=OPT, ttft_slowdown=3.0, tpot_scale=2.0)
    (turn,) = {turn.slo for one in case.workload(2.0, 20, 0) for turn in one.turns}
    assert (turn.ttft_slowdown, turn.tpot) == (3.0, pytest.approx(0.1))


def test_each_ablation_takes_away_what_it_says() -> None:
    verdicts = {}
    for name in ("", "no pending", "no best effort", "fixed batches"):
        budget = 352 if name == "fixed batches" else None
        case = Case(scenario="coding", device=OPT, planner=name, token_budget=budget)
        workload = case.workload(8.0, 60, 0)
        verdicts[name] = simulate(workload, case.setup(0), make=case.make).verdicts
    late = {name: sum(one.best_effort for one in each) for name, each in verdicts.items()}
    refused = {
        name: sum(one.cause is Cause.REJECTED for one in each) for name, each in verdicts.items()
    }
    assert late["no pending"] > late[""] > late["no best effort"]
    assert refused["no best effort"] > 0 == refused[""]
    assert all(len(each) == 60 for each in verdicts.values())


def test_an_evaluation_from_its_jobs_to_its_files(tmp_path: Path, capsys) -> None:
    store = ResultStore(tmp_path / "jobs")
    sections, plan = ["capacity"], TinyPlan(quick=True)
    done, figures = evaluate(plan, sections, store, 2, tmp_path, "tiny")
    assert not done.errors
    assert figures["complete"]
    row = figures["capacity"]["coding"]
    assert row["best"] == max(row[name] for name in ("vllm", "sarathi", "fcfs", "distserve"))
    assert figures["over_best"]["coding"] == pytest.approx(row["dp"] / row["best"], rel=0.01)
    text = (tmp_path / "reproduce-quick.md").read_text()
    assert "## Capacity, requests/s per GPU, with speculation" in text
    assert text.strip().splitlines()[-1] in capsys.readouterr().out
    written = json.loads((tmp_path / "reproduce-quick.json").read_text())
    assert written["details"][f"coding {OPT}"][WITH]["dp"]["attainment"]
    # Another run finds everything there and says the same.
    again = ResultStore(tmp_path / "jobs")
    assert summary(plan, again, 0.0) == summary(plan, store, 0.0)
    assert not [job for job in jobs_of(plan, sections, again) if job not in again]


def test_an_unknown_section_is_one_clear_line(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "capacity,lunch"])
    assert "no section lunch; there are capacity," in capsys.readouterr().err


# --- the store's keys ---


def test_results_are_of_the_code_that_makes_them() -> None:
    bench = Path(reproduce.__file__).parent
    own = [Path(jobs.__file__).with_name(name) for name in jobs.MEASURING]
    assert [path for path in own if not path.is_file()] == []
    assert bench.parent / "minserve" == jobs.PACKAGE
    assert [name for name in jobs.SOURCES if not (jobs.PACKAGE / name).exists()] == []


def test_other_code_has_other_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "minserve"
    for name in jobs.SOURCES:
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("x = 1\n")
    monkeypatch.setattr(jobs, "PACKAGE", package)
    before = jobs.fingerprint.__wrapped__()
    assert jobs.fingerprint.__wrapped__() == before
    (package / jobs.SOURCES[-1]).write_text("x = 2\n")
    assert jobs.fingerprint.__wrapped__() != before
