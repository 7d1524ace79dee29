"""Two iterations on the device at once: the same outputs, and no block that two of them write.

The device runs everything as late as it can, and says whether each token was computed from the
right ones; what outputs should be is known without any engine.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from late_device import VOCAB, LateDevice, expected_tokens
from late_play import Play, lasting_seed

from minserve.errors import DeviceLostError, GenerationError
from minserve.planner.plan import IterationPlan, PlannerView
from minserve.planner.policies.sarathi import SarathiPlanner
from minserve.request import FinishReason, Sequence
from minserve.slo.objectives import SLO, Task
from minserve.slo.task_call import TaskCall, TaskKey

SEEDS = 6  # of random plays in each house
GENEROUS = SLO(ttft=1000.0, tpot=100.0)


def a_prompt(rng: random.Random) -> list[int]:
    """A prompt that often begins as another one does."""
    num = rng.choice([1, 2, 5, 9, 18, 30])
    return [*([1] * (num // 2)), *(rng.randrange(VOCAB - 1) for _ in range(num - num // 2))]


def play_at_random(play: Play, seed: int) -> None:
    """Send requests at any time and abort some, also between the halves of an iteration."""
    rng, core = random.Random(seed), play.core
    arrivals = Counter(rng.randrange(30) for _ in range(12))
    aborts = Counter(rng.randrange(45) for _ in range(4))
    number, step = 0, 0
    with_slo = core.planner.promises
    while core.has_work or step < 45:
        for _ in range(arrivals[step]):
            play.add(
                str(number),
                a_prompt(rng),
                slo=GENEROUS if with_slo and rng.random() < 0.7 else None,
                n=rng.choice([1, 1, 1, 2, 4]),
                max_tokens=rng.randint(1, 14),
            )
            number += 1
        early, late = (rng.choice([0, aborts[step]]) for _ in range(2))
        for _ in range(early):
            play.take(core.abort(str(rng.randrange(number + 1))))
        play.check_books()
        core.begin()
        play.check_books()
        for _ in range(late):
            ask = rng.choice([core.abort, core.complete])
            play.take(ask(str(rng.randrange(number + 1))))
        play.check_books()
        play.take(core.end())
        play.check_books()
        step += 1
    play.check_idle()


HOUSES = [
    {},
    {"num_blocks": 14, "max_num_seqs": 64},
    {"num_blocks": 20, "max_num_seqs": 3},
    {"drafts": 3},
    {"drafts": 2, "num_blocks": 16},
]


@pytest.mark.parametrize("policy", ["fcfs", "sarathi", "edf", "dp"])
@pytest.mark.parametrize("house", HOUSES, ids=str)
def test_outputs_are_right_whatever_comes_between(policy: str, house: dict) -> None:
    launched = preempted = surplus = cut_off = 0
    for seed in range(SEEDS):
        play = Play(policy, **house)
        play_at_random(play, seed)
        # An output that was completed from outside has the reason of one that stopped.
        for key, told in play.told.items():
            expected = expected_tokens(play.requests[key[0]], key[1])
            assert told == expected[: len(told)]
            cut_off += len(told) < len(expected)
        stats = play.core.snapshot()
        assert play.device.num_followed == stats.plans_ahead["launched"]
        launched += stats.plans_ahead["launched"]
        preempted += stats.num_preemptions
        surplus += stats.num_surplus_tokens
    assert launched > 5 * SEEDS
    assert surplus > 0
    assert cut_off > 0
    if house.get("num_blocks", 60) < 20:
        assert preempted > 0


@pytest.mark.parametrize("policy", ["fcfs", "sarathi", "dp"])
def test_all_tokens_of_all_outputs_come(policy: str) -> None:
    for seed in range(10):
        rng, play = random.Random(seed), Play(policy)
        for number in range(10):
            play.add(str(number), a_prompt(rng), n=rng.choice([1, 1, 3]), max_tokens=12)
        play.run()
        play.check_tokens()
        assert play.device.num_followed > 0


# -- when things happen ------------------------------------------------------------------


def test_the_next_batch_is_launched_before_the_last_one_is_read() -> None:
    events, play = [], Play()
    follow = play.device.follow

    def following(batch: Any, before: Any) -> Any:
        events.append(("follow", before is not None and not before.chosen))
        return follow(batch, before)

    play.device.follow = following
    play.add(str(lasting_seed(6)), [1], max_tokens=6)
    play.run()
    play.check_tokens()
    assert events == [("follow", True)] * 5, "of six iterations, the last one is known to be it"
    assert play.core.stats.plans_ahead == {"launched": 5, "held": 0, "discarded": 0}
    assert play.core.stats.num_surplus_tokens == 0, "its length was known"


def test_an_end_that_nobody_knew_leaves_one_token_in_vain_and_its_blocks_until_then() -> None:
    play = Play()
    play.add(str(lasting_seed(9, ends_at=4)), [1], max_tokens=9)
    play.add(str(lasting_seed(9)), [1], max_tokens=9)
    first, second = play.core.waiting
    while not play.ends:
        play.step()
    assert first.finish_reason is FinishReason.STOP
    held = play.core.pool.num_blocks - play.core.pool.num_free_blocks
    assert first.block_table, "the device may still write there"
    assert held == len({*first.block_table, *second.block_table})
    play.step()
    assert not first.block_table
    assert play.core.stats.num_surplus_tokens == 1
    play.run()
    play.check_tokens()


def test_the_last_output_ends_at_once_and_its_surplus_is_waited_for() -> None:
    play = Play()
    play.add(str(lasting_seed(9, ends_at=3)), [1], max_tokens=9)
    while not play.ends:
        play.step()
    assert play.core.num_unfinished == 0
    assert play.core.has_work, "the device has a batch that nobody wants"
    play.core.drain()
    assert not play.core.has_work
    play.check_idle()
    play.check_tokens()


def test_an_abort_between_two_steps_frees_its_blocks_when_the_batch_is_over() -> None:
    play = Play()
    play.add(str(lasting_seed(9)), [1], max_tokens=9)
    (seq,) = play.core.waiting
    play.step()
    play.take(play.core.abort(seq.request.request_id))
    assert play.core.num_unfinished == 0
    assert seq.block_table
    play.run()
    assert not seq.block_table


def test_drafts_are_verified_in_the_order_in_which_nothing_overlaps() -> None:
    overlapped, one_by_one = (Play("dp", drafts=3, ahead=ahead) for ahead in (True, False))
    for play in (overlapped, one_by_one):
        for number in range(4):
            play.add(str(number), [1, 2, 1, 2, 1, 2, 1], slo=GENEROUS, max_tokens=14)
        play.run()
        play.check_tokens()
        assert play.core.stats.speculation.num_drafts > 0
    assert one_by_one.device.num_followed == 0


def test_a_start_waits_for_the_prefill_whose_blocks_it_may_share() -> None:
    shared = [1] * 20
    play = Play()
    play.add("0", shared, max_tokens=3)
    play.core.begin()
    play.add("1", shared, max_tokens=3)
    play.take(play.core.end())
    play.run()
    play.check_tokens()
    assert play.core.pool.prefix_hits_tokens >= 16


def test_log_probabilities_of_a_prompt_are_read_before_anything_follows() -> None:
    play = Play()
    play.add("0", [1] * 40, prompt_logprobs=1, max_tokens=2)
    for _ in range(3):  # 16, 16 and 8 tokens
        assert play.device.num_followed == 0
        play.step()
    play.run()


# -- what goes wrong ---------------------------------------------------------------------


class Failing:
    """Fails at one place: at random, or always."""

    def __init__(self, where: str, error: Exception, seed: int | None = None) -> None:
        self._where, self._error = where, error
        self._rng = None if seed is None else random.Random(seed)

    def __call__(self, what: str) -> None:
        if what == self._where and (self._rng is None or self._rng.random() < 0.15):
            raise self._error


@pytest.mark.parametrize("where", ["launch", "sample", "results"])
def test_a_batch_that_fails_runs_again_and_so_does_the_one_behind_it(where: str) -> None:
    followed = failed = whole = 0
    for seed in range(20):
        failing = Failing(where, RuntimeError("CUDA out of memory"), seed)
        play, rng = Play(fails=failing), random.Random(seed)
        for number in range(6):
            play.add(str(number), a_prompt(rng), max_tokens=10)
        play.run()
        play.check_tokens()
        followed += play.device.num_followed
        failed += sum(play.core.stats.failed_batches.values())
        whole += sum(one.error is None for one in play.ends.values())
        errors = [one.error for one in play.ends.values() if one.error is not None]
        # Who fails even alone ends with that error.
        assert all("out of memory" in str(error) for error in errors)
    assert failed > 20
    assert followed > 100
    assert whole > 100


def test_a_lost_device_is_told_and_leaves_the_books_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    play = Play()
    for number in range(3):
        play.add(str(number), [1, 2, 3], max_tokens=9)
    play.step()
    monkeypatch.setattr(LateDevice, "is_lost", True)
    play.device.may_fail = Failing("results", RuntimeError("an illegal memory access"))
    with pytest.raises(DeviceLostError):
        play.step()
    play.take(play.core.take_untold())
    play.take(play.core.abort_all(GenerationError("the device is lost")))
    assert play.core.pool.num_free_blocks == play.core.pool.num_blocks
    assert not play.core.has_work
    play.core.check_integrity()
    play.check_tokens()


def test_ctrl_c_forgets_both_batches_and_the_requests_can_go_on_or_be_aborted() -> None:
    play = Play()
    for number in range(3):
        play.add(str(number), [1, 2, 3], max_tokens=9)
    play.step()

    def interrupt(what: str) -> None:
        if what == "results":
            play.device.may_fail = lambda _: None
            raise KeyboardInterrupt

    play.device.may_fail = interrupt
    with pytest.raises(KeyboardInterrupt):
        play.core.step()
    play.take(play.core.abort("1"))
    play.core.check_integrity()
    play.device.queue.clear()
    play.run()
    play.check_tokens()
    assert [len(play.told[str(n), 0]) > 3 for n in (0, 2)] == [True, True]


def test_a_plan_that_fails_while_a_batch_runs_loses_nothing_of_it() -> None:
    play = Play()
    play.add("3", [1, 2, 3], max_tokens=9)
    plan = play.core.planner.plan
    calls = Counter()

    def sometimes(view: PlannerView, now: float) -> IterationPlan:
        calls["plan"] += 1
        if calls["plan"] % 3 == 0:
            raise RuntimeError("planner bug")
        return plan(view, now)

    play.core.planner.plan = sometimes
    play.run()
    play.check_tokens()
    assert play.device.num_followed > 0


def test_who_gets_no_block_for_the_next_batch_runs_in_a_later_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    play = Play()
    for number in range(2):
        play.add(str(number), [1, 2, 3], max_tokens=12)
    grow, refused = play.core.pool.grow, []

    def tight(seq: Sequence, num_tokens: int) -> None:
        if isinstance(seq.token_ids, range) and not refused:
            refused.append(seq.seq_id)
            num_tokens = 10_000
        grow(seq, num_tokens)

    monkeypatch.setattr(play.core.pool, "grow", tight)
    play.core.planning._safe = SarathiPlanner()
    play.run()
    play.check_tokens()
    assert refused


def test_what_is_held_for_a_task_is_held_when_its_batch_is_over() -> None:
    play = Play()
    task = SLO(ttft=1000.0, tpot=100.0, task=Task(id="a", finish=900.0))
    play.add("0", [1] * 9, slo=task, max_tokens=9)
    (seq,) = play.core.waiting
    call = TaskCall(key=TaskKey("", "", "a"), number=1, calls=None, remaining_s=900.0, finish_s=900.0,
                    aim_s=900.0)  # fmt: skip
    seq.request = seq.request.in_task(call)
    play.step()
    play.take(play.core.complete("0"))
    assert play.core.pool.num_held_blocks == 0
    play.run()
    assert play.core.pool.num_held_blocks == 2
