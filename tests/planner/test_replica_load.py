"""How much an engine has to do, as it tells a router."""

from __future__ import annotations

import math

import pytest
from loads import replay_of, request
from replay import Replay

from minserve.planner.policies.registry import promising_policies
from minserve.planner.replica_load import ReplicaLoad, load_of
from minserve.request import Sequence
from minserve.slo.objectives import SLO, DecodeStage, Standing

FAST, SLOW = SLO(ttft=5.0, tpot=0.05), SLO(ttft=5.0, tpot=0.1)
POLICIES = ("dp", "edf", "sarathi", "fcfs")
# The pool of these replays.
BLOCKS = 100
CAPACITY = BLOCKS * 16


def replay_with(policy: str) -> Replay:
    return replay_of(policy, blocks=BLOCKS)


def load(replay: Replay) -> ReplicaLoad:
    return load_of(replay.planner, replay.view())


def part(seq: Sequence, *, computed: int, outputs: int = 0, standing: Standing) -> Sequence:
    """The sequence as it stands later."""
    seq.num_computed_tokens = computed
    seq.token_ids += [1] * outputs
    seq.standing = standing
    return seq


def three(standing: Standing = Standing.ADMITTED) -> tuple[list[Sequence], list[Sequence]]:
    """A decode of 120 tokens and a prefill of 200 of which 60 are computed, both running, and
    a prompt of 70 that waits.
    """
    decode = part(
        request("decode", 110, 50, 0.0, FAST), computed=119, outputs=10, standing=standing
    )
    prefill = part(request("prefill", 200, 50, 1.0, SLOW), computed=60, standing=standing)
    waiting = part(request("waiting", 70, 50, 2.0, SLOW), computed=0, standing=Standing.PENDING)
    return [decode, prefill], [waiting]


def with_three(policy: str, standing: Standing = Standing.ADMITTED) -> Replay:
    replay = replay_with(policy)
    replay.running, replay.waiting = three(standing)
    return replay


