"""Planning by promises, on a virtual clock and a real block pool."""

from __future__ import annotations

import math
import random

import pytest
from loads import (
    TIGHT,
    attained,
    mixed_load,
    promise_beside_best_effort,
    replay_of,
    request,
)
from replay import Replay

from minserve.engine.block_pool import BlockPool
from minserve.planner.policies.promising import GUARD_S
from minserve.planner.policies.registry import make_planner
from minserve.planner.predict.lengths import BoundLengths
from minserve.planner.predict.perf_model import PerfModel, Piece
from minserve.request import Sequence
from minserve.slo.objectives import SLO, DecodeStage, OnUnattainable, Standing


def test_a_lone_request_is_promised_its_slo_and_gets_it() -> None:
    replay, seq = replay_of(), request("one", 100, 20, 0.0, TIGHT)
    replay.run([seq])
    assert seq.standing is Standing.ADMITTED
    assert seq.progress.attained
    assert seq.progress.worst_token_lateness_s < 0


@pytest.mark.parametrize("policy", ["dp", "edf"])
@pytest.mark.parametrize("decode_s", [1e-5, 2e-4, 7e-4])
def test_a_device_that_decodes_within_the_guard_time_keeps_promises(
    policy: str, decode_s: float
) -> None:
    model = PerfModel((Piece(tokens=decode_s / 10, base=decode_s),), margin=2.0)
    pool = BlockPool(400, 16, prefix_caching=False)
    replay = Replay(make_planner(policy, model=model), pool, 512, 8, device=model)
    load = [request(f"r{i}", 100, 20, 0.0, SLO(ttft=60.0, tpot=10.0)) for i in range(4)]
    load.append(request("beside", 100, 200, 0.0, None))
    replay.run(load)
    assert [seq.standing for seq in load[:4]] == [Standing.ADMITTED] * 4


def test_without_a_performance_model_everything_is_best_effort_and_finishes() -> None:
    replay = Replay(make_planner("dp"), BlockPool(100, 16), 64, 8)
    load = [request(f"r{i}", 50, 10, 0.0, TIGHT if i % 2 else None) for i in range(6)]
    replay.run(load)
    assert len(replay.finished) == 6
    assert not any(s.standing is Standing.ADMITTED for s in load)


@pytest.mark.parametrize("policy", ["dp", "edf"])
def test_light_load_is_attained_whole(policy: str) -> None:
    load = mixed_load(0.3, 60.0)
    replay_of(policy).run(load)
    assert attained(load) == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_overload_keeps_more_promises_than_policies_without_deadlines(seed: int) -> None:
    kept = {}
    for policy in ("dp", "sarathi", "fcfs"):
        load = mixed_load(2.5, 40.0, seed)
        replay_of(policy, budget=512 if policy == "dp" else 128).run(load)
        kept[policy] = attained(load)
    assert kept["dp"] > kept["sarathi"] + 0.2
    assert kept["dp"] > kept["fcfs"] + 0.2


@pytest.mark.parametrize("seed", range(3))
def test_what_is_promised_in_overload_is_kept(seed: int) -> None:
    load = mixed_load(2.5, 40.0, seed)
    replay = replay_of()
    promised: set[str] = set()
    plan = replay.planner.plan

    def noting(view, now):
        made = plan(view, now)
        promised.update(made.admit)
        return made

    replay.planner.plan = noting
    replay.run(load)
    kept = [s.progress.attained for s in load if s.seq_id in promised]
    assert 10 < len(kept) < len(load), "some fit and some do not"
    assert sum(kept) / len(kept) > 0.85


def test_noise_costs_few_promises_once_the_margin_has_learned_it() -> None:
    load = mixed_load(0.6, 120.0)
    replay_of(sigma=0.1).run(load)
    assert attained(load) > 0.9


def test_no_batch_outlasts_the_nearest_deadline_that_it_can_meet() -> None:
    replay = replay_of()
    plan = replay.planner.plan
    checked = 0

    def checking(view, now):
        nonlocal checked
        made = plan(view, now)
        dues = [
            s.progress.next_deadline_s
            for s in view.running
            if s.is_decoding and s.standing is Standing.ADMITTED and s.seq_id not in made.relegate
        ]
        if dues and min(dues) - now > 0.03:
            checked += 1
            assert made.predicted_s <= min(dues) - now + 1e-9
        return made

    replay.planner.plan = checking
    replay.run(mixed_load(1.0, 30.0))
    assert checked > 100


