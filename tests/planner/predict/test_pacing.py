"""Deadlines of whole answers as due times and paces."""

from __future__ import annotations

import math

import pytest
from replay import Replay, make_sequence

from minserve.engine.block_pool import BlockPool
from minserve.planner.batching.formation import Work
from minserve.planner.policies.dp import DpPlanner
from minserve.planner.policies.edf import EdfPlanner
from minserve.planner.policies.promising import PromisingPlanner
from minserve.planner.predict.lengths import QuantileLengths
from minserve.planner.predict.pacing import (
    STEP,
    Pace,
    PaceLimits,
    Paces,
    pace_before,
    pace_of,
    round_down,
)
from minserve.planner.predict.perf_model import PerfModel, Piece
from minserve.request import Sequence
from minserve.slo.objectives import SLO

IDLE = PaceLimits.of(0.010, 0.0, 0.0)
LOADED = PaceLimits.of(0.010, 0.030, 0.0)


def decoding(slo: SLO, *times: float) -> Sequence:
    """A decode with tokens at these times."""
    seq = make_sequence("a", [1, 2, 3], 500, slo=slo)
    for now in times:
        seq.slo_progress.add_token(now)
        seq.token_ids.append(0)
    seq.num_computed_tokens = seq.num_tokens - 1
    return seq


def test_a_decode_spreads_its_time_evenly_over_what_is_left() -> None:
    seq = decoding(SLO(finish=4.0), 1.0, 1.5)
    pace = pace_of(seq, 50, 1.6, 0.0, IDLE)
    assert (pace.step_s, pace.due_s) == pytest.approx((2.5 / 50, 1.5 + 2.5 / 50))
    assert pace.tpot_s <= pace.step_s < pace.tpot_s * STEP
    # If every token comes when it is due, the last one comes at the deadline.
    assert seq.slo_progress.last_token_s + 50 * pace.step_s == pytest.approx(4.0)  # type: ignore


def test_the_pace_tightens_with_a_longer_guess_and_not_beyond_what_others_can_afford() -> None:
    seq = decoding(SLO(finish=4.0), 1.0)
    idle = [pace_of(seq, left, 1.0, 0.0, IDLE).step_s for left in (30, 60, 120, 240, 2000)]
    assert idle == sorted(idle, reverse=True)
    assert idle[3] == pytest.approx(3.0 / 240)
    assert idle[4] == IDLE.lone_s
    assert pace_of(seq, 240, 1.0, 0.0, LOADED).step_s == LOADED.tightest_s == LOADED.slowest_s


@pytest.mark.parametrize("limits", [IDLE, LOADED])
@pytest.mark.parametrize("num_left", [1, 2, 40, 300, 5000])
def test_a_request_that_keeps_its_due_time_and_pace_keeps_its_deadline(
    limits: PaceLimits, num_left: int
) -> None:
    for now in (0.0, 1.0, 3.0, 8.0, 9.9):
        pace = pace_before(0.0, 10.0, num_left, now, 0.05, limits)
        assert pace.due_s <= 10.0
        assert limits.lone_s / STEP <= pace.tpot_s <= limits.slowest_s
        if limits is IDLE and now + 0.05 + (num_left - 1) * limits.tightest_s <= 10.0:
            assert now + 0.05 <= pace.due_s + 1e-9
            assert pace.due_s + (num_left - 1) * pace.tpot_s <= 10.0 + 1e-9
        # What not even an idle device could do is due before it can be done.
        if now + 0.05 + (num_left - 1) * limits.lone_s > 10.0:
            assert pace.due_s < now + 0.05


def test_who_has_waited_gets_a_tighter_pace() -> None:
    paces = [pace_before(0.0, 10.0, 200, now, 0.1, IDLE).tpot_s for now in (0.0, 4.0, 6.0, 7.0)]
    assert paces[0] == paces[1] > paces[2] > paces[3]


def test_paces_come_in_steps_and_are_never_slower_than_asked() -> None:
    for pace_s in (1e-3, 0.0123, 0.05, 1.0, 7.7):
        assert round_down(pace_s) <= pace_s * (1 + 1e-9) < round_down(pace_s) * STEP * (1 + 1e-6)
    found = {round_down(0.02 + i * 1e-4) for i in range(800)}
    assert len(found) <= 10