@pytest.mark.parametrize("policy", POLICIES)
def test_an_idle_engine_has_nothing_to_do(policy: str) -> None:
    assert load(replay_with(policy)) == ReplicaLoad(
        prefill_tokens=0,
        decode_rate=0.0,
        tightest_tpot_s=math.inf,
        free_tokens=CAPACITY,
        num_sequences=0,
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_prefills_and_paces_of_whoever_is_owed_them_add_up(policy: str) -> None:
    found = load(with_three(policy))
    # A decode's newest token is no prefill.
    assert found.prefill_tokens == 140 + 70
    assert found.decode_rate == pytest.approx(20 + 10 + 10)
    assert found.tightest_tpot_s == 0.05
    assert found.num_sequences == 3


@pytest.mark.parametrize("policy", promising_policies())
def test_under_a_promise_memory_is_owed_for_the_output_too(policy: str) -> None:
    guess = 128  # of outputs of which nothing is known
    held = 120 + (guess - 10) + 200 + guess + 70 + guess
    assert load(with_three(policy)).free_tokens == CAPACITY - held


@pytest.mark.parametrize("policy", ["sarathi", "fcfs"])
def test_without_promises_memory_is_what_there_is_of_each_sequence(policy: str) -> None:
    assert load(with_three(policy)).free_tokens == CAPACITY - 120 - 200 - 70


@pytest.mark.parametrize("policy", promising_policies())
def test_outputs_are_counted_as_long_as_the_planner_expects_them(policy: str) -> None:
    replay = replay_with(policy)
    for i in range(20):
        finished = request(f"f{i}", 10, 50, 0.0, SLOW)
        finished.token_ids += [1] * 30
        replay.planner.finished(finished)
    replay.waiting = [request("waiting", 70, 50, 2.0, SLOW)]
    assert load(replay).free_tokens == CAPACITY - 70 - 30


@pytest.mark.parametrize("policy", promising_policies())
def test_best_effort_is_owed_nothing_where_there_are_promises(policy: str) -> None:
    replay = with_three(policy, Standing.BEST_EFFORT)
    found = load(replay)
    # The one that waits may yet be promised what it asks for.
    assert found == ReplicaLoad(
        prefill_tokens=70,
        decode_rate=10.0,
        tightest_tpot_s=0.1,
        free_tokens=CAPACITY - 70 - 128,
        num_sequences=3,
    )
    replay.waiting[0].standing = Standing.BEST_EFFORT
    assert load(replay) == ReplicaLoad(free_tokens=CAPACITY, num_sequences=3)


@pytest.mark.parametrize("policy", ["sarathi", "fcfs"])
def test_policies_that_promise_nothing_know_no_best_effort(policy: str) -> None:
    assert load(with_three(policy, Standing.BEST_EFFORT)) == load(with_three(policy))


@pytest.mark.parametrize("policy", POLICIES)
def test_whoever_has_no_slo_counts_only_as_a_sequence(policy: str) -> None:
    replay = replay_with(policy)
    replay.waiting = [request("free", 100, 20, 0.0, None)]
    replay.running = [request("too", 50, 20, 0.0, None)]
    assert load(replay) == ReplicaLoad(free_tokens=CAPACITY, num_sequences=2)


@pytest.mark.parametrize("policy", POLICIES)
def test_whoever_is_promised_only_a_first_token_is_owed_no_pace(policy: str) -> None:
    replay = replay_with(policy)
    replay.waiting = [request("first", 100, 20, 0.0, SLO(ttft=5.0))]
    found = load(replay)
    assert (found.prefill_tokens, found.decode_rate) == (100, 0.0)
    assert found.tightest_tpot_s == math.inf


def test_a_deadline_of_the_whole_answer_is_owed_the_pace_that_the_planner_gives_it() -> None:
    replay = replay_with("dp")
    replay.waiting.append(request("a", 100, 40, 0.0, SLO(finish=10.0)))
    assert load(replay).tightest_tpot_s == math.inf
    replay.plan()
    (pace,) = replay.planner.paces.by_id.values()  # type: ignore[attr-defined]
    found = load(replay)
    assert found.tightest_tpot_s == pace.tpot_s < math.inf
    assert found.decode_rate == pytest.approx(1 / pace.tpot_s)


def test_the_pace_owed_is_that_of_the_stage_under_way() -> None:
    slo = SLO(ttft=5.0, stages=(DecodeStage(tpot=0.02, tokens=2), DecodeStage(tpot=0.5)))
    seq = request("staged", 10, 20, 0.0, slo)
    replay = replay_with("dp")
    replay.running = [part(seq, computed=10, outputs=1, standing=Standing.ADMITTED)]
    seq.progress.add_token(1.0)
    assert (load(replay).tightest_tpot_s, load(replay).decode_rate) == (0.02, pytest.approx(50))
    seq.progress.add_token(1.02)
    assert (load(replay).tightest_tpot_s, load(replay).decode_rate) == (0.5, pytest.approx(2))


@pytest.mark.parametrize("policy", POLICIES)
def test_what_was_computed_is_no_longer_to_be_done(policy: str) -> None:
    replay = replay_with(policy)
    replay.waiting = [request(f"r{i}", 40, 5, 0.0, SLOW) for i in range(3)]
    assert load(replay).prefill_tokens == 120
    while replay.waiting or replay.running:
        replay.step()
        todo = [s for s in (*replay.waiting, *replay.running) if s.num_output_tokens == 0]
        found = load(replay)
        assert found.prefill_tokens == sum(40 - seq.num_computed_tokens for seq in todo)
        assert found.num_sequences == 3 - len(replay.finished)
    assert load(replay) == ReplicaLoad(free_tokens=CAPACITY)


@pytest.mark.parametrize("policy", promising_policies())
def test_more_than_there_is_may_be_owed(policy: str) -> None:
    replay = replay_with(policy)
    replay.waiting = [request(f"r{i}", 300, 50, 0.0, SLOW) for i in range(8)]
    assert load(replay).free_tokens == CAPACITY - 8 * (300 + 128) < 0
