"""The event simulation against a scalar twin, and what follows from taking load away."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

import numpy as np
import pytest

from minserve.planner.admission.outlook import Outlook, Tier
from minserve.planner.admission.prefill_rates import PrefillRates
from minserve.planner.admission.timeline import Candidate, insert_greedily, simulate
from minserve.planner.predict.perf_model import PerfModel, Piece
from parts.planner.instances import Instance, all_done_s, best_by_brute_force, random_instance


def instance_of(
    *candidates: Candidate,
    starts: tuple[float, ...] = (0.0,),
    counts: tuple[int, ...] = (0,),
    free_blocks: tuple[int, ...] = (100,),
) -> Instance:
    """500 tokens per second alone, 10 fewer for every decode of the tier of 0.1 s per token."""
    rates = PrefillRates(PerfModel([Piece(tokens=0.002)]), [Tier(tpot_s=0.1)], window_s=0.1)
    outlook = Outlook(
        starts=np.array(starts),
        counts=np.array(counts).reshape(-1, 1),
        free_blocks=np.array(free_blocks),
        free_seqs=10,
    )
    return Instance(list(candidates), outlook, rates)


def done_s(instance: Instance) -> tuple[float, ...]:
    return simulate(instance.candidates, instance.outlook, instance.rates).done_s


def held(candidates: list[Candidate]) -> list[Candidate]:
    """The same, but never released."""
    return [c._replace(decode_s=math.inf) for c in candidates]


def test_without_releases_it_is_the_model_of_the_program() -> None:
    feasible = 0
    for seed in range(1500):
        instance = random_instance(random.Random(seed), most_seqs=1 + seed % 4)
        timeline = simulate(held(instance.candidates), instance.outlook, instance.rates)
        expected = all_done_s(instance, range(len(instance.candidates)))
        assert timeline.feasible == (expected is not None), seed
        if expected is not None:
            feasible += 1
            assert max(timeline.done_s) == pytest.approx(expected), seed
    assert feasible > 200


def test_releases_only_help() -> None:
    earlier = 0
    for seed in range(1500):
        instance = random_instance(random.Random(seed), most_seqs=1 + seed % 4)
        for_good = simulate(held(instance.candidates), instance.outlook, instance.rates)
        if not for_good.feasible:
            continue
        released = simulate(instance.candidates, instance.outlook, instance.rates)
        assert released.feasible, seed
        for one, other in zip(released.done_s, for_good.done_s, strict=True):
            assert one <= other + 1e-9, seed
            earlier += one < other - 1e-9
    assert earlier > 20


def test_taking_a_candidate_away_never_breaks_a_set() -> None:
    checked = 0
    for seed in range(400):
        instance = random_instance(random.Random(seed), num_candidates=6)
        everyone = held(instance.candidates)
        if not simulate(everyone, instance.outlook, instance.rates).feasible:
            continue
        for i in range(len(everyone)):
            rest = everyone[:i] + everyone[i + 1 :]
            assert simulate(rest, instance.outlook, instance.rates).feasible, seed
            checked += 1
    assert checked > 100


def test_the_simulation_releases_time_and_memory_at_predicted_ends() -> None:
    brief = Candidate(work=100, deadline_s=0.3, tier=0, blocks=8, decode_s=0.2)
    after = Candidate(work=100, deadline_s=1.0, tier=0, blocks=8)
    instance = instance_of(brief, after, free_blocks=(10,))
    # The second one's blocks are free at 0.4 s, and then nobody decodes beside it.
    assert done_s(instance) == pytest.approx((0.2, 0.4 + 0.2))
    assert all_done_s(instance, [0, 1]) is None


def test_decodes_of_the_accepted_slow_whoever_is_next() -> None:
    first = Candidate(work=100, deadline_s=1.0, tier=0, blocks=1)
    second = Candidate(work=100, deadline_s=1.0, tier=0, blocks=1)
    assert done_s(instance_of(first, second)) == pytest.approx((0.2, 0.2 + 100 / 490))
    unpaced = first._replace(tier=None)
    assert done_s(instance_of(unpaced, second)) == pytest.approx((0.2, 0.4))


def test_all_outputs_of_a_request_join_and_leave_together() -> None:
    many = Candidate(work=100, deadline_s=1.0, tier=0, blocks=1, num_seqs=10, decode_s=0.3)
    second = Candidate(work=100, deadline_s=1.0, tier=0, blocks=1)
    # Ten decodes leave 400 of 500 tokens per second, for the 0.3 s that they take.
    assert done_s(instance_of(many, second)) == pytest.approx((0.2, 0.2 + 100 / 400))
    later = second._replace(work=200)
    assert done_s(instance_of(many, later)) == pytest.approx((0.2, 0.5 + 80 / 500))
    crowd = many._replace(num_seqs=51)
    assert done_s(instance_of(crowd, second)) == (math.inf, math.inf)


def test_a_segment_without_time_for_prefill_is_waited_out() -> None:
    one = Candidate(work=100, deadline_s=2.0, tier=0, blocks=1)
    instance = instance_of(one, starts=(0.0, 1.0), counts=(60, 0), free_blocks=(9, 9))
    assert done_s(instance) == pytest.approx((1.2,))


def test_who_is_done_waits_until_its_pace_can_be_kept_for_good() -> None:
    one = Candidate(work=50, deadline_s=2.0, tier=0, blocks=1)
    crowded = {"starts": (0.0, 1.0, 1.5), "counts": (0, 50, 10), "free_blocks": (9, 9, 9)}
    assert done_s(instance_of(one, **crowded)) == pytest.approx((1.5,))
    assert done_s(instance_of(one._replace(tier=None), **crowded)) == pytest.approx((0.1,))
    assert done_s(instance_of(one._replace(deadline_s=1.4), **crowded)) == (math.inf,)


def test_blocks_that_will_be_needed_again_are_not_free() -> None:
    one = Candidate(work=50, deadline_s=2.0, tier=0, blocks=5)
    instance = instance_of(one, starts=(0.0, 0.5, 1.0), counts=(0, 0, 0), free_blocks=(9, 2, 9))
    assert done_s(instance) == pytest.approx((1.1,))


def test_nobody_is_feasible() -> None:
    timeline = simulate([], instance_of().outlook, instance_of().rates)
    assert timeline.feasible
    assert timeline.done_s == ()


def kept_in_order(instance: Instance, order: Iterable[int]) -> set[int]:
    """The forced ones, and of the others in this order each that fits beside those before it."""
    candidates, outlook, rates = instance.candidates, instance.outlook, instance.rates
    chosen = [i for i, c in enumerate(candidates) if c.forced]
    num_left = outlook.free_seqs
    for i in order:
        more = [candidates[j] for j in (*chosen, i)]
        fits = candidates[i].num_seqs <= num_left
        if not candidates[i].forced and fits and simulate(more, outlook, rates).feasible:
            chosen.append(i)
            num_left -= candidates[i].num_seqs
    return set(chosen)


@pytest.mark.parametrize("alike", [True, False])
def test_greedy_insertion_keeps_whom_the_simulation_accepts(alike: bool) -> None:
    left_out = by_value = 0
    for seed in range(400):
        instance = random_instance(random.Random(seed), most_seqs=1 + seed % 4, alike=alike)
        candidates, outlook, rates = instance.candidates, instance.outlook, instance.rates
        forced = [c for c in candidates if c.forced]
        got = insert_greedily(candidates, outlook, rates)
        assert got.feasible == simulate(forced, outlook, rates).feasible
        if not got.feasible:
            assert got.accepted == ()
            continue
        plain = sorted(range(len(candidates)), key=lambda i: candidates[i].deadline_s)
        dear = sorted(plain, key=lambda i: -candidates[i].value)
        sets = [kept_in_order(instance, order) for order in (dear, plain)]
        values = [sum(candidates[i].value for i in one) for one in sets]
        chosen = sets[0] if values[0] >= values[1] else sets[1]
        assert set(got.accepted) == chosen, seed
        assert got.value == max(values)
        assert [candidates[i].deadline_s for i in got.accepted] == sorted(
            candidates[i].deadline_s for i in chosen
        )
        assert got.done_s == max(
            simulate([candidates[i] for i in got.accepted], outlook, rates).done_s,
            default=outlook.starts[0],
        )
        left_out += len(chosen) < len(candidates)
        by_value += values[0] > values[1]
    assert left_out > 100
    assert (by_value > 20) != alike


def test_greedy_insertion_is_feasible_and_often_worse() -> None:
    worse = 0
    for seed in range(300):
        instance = random_instance(random.Random(seed), most_seqs=1 + seed % 4, alike=True)
        greedy = insert_greedily(instance.candidates, instance.outlook, instance.rates)
        best = best_by_brute_force(instance)
        if best is None or not greedy.feasible:
            continue
        chosen = [instance.candidates[i] for i in greedy.accepted]
        assert simulate(chosen, instance.outlook, instance.rates).feasible
        worse += greedy.value < best[0]
    assert worse > 5, "else the program would not be worth having"