def test_decodes_ahead_of_schedule_skip_for_a_prefill() -> None:
    replay = replay_of()
    slow = SLO(ttft=5.0, tpot=0.2)
    replay.waiting = [request("slow", 20, 100, 0.0, slow)]
    for _ in range(20):
        replay.step()  # alone it gets far ahead of 0.2 s per token
    replay.waiting = [request("urgent", 200, 4, replay.now, SLO(ttft=0.7, tpot=0.2))]
    plans = [replay.step() for _ in range(4)]
    skipped = [
        p
        for p in plans
        if "urgent" in p.num_scheduled_tokens and "slow" not in p.num_scheduled_tokens
    ]
    assert skipped
    replay.run([])
    assert all(s.progress.attained for s in replay.finished)


def test_a_request_that_does_not_fit_now_waits_and_is_served_when_it_does() -> None:
    # One slot: the second request fits only once the first has finished.
    replay = replay_of(max_num_seqs=1)
    first = request("first", 50, 10, 0.0, SLO(ttft=1.0, tpot=0.05))
    second = request("second", 50, 10, 0.0, SLO(ttft=3.0, tpot=0.05))
    replay.run([first, second])
    assert first.progress.attained
    assert second.progress.attained
    assert second.standing is Standing.ADMITTED


def test_an_impossible_slo_is_given_up_and_the_request_served_all_the_same() -> None:
    seq = request("hopeless", 100, 5, 0.0, SLO(ttft=0.001, tpot=0.001))
    replay = replay_of()
    replay.run([seq])
    assert seq.standing is Standing.BEST_EFFORT
    assert seq.num_output_tokens == 5
    assert not seq.progress.attained


def test_requests_that_ask_for_it_are_refused_in_time_and_told_when_to_return() -> None:
    strict = SLO(
        ttft_slowdown=3, tpot_slowdown=3, on_unattainable=OnUnattainable.REJECT, name="strict"
    )
    load = [request(f"r{i}", 200, 40, 0.01 * i, strict) for i in range(30)]
    replay = replay_of()
    plan, refusals = replay.planner.plan, []

    def noting(view, now):
        made = plan(view, now)
        refusals.extend((now, seq_id, r) for seq_id, r in made.reject.items())
        return made

    replay.planner.plan = noting
    replay.run(load)
    assert len(refusals) == len(replay.rejected) > 10
    deadlines = {s.seq_id: s.request.arrival_s + s.progress.targets.ttft_s for s in load}
    for now, seq_id, refusal in refusals:
        assert now < deadlines[seq_id]
        assert refusal.reason == "compute"
        assert 0 < refusal.retry_after_s < 60
    served = [s for s in load if s not in replay.rejected]
    assert sum(s.progress.attained for s in served) >= 0.9 * len(served)


def test_what_no_idle_device_could_do_is_refused_as_such() -> None:
    slo = SLO(ttft=0.001, on_unattainable=OnUnattainable.REJECT)
    replay = replay_of()
    replay.waiting = [request("impossible", 100, 5, 0.0, slo)]
    (refusal,) = replay.step().reject.values()
    assert refusal.reason == "device"
    assert refusal.retry_after_s == math.inf
    assert "idle device" in str(refusal.error())


def test_a_refusal_for_want_of_time_alone_does_not_say_never() -> None:
    """It came while an iteration ran for so long that it was late before it was seen."""
    slo = SLO(ttft=1.0, tpot=0.1, on_unattainable=OnUnattainable.REJECT)
    replay = replay_of()
    replay.now = 5.0
    replay.waiting = [request("late", 100, 5, 3.9, slo)]
    (refusal,) = replay.step().reject.values()
    assert refusal.reason == "compute"
    assert 0 < refusal.retry_after_s < 2.0


def test_memory_that_is_promised_away_refuses_with_that_reason() -> None:
    replay = replay_of(blocks=20, lengths=BoundLengths())
    slo = SLO(ttft=2.0, tpot=0.1, on_unattainable=OnUnattainable.REJECT)
    replay.waiting = [request("first", 100, 150, 0.0, slo)]
    replay.step()
    replay.waiting = [request("second", 100, 150, replay.now, slo)]
    (refusal,) = replay.step().reject.values()
    assert refusal.reason == "memory"
    assert refusal.retry_after_s > 1.0