def test_whatever_is_due_sooner_counts() -> None:
    strict = decoding(SLO(finish=4.0, tpot=0.02), 1.0)
    lax = decoding(SLO(finish=4.0, tpot=0.5, ttft=1.0), 1.0)
    plain = decoding(SLO(tpot=0.03), 1.0)
    pace = Pace(1.05, 3.0, 0.04, 0.05, 1)
    assert Paces().tpot_s(plain) == 0.03
    paces = Paces({strict.seq_id: pace})
    assert (paces.due_s(strict), paces.tpot_s(strict)) == (pytest.approx(1.02), 0.02)
    assert (paces.due_s(lax), paces.tpot_s(lax)) == (1.05, 0.04)
    assert (paces.hurries(strict), paces.hurries(lax)) == (False, True)
    # Between two rounds each token makes the next one due later.
    lax.token_ids.append(0)
    assert paces.due_s(lax) == pytest.approx(1.10)
    paces.relax(lax)
    assert (paces.due_s(lax), paces.tpot_s(lax)) == (1.5, 0.5)


def test_only_a_late_token_that_breaks_a_promise_is_at_stake() -> None:
    soft, hard = decoding(SLO(finish=4.0), 1.0), decoding(SLO(tpot=0.03), 1.0)
    hard.seq_id = "hard"
    dues = [(1.01, soft), (1.03, hard)]
    work = Work(decodes=dues, paces=Paces({soft.seq_id: Pace(1.01, 3.0, 0.01, 0.01, 1)}))
    assert [seq for _, seq in work.at_stake(dues)] == [hard]
    assert work.tightest_of_deadlines_s() == 0.01


# --- whole answers through the planner ---

MODEL = PerfModel([Piece(tokens=1e-4, base=0.010)])


def replay(planner: PromisingPlanner) -> Replay:
    return Replay(planner, BlockPool(4096, 16, prefix_caching=False), 2048, 64, device=MODEL)


def run_all(loop: Replay, seqs: list[Sequence]) -> None:
    todo = sorted(seqs, key=lambda s: s.request.arrival_s)
    while todo or loop.waiting or loop.running:
        while todo and todo[0].request.arrival_s <= loop.now:
            loop.waiting.append(todo.pop(0))
        if not loop.waiting and not loop.running:
            loop.now = todo[0].request.arrival_s
            continue
        loop.step()


@pytest.mark.parametrize("make", [DpPlanner, EdfPlanner])
def test_deadlines_beside_chat_are_kept(make: type[PromisingPlanner]) -> None:
    planner = make(MODEL)
    chats = [
        make_sequence(
            f"c{i}", [i + 1] * 300, 60, 0.15 * i, slo=SLO(ttft=0.5, tpot=0.1), model=MODEL
        )
        for i in range(30)
    ]
    whole = [
        make_sequence(f"d{i}", [i + 99] * 600, 80, 0.3 * i, slo=SLO(finish=12.0), model=MODEL)
        for i in range(12)
    ]
    loop = replay(planner)
    run_all(loop, chats + whole)
    assert all(seq.slo_progress.attained for seq in chats + whole)


def test_an_answer_that_outlives_its_guess_is_hurried_until_its_deadline() -> None:
    lengths = QuantileLengths()
    for i in range(20):
        short = decoding(SLO(finish=4.0, name="x"), *[0.1] * 40)
        short.seq_id = f"s{i}"
        lengths.finished(short)
    for _ in range(5):
        lengths.finished(decoding(SLO(finish=4.0, name="x"), *[0.1] * 150))
    planner = DpPlanner(MODEL, lengths=lengths)
    seq = make_sequence(
        "long", [7] * 50, 150, slo=SLO(finish=4.0, name="x"), model=MODEL, max_tokens=400
    )
    loop = replay(planner)
    loop.waiting.append(seq)
    paces = []
    while seq.num_output_tokens < 150:
        loop.step()
        loop.now += 0.012  # the device is slower than the planner thinks
        if seq.is_decoding:
            paces.append((seq.num_output_tokens, planner.paces.by_id[seq.seq_id].step_s))
    before = min(pace for done, pace in paces if done < 35)
    after = [pace for done, pace in paces if 41 < done < 100]
    assert max(after) < before
    assert seq.slo_progress.attained


def test_what_cannot_end_in_time_is_not_promised() -> None:
    """800 tokens take 8 s at least: even a lone request would be late."""
    planner = DpPlanner(MODEL)
    hopeless = SLO(finish=3.0, expected_output_tokens=800)
    seq = make_sequence("a", [1] * 100, 800, slo=hopeless, model=MODEL)
    refused = make_sequence(
        "b", [2] * 100, 800, slo=SLO(finish=3.0, expected_output_tokens=800,
                                     on_unattainable="reject"), model=MODEL,
    )  # fmt: skip
    fine = make_sequence("c", [3] * 100, 80, slo=SLO(finish=3.0), model=MODEL)
    loop = replay(planner)
    loop.waiting += [seq, refused, fine]
    plan = loop.plan()
    assert plan.admit == [fine.seq_id]
    assert plan.reject[refused.seq_id].reason == "device"
    assert math.isinf(plan.reject[refused.seq_id].retry_after_s)
