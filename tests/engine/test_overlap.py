"""Two iterations on the device at once: the same outputs, and no block that two of them write.

The device runs everything as late as it can, and says whether each token was computed from the
right ones; what outputs should be is known without any engine.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from late_device import END, VOCAB, LateDevice, expected_tokens

from minserve.engine.block_pool import BlockPool
from minserve.engine.core import EngineCore
from minserve.engine.journal import Journal
from minserve.engine.speculation.proposer import NgramProposer
from minserve.errors import DeviceLostError, GenerationError
from minserve.outputs import OutputDelta
from minserve.planner.plan import IterationPlan, PlannerView
from minserve.planner.policies.registry import make_planner
from minserve.planner.policies.sarathi import SarathiPlanner
from minserve.planner.predict.perf_model import BatchShape, PerfModel, Piece
from minserve.request import FinishReason, Request, Sequence
from minserve.sampling_params import SamplingParams
from minserve.slo.objectives import SLO, Task
from minserve.slo.task_call import TaskCall, TaskKey

BLOCK = 4
DEVICE = (Piece(tokens=0.002, seqs=0.0005, context_tokens=1e-6, base=0.01, draft_tokens=1e-5),)
SEEDS = 6  # of random plays in each house
GENEROUS = SLO(ttft=1000.0, tpot=100.0)


class TickingClock:
    """A clock that goes on a little whenever it is read."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


class Play:
    """A core on a late device, and what was told of its requests."""

    def __init__(
        self,
        policy: str = "sarathi",
        *,
        num_blocks: int = 60,
        max_num_seqs: int = 8,
        drafts: int = 0,
        ahead: bool = True,
        fails: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.device = LateDevice(BLOCK, fails)
        self.core = EngineCore(
            self.device,
            BlockPool(num_blocks, BLOCK),
            make_planner(policy, model=PerfModel(DEVICE)),
            token_budget=16,
            max_num_seqs=max_num_seqs,
            max_model_len=num_blocks * BLOCK,
            clock=TickingClock(),
            proposer=NgramProposer(drafts) if drafts else None,
            plans_ahead=True,
            launches_ahead=ahead,
        )
        self.told: dict[tuple[str, int], list[int]] = {}
        self.ends: dict[tuple[str, int], OutputDelta] = {}
        self.requests: dict[str, Request] = {}

    def add(self, name: str, prompt: list[int], slo: SLO | None = None, **params: Any) -> None:
        request = Request(
            request_id=name,
            prompt_token_ids=tuple(prompt),
            params=SamplingParams(**params),
            seed=int(name),
            arrival_s=self.core.clock(),
            stop_token_ids=frozenset({END}),
            slo=slo,
            targets=None if slo is None else slo.resolve(0.0, 0.0),
        )
        self.requests[name] = request
        for index in range(request.params.n):
            self.told[name, index] = []
            self.core.add(Sequence(request, index), None)

    def take(self, deltas: list[OutputDelta]) -> None:
        for delta in deltas:
            key = (delta.request_id, delta.index)
            assert key not in self.ends, "told behind the end"
            self.told[key] += delta.token_ids
            if delta.finish_reason is not None:
                self.ends[key] = delta

    def step(self) -> None:
        self.take(self.core.step())
        self.core.check_integrity()

    def run(self) -> None:
        while self.core.has_work:
            self.step()
        self.check_idle()

    def check_idle(self) -> None:
        assert self.ends.keys() == self.told.keys()
        assert self.core.pool.num_free_blocks == self.core.pool.num_blocks
        self.core.check_integrity()

    def check_tokens(self) -> None:
        """Each output is what it should be, or what had come of it when it was cut off."""
        for (name, index), told in self.told.items():
            expected = expected_tokens(self.requests[name], index)
            reason = self.ends[name, index].finish_reason
            if reason in (FinishReason.ABORT, FinishReason.ERROR):
                expected = expected[: len(told)]
            assert told == expected, (name, index, reason)


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
        core.check_integrity()
        core.begin()
        core.check_integrity()
        for _ in range(late):
            ask = rng.choice([core.abort, core.complete])
            play.take(ask(str(rng.randrange(number + 1))))
        core.check_integrity()
        play.take(core.end())
        core.check_integrity()
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


def lasting_seed(num: int, ends_at: int | None = None) -> int:
    """A seed whose output behind prompt [1] has ``num`` tokens, with its end there or beyond."""
    for seed in range(100_000):
        request = Request(request_id="x", prompt_token_ids=(1,), params=SamplingParams(max_tokens=num),
                          seed=seed, arrival_s=0.0)  # fmt: skip
        tokens = expected_tokens(request, 0)
        ends = tokens.index(END) + 1 if END in tokens else None
        if ends == ends_at:
            return seed
    raise AssertionError("no such seed")


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
        assert play.core.speculation.num_drafts > 0
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


# -- times and counts --------------------------------------------------------------------


class TimedDevice(LateDevice):
    """Each batch takes a second, behind the one before it."""

    def __init__(self, clock: Any) -> None:
        super().__init__(BLOCK)
        self.clock, self.free_at = clock, 0.0
        self.ends: list[float] = []

    def _launch(self, batch: Any, before: Any) -> Any:
        launched = super()._launch(batch, before)
        self.free_at = ends_at = max(self.free_at, self.clock.now) + 1.0
        self.ends.append(ends_at)
        results = launched.results

        def late_results() -> Any:
            self.clock.now = max(self.clock.now, ends_at)
            return results()

        launched.results = late_results
        return launched


def test_iterations_are_timed_from_the_end_of_one_to_the_end_of_the_next() -> None:
    play = Play()
    clock = play.core.clock
    play.device = play.core.runner = TimedDevice(clock)
    journal = Journal.of(play.core)
    observed: list[tuple[BatchShape, float]] = []
    play.core.planner.model.observe = lambda shape, seconds: observed.append((shape, seconds))
    seed = str(lasting_seed(8))
    play.add(seed, [1], max_tokens=8)
    while play.core.has_work:
        play.step()
        clock.now += 0.4  # the host is busy with something else, which the device need not wait for
    play.check_tokens()
    assert [seconds for _, seconds in observed] == pytest.approx([1.0] * 8, abs=0.01)
    assert all(shape.tokens == 1 for shape, _ in observed)
    stats = play.core.stats
    assert stats.iteration_s.total == pytest.approx(8.0, abs=0.1)
    assert sum(stats.iteration_s.counts) == 8
    iterations = journal.since(None).iterations
    ends = [one.began_s + one.seconds for one in iterations]
    assert ends == pytest.approx(play.device.ends, abs=0.01)
    begins = [one.began_s for one in iterations]
    assert begins[1:] == pytest.approx(ends[:-1], abs=0.01)
    assert [one.num_seqs for one in iterations] == [1] * 8
    assert [one.tokens.best_effort_prefill for one in iterations] == [1] + [0] * 7
    assert [one.tokens.best_effort_decode for one in iterations] == [0] + [1] * 7


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