def test_a_broken_promise_is_relegated_and_harms_nobody_else() -> None:
    replay = replay_of()
    load = [request(f"r{i}", 60, 30, 0.0, SLO(ttft=5.0, tpot=0.06)) for i in range(4)]
    replay.waiting = list(load)
    while not all(s.is_decoding for s in load):
        replay.step()
    victim = load[0]
    victim.progress.add_token(victim.progress.next_deadline_s + 1.0)
    replay.step()
    assert victim.standing is Standing.BEST_EFFORT
    replay.run([])
    assert all(s.progress.attained for s in load[1:])
    assert victim.num_output_tokens == 30


def test_best_effort_runs_in_what_is_left_and_takes_no_promise_down() -> None:
    promised = mixed_load(0.4, 60.0)
    spare = [request(f"b{i}", 300, 50, 0.0, None) for i in range(20)]
    replay = replay_of()
    replay.run(promised + spare, until=60.0)
    assert attained(promised) > 0.97
    assert sum(s.num_output_tokens for s in spare) > 100


def test_best_effort_gets_its_share_under_any_load() -> None:
    tokens = {}
    for share in (0.0, 0.2):
        spare = request("spare", 20, 150, 0.0, None)
        replay_of(best_effort_share=share).run([*mixed_load(4.0, 20.0), spare], until=20.0)
        tokens[share] = spare.num_output_tokens
    assert tokens[0.2] > max(30, tokens[0.0])


def test_best_effort_gives_its_blocks_to_promises_and_resumes_with_its_tokens() -> None:
    replay = replay_of(blocks=24)
    spare = request("spare", 150, 100, 0.0, None)
    replay.waiting = [spare]
    for _ in range(12):
        replay.step()
    before = list(spare.token_ids)
    urgent = request("urgent", 200, 10, replay.now, SLO(ttft=2.0, tpot=0.1))
    replay.waiting.append(urgent)
    preempted = []
    while replay.waiting or replay.running:
        preempted += replay.step().preempt
    assert preempted == ["spare"]
    assert urgent.progress.attained
    assert spare.token_ids[: len(before)] == before
    assert spare.num_output_tokens == 100


def test_a_request_given_up_too_early_is_promoted_when_room_opens() -> None:
    replay = replay_of()
    seq = request("again", 60, 40, 0.0, SLO(ttft=5.0, tpot=0.1))
    seq.standing = Standing.BEST_EFFORT
    replay.run([seq])
    assert seq.standing is Standing.ADMITTED
    assert seq.progress.attained


def test_two_stages_have_their_own_pace() -> None:
    slo = SLO(ttft=1.0, stages=(DecodeStage(tpot=0.04, tokens=10), DecodeStage(tpot=0.2)))
    thinker = request("thinker", 30, 30, 0.0, slo)
    crowd = [request(f"c{i}", 200, 5, 0.3 + i / 2, SLO(ttft=2.0, tpot=0.2)) for i in range(8)]
    replay = replay_of()
    replay.run([thinker, *crowd])
    assert thinker.progress.stage == 1
    assert thinker.progress.attained
    assert all(s.progress.attained for s in crowd)


def test_a_stage_without_a_pace_may_come_before_one_with() -> None:
    stages = (DecodeStage(tokens=5), DecodeStage(tpot=0.2))
    load = [request(f"r{i}", 30, 20, 0.0, SLO(ttft=5.0, stages=stages)) for i in range(3)]
    replay_of().run(load)
    assert all(s.progress.attained and s.progress.stage == 1 for s in load)


@pytest.mark.parametrize("policy", ["dp", "edf"])
@pytest.mark.parametrize("seed", range(8))
def test_every_request_finishes_however_small_the_pool(policy: str, seed: int) -> None:
    rng = random.Random(seed)
    blocks = rng.randint(24, 40)
    load = []
    for i in range(40):
        prompt, output = rng.randint(1, 12 * 16), rng.randint(1, 8 * 16)
        ttft, tpot = rng.choice([0.05, 1.0, 20.0]), rng.choice([0.01, 0.05, 0.1, 1.0])
        slo = rng.choice([None, SLO(ttft=ttft), SLO(tpot=tpot), SLO(ttft=ttft, tpot=tpot)])
        seq = request(f"r{i}", prompt, output, rng.uniform(0, 20.0), slo)
        load.append(seq)
    replay = replay_of(
        policy, blocks=blocks, budget=rng.choice([8, 64, 512]), max_num_seqs=rng.randint(1, 8)
    )
    replay.run(load)
    assert len(replay.finished) == 40
    assert replay.pool.num_free_blocks == blocks


