"""The admission program against every subset, and against the event simulation."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from minserve.planner.admission import dynamic_program
from minserve.planner.admission.bounds import Rest
from minserve.planner.admission.dynamic_program import admit
from minserve.planner.admission.outlook import Outlook, Tier
from minserve.planner.admission.prefill_rates import PrefillRates
from minserve.planner.admission.timeline import Candidate, insert_greedily, simulate
from minserve.planner.predict.perf_model import PerfModel, Piece
from parts.planner.instances import Instance, all_done_s, best_by_brute_force, random_instance

NUM_BLOCKS_OF_SEEDS = 12
SEEDS_PER_BLOCK = 125


def instance_of(*candidates: Candidate, free_blocks: int = 100, free_seqs: int = 10) -> Instance:
    """On an idle device: 500 tokens per second, a tier of 0.1 s per token."""
    model = PerfModel([Piece(tokens=0.002)])
    rates = PrefillRates(model, [Tier(tpot_s=0.1)], window_s=0.1)
    outlook = Outlook(
        starts=np.array([0.0]),
        counts=np.array([[0]]),
        free_blocks=np.array([free_blocks]),
        free_seqs=free_seqs,
    )
    return Instance(list(candidates), outlook, rates)


def decide(instance: Instance) -> dynamic_program.Admission:
    return admit(instance.candidates, instance.outlook, instance.rates)


@pytest.mark.parametrize("most_seqs", [1, 2, 12], ids="at most {} outputs".format)
@pytest.mark.parametrize("block", range(NUM_BLOCKS_OF_SEEDS))
def test_it_finds_the_best_of_all_subsets_and_simulation_agrees(block: int, most_seqs: int) -> None:
    for seed in range(block * SEEDS_PER_BLOCK, (block + 1) * SEEDS_PER_BLOCK):
        instance = random_instance(random.Random(seed), num_candidates=7, most_seqs=most_seqs)
        got, best = decide(instance), best_by_brute_force(instance)
        chosen = [instance.candidates[i] for i in got.accepted]
        assert simulate(chosen, instance.outlook, instance.rates).feasible, seed
        if best is None:
            # Forced ones that never fit for good may fit until they are released.
            assert not got.feasible or all(c.forced for c in chosen), seed
            continue
        assert got.feasible, seed
        assert got.value >= best[0] - 1e-9, seed
        if got.value == best[0] and all_done_s(instance, got.accepted) is not None:
            assert got.done_s <= best[1] + 1e-6, seed
        forced = {i for i, c in enumerate(instance.candidates) if c.forced}
        assert forced <= set(got.accepted), seed


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("roomy", [True, False])
@pytest.mark.parametrize("most_seqs", [1, 6])
def test_the_bounds_rule_out_nothing_better(
    monkeypatch: pytest.MonkeyPatch, alike: bool, roomy: bool, most_seqs: int
) -> None:
    """On instances too large for brute force: the program without bounds, without limits."""
    monkeypatch.setattr(dynamic_program, "FIRST_WIDTH", 10**9)
    instances = [
        random_instance(
            random.Random(seed),
            num_candidates=13,
            alike=alike,
            roomy=roomy,
            free_seqs=100 if most_seqs == 1 else 12,
            most_seqs=most_seqs,
        )
        for seed in range(40)
    ]
    bounded = [decide(one) for one in instances]

    def nothing(rest: Rest, limits: list[object]) -> list[list[list[float]]]:
        return [[[math.inf] * (sum(rest.units) + 1)] * (len(rest.works) + 1)] * len(limits)

    monkeypatch.setattr(dynamic_program, "latest_s", nothing)
    monkeypatch.setattr(dynamic_program, "least_blocks", lambda _: None)
    assert any(decide(one).value < sum(c.value for c in one.candidates) for one in instances)
    for one, found in zip(instances, bounded, strict=True):
        every = decide(one)
        assert found.value == every.value
        assert found.done_s == pytest.approx(every.done_s)


def test_the_program_finds_the_best_set_without_a_good_one_to_begin_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dynamic_program._Program, "_good_set", dynamic_program._Program._nobody)
    short_of_memory = 0
    for seed in range(400):
        rng = random.Random(seed)
        instance = random_instance(
            rng, num_candidates=8, alike=seed % 2 == 0, roomy=False, most_seqs=1 + seed % 3
        )
        candidates = [c._replace(forced=False) for c in instance.candidates]
        instance = Instance(candidates, instance.outlook, instance.rates)
        got, best = decide(instance), best_by_brute_force(instance)
        assert got.value >= best[0], seed
        if got.value == best[0] and all_done_s(instance, got.accepted) is not None:
            assert got.done_s <= best[1] + 1e-6, seed
        short_of_memory += sum(c.blocks for c in candidates) > instance.outlook.free_blocks.max()
    assert short_of_memory > 100


def test_one_long_prompt_gives_way_to_two_short_ones() -> None:
    long = Candidate(work=450, deadline_s=1.0, tier=0, blocks=1)
    short = Candidate(work=200, deadline_s=1.1, tier=0, blocks=1)
    assert decide(instance_of(long, short, short)).accepted == (1, 2)


def test_value_outweighs_number() -> None:
    long = Candidate(work=450, deadline_s=1.0, tier=0, blocks=1, value=3.0)
    short = Candidate(work=200, deadline_s=1.1, tier=0, blocks=1)
    assert decide(instance_of(long, short, short)).accepted == (0,)


def test_ties_leave_the_largest_budget() -> None:
    slow = Candidate(work=400, deadline_s=1.0, tier=0, blocks=1)
    quick = Candidate(work=300, deadline_s=1.0, tier=0, blocks=1)
    got = decide(instance_of(slow, quick))
    assert got.accepted == (1,)
    assert got.done_s == pytest.approx(0.6)


def test_memory_decides_where_it_is_short() -> None:
    big = Candidate(work=10, deadline_s=1.0, tier=0, blocks=9)
    small = Candidate(work=10, deadline_s=1.1, tier=0, blocks=5)
    assert decide(instance_of(big, small, small, free_blocks=10)).accepted == (1, 2)


def test_slots_decide_where_they_are_short() -> None:
    one = Candidate(work=10, deadline_s=1.0, tier=0, blocks=1)
    assert len(decide(instance_of(one, one, one, free_seqs=2)).accepted) == 2
    forced = Candidate(work=10, deadline_s=1.0, tier=0, blocks=1, forced=True)
    assert decide(instance_of(one, forced, free_seqs=0)).accepted == (1,)


def test_forced_ones_that_are_late_are_reported_and_nobody_is_accepted() -> None:
    late = Candidate(work=1000, deadline_s=1.0, tier=0, blocks=1, forced=True)
    fine = Candidate(work=10, deadline_s=1.0, tier=0, blocks=1)
    got = decide(instance_of(late, fine))
    assert not got.feasible
    assert got.accepted == ()


@pytest.mark.parametrize(
    "candidate",
    [
        Candidate(work=10, deadline_s=-1.0, tier=0, blocks=1),
        Candidate(work=10, deadline_s=0.001, tier=None, blocks=1),
        Candidate(work=10, deadline_s=1.0, tier=0, blocks=1000),
    ],
    ids=["past deadline", "too little time", "too much memory"],
)
def test_who_cannot_fit_is_left_out(candidate: Candidate) -> None:
    fine = Candidate(work=10, deadline_s=1.0, tier=0, blocks=1)
    got = decide(instance_of(candidate, fine))
    assert got.feasible
    assert got.accepted == (1,)


def test_nobody_to_decide_on() -> None:
    got = decide(instance_of())
    assert got.feasible
    assert got.accepted == ()


def test_without_tiers_only_prefill_counts() -> None:
    model = PerfModel([Piece(tokens=0.002)])
    outlook = Outlook(
        starts=np.array([0.0]),
        counts=np.zeros((1, 0), dtype=np.int64),
        free_blocks=np.array([10]),
        free_seqs=10,
    )
    rates = PrefillRates(model, [], window_s=0.1)
    one = Candidate(work=300, deadline_s=1.0, tier=None, blocks=1)
    assert len(admit([one, one], outlook, rates).accepted) == 1


def test_instances_with_too_many_counts_get_a_good_set_and_say_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dynamic_program, "MAX_CELLS", 0)
    long = Candidate(work=450, deadline_s=1.0, tier=0, blocks=1)
    got = decide(instance_of(long, long, long))
    assert got.feasible
    assert len(got.accepted) == 1
    assert not got.exact


def test_a_search_cut_short_finds_a_feasible_set_and_says_whether_it_is_proven(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    instances = [random_instance(random.Random(seed), num_candidates=13) for seed in range(300)]
    best = [decide(one) for one in instances]
    monkeypatch.setattr(dynamic_program, "FIRST_WIDTH", 1)
    monkeypatch.setattr(dynamic_program, "MAX_STATES", 0)
    cut_short = [decide(one) for one in instances]
    assert all(one.exact for one in best)
    assert sum(not one.exact for one in cut_short) > 10
    for instance, got, most in zip(instances, cut_short, best, strict=True):
        chosen = [instance.candidates[i] for i in got.accepted]
        assert simulate(chosen, instance.outlook, instance.rates).feasible
        assert got.value == most.value or not got.exact
        greedy = insert_greedily(instance.candidates, instance.outlook, instance.rates)
        assert got.value >= greedy.value or got.exact


def test_a_set_that_was_chosen_before_changes_nothing_but_where_the_search_begins() -> None:
    for seed in range(300):
        instance = random_instance(random.Random(seed), num_candidates=12)
        first = decide(instance)
        hinted = [
            one._replace(was_chosen=(i in first.accepted) != (i == seed % 12))
            for i, one in enumerate(instance.candidates)
        ]
        again = decide(Instance(hinted, instance.outlook, instance.rates))
        assert (again.feasible, again.value) == (first.feasible, first.value), seed


def test_values_that_are_no_multiples_of_one_another_are_compared_exactly() -> None:
    rng = random.Random(0)
    for seed in range(300):
        instance = random_instance(
            random.Random(seed), num_candidates=7, alike=False, most_seqs=1 + seed % 3
        )
        candidates = [c._replace(value=rng.uniform(0.5, 2.0)) for c in instance.candidates]
        instance = Instance(candidates, instance.outlook, instance.rates)
        got, best = decide(instance), best_by_brute_force(instance)
        if best is not None:
            assert got.exact
            assert got.value >= best[0] - 1e-9, seed


def test_weights_of_all_priorities_are_compared_exactly() -> None:
    """Powers of two, whose sum has more units than are counted; decodes have no end, so that
    nothing is released which the program counts as held.
    """
    left_out = 0
    for seed in range(200):
        rng = random.Random(seed)
        instance = random_instance(rng, num_candidates=8, alike=True)
        candidates = [
            c._replace(value=math.ldexp(1.0, rng.randint(-10, 10)), decode_s=math.inf)
            for c in instance.candidates
        ]
        instance = Instance(candidates, instance.outlook, instance.rates)
        got, best = decide(instance), best_by_brute_force(instance)
        if best is None:
            continue
        assert got.value == best[0] == sum(candidates[i].value for i in got.accepted), seed
        left_out += len(got.accepted) < len(candidates)
    assert left_out > 50


def test_equal_deadlines_are_kept_in_the_order_given() -> None:
    same = [Candidate(work=w, deadline_s=1.0, tier=0, blocks=1) for w in (300, 100, 200)]
    got = decide(instance_of(*same))
    assert got.accepted == (1, 2)


def test_a_request_of_many_outputs_takes_its_slots_blocks_and_pace_all_at_once() -> None:
    # A decode of 0.1 s per token takes 2 % of the device.
    many = Candidate(work=10, deadline_s=1.0, tier=0, blocks=8, num_seqs=6)
    one = Candidate(work=10, deadline_s=1.1, tier=0, blocks=1)
    assert decide(instance_of(many, one)).accepted == (0, 1)
    assert decide(instance_of(many, one, free_seqs=5)).accepted == (1,)
    assert decide(instance_of(many, one, free_blocks=7)).accepted == (1,)
    crowd = many._replace(num_seqs=51)
    assert decide(instance_of(crowd, one, free_seqs=100)).accepted == (1,)
    crowd = many._replace(num_seqs=49)
    assert decide(instance_of(crowd, one, free_seqs=100)).accepted == (0, 1)


def test_a_request_counts_once_however_many_outputs_it_has() -> None:
    many = Candidate(work=10, deadline_s=1.0, tier=0, blocks=1, num_seqs=8)
    ones = [Candidate(work=10, deadline_s=1.0, tier=0, blocks=1) for _ in range(2)]
    assert decide(instance_of(many, *ones, free_seqs=8)).accepted == (1, 2)


def test_counts_of_outputs_that_no_set_has_cost_nothing() -> None:
    """Of three tiers with a request of hundreds of outputs each, there are few sets."""
    tiers = [Tier(tpot_s=pace) for pace in (0.1, 0.2, 0.3)]
    rates = PrefillRates(PerfModel([Piece(tokens=1e-6)]), tiers, window_s=0.1)
    outlook = Outlook(
        starts=np.array([0.0]),
        counts=np.zeros((1, 3), dtype=np.int64),
        free_blocks=np.array([100]),
        free_seqs=1200,
    )
    candidates = [
        Candidate(work=10, deadline_s=1.0, tier=i % 3, blocks=1, num_seqs=n)
        for i, n in enumerate([300, 400, 500, 600, 700])
    ]
    got = admit(candidates, outlook, rates)
    assert got.exact
    assert got.accepted == (0, 1, 2)
