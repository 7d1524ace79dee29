"""Policies whose plans are made while the iteration before still runs."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from loads import attained, device, mixed_load, promise_beside_best_effort, replay_of, request
from lookahead_replay import LookaheadReplay
from replay import Replay, make_sequence

from minserve.engine.block_pool import BlockPool
from minserve.planner.plan import IterationPlan
from minserve.planner.policies.registry import make_planner
from minserve.slo.objectives import SLO, OnUnattainable, Standing


@pytest.mark.parametrize("policy", ["dp", "edf"])
def test_light_load_is_attained_whole(policy: str) -> None:
    load, replay = mixed_load(0.3, 40.0), replay_of(policy, kind=LookaheadReplay)
    replay.run(load)
    assert attained(load) == 1.0
    assert replay.num_held > 10 * replay.num_discarded > 0


@pytest.mark.parametrize("sigma", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(2))
def test_as_many_promises_are_kept_as_by_plans_of_the_last_moment(seed: int, sigma: float) -> None:
    kept = {}
    for kind in (Replay, LookaheadReplay):
        load = mixed_load(1.0, 30.0, seed)
        replay_of(kind=kind, sigma=sigma).run(load)
        kept[kind] = attained(load)
    assert kept[LookaheadReplay] > kept[Replay] - 0.09


def test_best_effort_gets_the_same_share() -> None:
    tokens = {}
    for kind in (Replay, LookaheadReplay):
        spare = request("spare", 20, 150, 0.0, None)
        load = [*mixed_load(4.0, 10.0), spare]
        replay_of(kind=kind, best_effort_share=0.1).run(load, until=10.0)
        tokens[kind] = spare.num_output_tokens
    assert tokens[Replay] > 20
    assert tokens[LookaheadReplay] == pytest.approx(tokens[Replay], rel=0.2)


def test_what_a_discarded_plan_refused_is_refused_by_the_next() -> None:
    strict = SLO(
        ttft_slowdown=3, tpot_slowdown=3, on_unattainable=OnUnattainable.REJECT, name="strict"
    )
    load = [request(f"r{i}", 200, 40, 0.01 * i, strict) for i in range(30)]
    replay = replay_of(kind=LookaheadReplay)
    replay.run(load)
    served = [s for s in load if s not in replay.rejected]
    assert len(replay.rejected) > 10
    assert sum(s.progress.attained for s in served) >= 0.9 * len(served)


def test_a_discarded_round_of_admission_is_held_again() -> None:
    hopeless = request("hopeless", 100, 5, 0.0, SLO(ttft=0.001, tpot=0.001))
    replay = replay_of()
    replay.waiting = [hopeless]
    planner = replay.planner
    first = planner.plan(replay.view(), now=0.0)
    assert first.relegate == ["hopeless"]
    planner.discarded()
    assert planner.plan(replay.view(), now=0.0).relegate == ["hopeless"]
    assert hopeless.standing is Standing.PENDING
    assert planner.num_starts == 0


def test_what_best_effort_is_given_by_the_plan_under_way_is_not_given_again() -> None:
    replay = promise_beside_best_effort(0.5)
    for _ in range(4):
        replay.step()
    planner = replay.planner
    owed = planner.best_effort_owed_s
    under_way = planner.plan(replay.view(), now=replay.now)
    under_way = replace(under_way, best_effort_s=owed, best_effort_waits=False)
    planner.started(under_way)
    assert planner.best_effort_owed_s == 0.0
    planner.observe(under_way, under_way.predicted_s)
    assert planner.best_effort_owed_s == 0.0


def test_a_prefill_beside_promised_decodes_may_not_begin_late_and_plain_decodes_may() -> None:
    replay = replay_of()
    slo = SLO(ttft=5.0, tpot=0.08)
    replay.waiting = [request("first", 20, 100, 0.0, slo)]
    replay.step()
    plain = replay.step()
    assert plain.start_by_s == math.inf
    replay.waiting = [request("second", 200, 4, replay.now, slo)]
    mixed = _first_mixed(replay)
    due = min(s.progress.next_deadline_s for s in replay.running if s.seq_id == "first")
    assert replay.now <= mixed.start_by_s + mixed.predicted_s <= due + 0.08 + 1e-9


def _first_mixed(replay: Replay) -> IterationPlan:
    """The next plan with a decode and a chunk of a prefill; nothing of it is carried out."""
    while True:
        plan = replay.planner.plan(replay.view(), now=replay.now)
        if len(plan.num_scheduled_tokens) == 2:
            return plan
        replay.step()


@pytest.mark.parametrize("name", ["fcfs", "sarathi", "edf", "dp"])
@pytest.mark.parametrize("seed", range(3))
def test_every_request_finishes_however_small_the_pool(name: str, seed: int) -> None:
    rng = random.Random(seed)
    blocks = rng.randint(10, 24)
    load = []
    for i in range(40):
        prompt, output = rng.randint(1, 4 * 16), rng.randint(1, 5 * 16)
        tokens = [rng.randrange(3) for _ in range(prompt)]
        load.append(make_sequence(f"r{i}", tokens, output, 0.02 * i, rng.choice([0, 0, 1])))
    model = device()
    pool = BlockPool(blocks, 16)
    replay = LookaheadReplay(make_planner(name, model=model), pool, 32, 6, device=model)
    replay.run(load)
    assert len(replay.finished) == len(load)
    assert replay.num_held > replay.num_discarded > 0
    assert replay.planner.num_preemptions == sum(s.num_preemptions for s in load)
    assert replay.planner.num_starts == len(load) + replay.planner.num_preemptions
    assert pool.num_free_blocks == blocks