def test_best_effort_keeps_off_the_blocks_that_promises_held_lately() -> None:
    """It would lose them to the next rush, and with them all that it has computed."""
    replay = replay_of(blocks=60)
    rush = [request(f"p{i}", 150, 60, 0.0, SLO(ttft=60.0, tpot=10.0)) for i in range(4)]
    replay.run(rush)
    assert all(seq.progress.attained for seq in rush)
    replay.waiting = [request(f"b{i}", 150, 60, replay.now, None) for i in range(4)]
    replay.step()
    # Promises held up to 56 of the 60 blocks: one of best effort may start all the same.
    assert [seq.seq_id for seq in replay.running] == ["b0"]


def test_what_promises_held_long_ago_keeps_best_effort_from_nothing() -> None:
    replay = replay_of(blocks=60)
    replay.run([request("p", 150, 60, 0.0, SLO(ttft=60.0, tpot=10.0))])
    replay.now += 600.0
    replay.waiting = [request(f"b{i}", 150, 60, replay.now, None) for i in range(4)]
    while len(replay.running) < 3:
        replay.step()
        assert len(replay.finished) == 1, "they start together, not one after another"


def test_best_effort_leaves_as_many_blocks_again_as_promises_hold() -> None:
    replay = replay_of(blocks=60)
    replay.run([request("p", 150, 60, 0.0, SLO(ttft=60.0, tpot=10.0))])
    replay.waiting = [request(f"b{i}", 150, 60, replay.now, None) for i in range(4)]
    for _ in range(8):
        replay.step()
    # Each takes 14 blocks, as the promise did: a third one would leave no 28 free.
    assert [seq.seq_id for seq in replay.running] == ["b0", "b1"]


def test_best_effort_that_runs_in_every_batch_is_owed_nothing() -> None:
    replay = promise_beside_best_effort(0.2)
    for _ in range(100):
        replay.step()
    assert len(replay.running) == 2
    assert replay.planner.best_effort_owed_s == 0.0


def _prefill_beside_best_effort(*beside: Sequence) -> float:
    """Predicted seconds of an iteration in which a long prompt without an SLO prefills beside 30
    such decodes, which take 110 ms, and others that came at once with the prompt.
    """
    replay = replay_of(max_num_seqs=64)
    replay.waiting = [request(f"d{i}", 4, 150, 0.0, None) for i in range(30)]
    while not all(seq.is_decoding for seq in replay.running) or replay.waiting:
        replay.step()
    replay.waiting = [request("long", 1000, 5, replay.now, None), *beside]
    plan = replay.step()
    assert all(f"d{i}" in plan.num_scheduled_tokens for i in range(30))
    return plan.predicted_s


def test_prefills_of_best_effort_stretch_its_decodes_fourfold() -> None:
    assert 0.38 < _prefill_beside_best_effort() < 4 * 0.12


def test_nothing_is_stretched_while_somebody_to_whom_more_is_owed_waits() -> None:
    assert _prefill_beside_best_effort(request("p", 9, 5, 0.0, SLO(ttft=9.0, tpot=1.0))) < 0.15


@pytest.mark.parametrize("between", [0, 100], ids=["just now", "behind many without an SLO"])
def test_nothing_is_stretched_beyond_half_of_what_hasty_arrivals_could_wait(between: int) -> None:
    # 38 ms alone, so it could have waited for 0.56 s.
    hasty = request("hasty", 9, 1, 0.0, SLO(ttft=0.6, tpot=1.0))
    replay = replay_of(max_num_seqs=64)
    replay.run([hasty, *(request(f"b{i}", 4, 1, 0.2, None) for i in range(between))])
    replay.waiting = [request(f"d{i}", 4, 150, replay.now, None) for i in range(30)]
    while not all(seq.is_decoding for seq in replay.running) or replay.waiting:
        replay.step()
    replay.waiting = [request("long", 1000, 5, replay.now, None)]
    assert 0.2 < replay.step().predicted_s < 0.28


def test_hasty_requests_amid_others_without_an_slo_are_in_time() -> None:
    rng, load, at = random.Random(0), [], 6.0
    load = [request(f"d{i}", rng.randint(30, 120), 150, 0.0, None) for i in range(30)]
    hasty = [request("first", 30, 10, 6.0, SLO(ttft=0.3, tpot=0.3))]
    for round_ in range(4):
        for i in range(70):
            prompt, output = rng.randint(50, 120), rng.randint(5, 60)
            load.append(request(f"b{round_}-{i}", prompt, output, at + rng.uniform(0, 9.6), None))
        at += 12.0
        for i in range(2):
            arrival = at + rng.uniform(0, 0.1)
            hasty.append(request(f"h{round_}-{i}", 30, 10, arrival, SLO(ttft=0.4, tpot=0.3)))
    replay_of().run(load + hasty, until=at + 8.0)
    assert all(seq.progress.attained for seq in hasty[1:])


def _decodes_far_ahead() -> Replay:
    """Eight decodes whose batches take 44 ms of the 50 ms promised, after three seconds."""
    replay = replay_of()
    slo = SLO(ttft=5.0, tpot=0.05)
    replay.waiting = [request(f"d{i}", 20, 190, 0.0, slo) for i in range(8)]
    while replay.now < 3.0:
        replay.step()
    ahead = min(seq.progress.next_deadline_s for seq in replay.running) - replay.now
    assert len(replay.running) == 8
    assert ahead > 0.2
    return replay


def test_decodes_far_ahead_leave_their_time_to_a_short_prompt() -> None:
    """At their pace they leave 30 prefill tokens a second; for now they need no time at all."""
    replay = _decodes_far_ahead()
    seq = request("short", 20, 5, replay.now, SLO(ttft=0.08, tpot=0.2))
    decodes = list(replay.running)
    replay.run([seq])
    assert seq.standing is Standing.ADMITTED
    assert all(one.progress.attained for one in [seq, *decodes])


def test_a_first_token_that_is_late_by_the_guard_time_alone_is_still_in_time() -> None:
    replay = _decodes_far_ahead()
    alone = replay.device.zero_load_prefill_s(20)
    slo = SLO(ttft=replay.device.margin * alone + GUARD_S / 2, tpot=0.2)
    seq = request("short", 20, 5, replay.now, slo)
    replay.run([seq])
    assert seq.progress.attained


@pytest.mark.parametrize("sigma", [0.1, 0.2])
def test_under_scatter_dp_keeps_at_least_what_simple_policies_keep(sigma: float) -> None:
    """In rates: what it is so careful about must not be lost by being careful."""
    for rate in (0.4, 1.0, 2.0):
        kept = {}
        for policy in ("dp", "sarathi", "fcfs"):
            loads = [mixed_load(rate, 60.0, seed) for seed in range(2)]
            for load in loads:
                replay_of(policy, sigma=sigma, budget=512 if policy == "dp" else 128).run(load)
            kept[policy] = sum(attained(load) for load in loads) / 2
        assert kept["dp"] >= max(kept.values()) - 0.02, (rate, kept)


@pytest.mark.parametrize("left_ms", [12.4, 12.8, 13.5, 14.2])
def test_decodes_that_would_all_be_just_in_time_run_though_the_guard_time_is_over(
    left_ms: float,
) -> None:
    """64 of them take 11.3 ms; a few would take 10 ms, and all others would be late."""
    model = PerfModel((Piece(tokens=1e-5, seqs=1e-5, base=0.010),), margin=1.02)
    pool = BlockPool(4000, 16, prefix_caching=False)
    replay = Replay(make_planner("dp", model=model), pool, 4096, 128, device=model)
    slo = SLO(ttft=5.0, tpot=0.03)
    replay.waiting = [request(f"d{i}", 20, 50, 0.0, slo) for i in range(64)]
    while any(not seq.is_decoding for seq in (*replay.waiting, *replay.running)):
        replay.step()
    replay.now = min(s.progress.next_deadline_s for s in replay.running) - left_ms / 1e3
    assert len(replay.plan().num_scheduled_tokens) == 64
