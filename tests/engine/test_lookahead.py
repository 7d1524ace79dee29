"""What a plan made ahead is made from, and what of it still holds when its time has come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from minserve import SLO, SamplingParams
from minserve.engine.batch import Scheduled
from minserve.engine.block_pool import BlockPool
from minserve.engine.lookahead import PlanAhead, confirm, project
from minserve.planner.plan import IterationPlan, PlannerView, Refusal
from minserve.planner.predict.eager import DraftPasses
from minserve.request import Request, Sequence, SequenceState


class ToyProposer:
    """Drafts up to ``most`` tokens for anybody."""

    def __init__(self, most: int = 4) -> None:
        self.max_tokens = 4
        self.most = most
        self.passes = DraftPasses()

    def limit(self, seq: Sequence) -> int:
        assert isinstance(seq.token_ids, list), "nobody drafts behind a token not yet known"
        return self.most

    def lag(self, seq: Sequence) -> int:
        return self.most


class Bench:
    """Sequences on a real pool: ``d`` decodes, ``p`` is amid its prefill, ``w`` waits."""

    def __init__(self, num_blocks: int = 20) -> None:
        self.pool = BlockPool(num_blocks, 4)
        self.proposer = ToyProposer()
        self.running = [self.make("d", 5), self.make("p", 12)]
        self.waiting = [self.make("w", 9)]
        self.run("d", 5, 7)
        self.run("p", 4)

    def make(self, name: str, num_prompt: int) -> Sequence:
        prompt = tuple(ord(name) + i for i in range(num_prompt))
        params = SamplingParams(max_tokens=8)
        request = Request(
            request_id=name, prompt_token_ids=prompt, params=params, seed=0, arrival_s=0.0
        )
        return Sequence(request)

    def __getitem__(self, name: str) -> Sequence:
        return next(s for s in (*self.running, *self.waiting) if s.seq_id == name)

    def run(self, name: str, num_tokens: int, *sampled: int) -> None:
        seq = self[name]
        seq.state = SequenceState.RUNNING
        self.pool.grow(seq, num_tokens)
        seq.num_computed_tokens += num_tokens
        seq.token_ids += sampled
        self.pool.commit(seq)

    def end(self, name: str) -> None:
        seq = self[name]
        self.pool.release(seq)
        (self.running if seq in self.running else self.waiting).remove(seq)

    def view(self) -> PlannerView:
        return PlannerView(
            waiting=self.waiting,
            running=self.running,
            memory=self.pool,
            token_budget=64,
            max_num_seqs=8,
            speculation=self.proposer,
        )

    def ahead(self, **changes: Any) -> PlanAhead:
        """A plan for when ``d`` has one token more and ``p`` four more of its prompt."""
        scheduled = {"d": 1, "p": 4, "w": 9}
        plan = IterationPlan(num_scheduled_tokens=scheduled, start=["w"], admit=["d", "w"])
        plan = replace(plan, **changes)
        batch = [Scheduled(self["d"], 1), Scheduled(self["p"], 4)]
        return PlanAhead.of(plan, project(self.view(), batch, 1.0))

    def land(self) -> None:
        self.run("d", 1, 8)
        self.run("p", 4)


def test_the_projection_is_what_comes_of_it_and_changes_nothing() -> None:
    bench = Bench()
    before = [(s.seq_id, list(s.token_ids), s.num_computed_tokens) for s in bench.running]
    batch = [Scheduled(bench["d"], 1), Scheduled(bench["p"], 8)]
    projected = project(bench.view(), batch, 1.0)
    assert [
        (s.seq_id, s.num_tokens, s.num_computed_tokens, s.is_decoding) for s in projected.running
    ] == [("d", 7, 6, True), ("p", 13, 12, True)]
    assert projected.waiting == bench.waiting
    assert [projected.speculation.limit(s) for s in projected.running] == [4, 4]
    assert before == [(s.seq_id, s.token_ids, s.num_computed_tokens) for s in bench.running]


def test_whoever_reaches_its_last_token_is_projected_to_be_gone() -> None:
    bench = Bench()
    bench["d"].token_ids += range(6)
    bench["d"].num_computed_tokens += 6
    projected = project(bench.view(), [Scheduled(bench["d"], 1)], 1.0)
    assert [s.seq_id for s in projected.running] == ["p"]


def test_the_projected_progress_counts_the_token_to_come() -> None:
    targets = SLO(ttft=1.0, tpot=0.1).resolve(0.0, 0.0)
    request = Request(
        request_id="r",
        prompt_token_ids=(5, 6),
        params=SamplingParams(max_tokens=8),
        seed=0,
        arrival_s=10.0,
        slo=SLO(ttft=1.0, tpot=0.1),
        targets=targets,
    )
    seq = Sequence(request)
    first = seq.ahead(2, 10.5)
    assert first.progress.next_deadline_s == pytest.approx(10.6)
    seq.token_ids.append(7)
    seq.num_computed_tokens = 2
    seq.progress.add_token(10.4)
    second = seq.ahead(1, 10.45)
    assert second.progress.next_deadline_s == pytest.approx(10.6)
    assert second.progress.worst_token_lateness_s == pytest.approx(-0.05)
    assert seq.progress.next_deadline_s == pytest.approx(10.5)
    assert seq.progress.worst_token_lateness_s is None


def test_a_plan_holds_where_all_came_as_projected() -> None:
    bench = Bench()
    ahead = bench.ahead()
    bench.land()
    assert confirm(ahead, bench.view(), 1.0) is ahead.plan


@pytest.mark.parametrize("name", ["d", "p", "w"])
def test_whoever_ended_is_taken_out_of_every_part(name: str) -> None:
    bench = Bench()
    plan = bench.ahead().plan
    ahead = bench.ahead(
        num_scheduled_tokens={**plan.num_scheduled_tokens, "d": 3}, speculation={"d": 2}
    )
    bench.land()
    bench.end(name)
    found = confirm(ahead, bench.view(), 1.0)
    everywhere = [*found.num_scheduled_tokens, *found.speculation, *found.start, *found.admit]
    assert name not in everywhere
    assert len(found.num_scheduled_tokens) == 2
    assert ahead.plan.num_scheduled_tokens == {"d": 3, "p": 4, "w": 9}


Change = Callable[[Bench], None]


def arrive(bench: Bench) -> None:
    bench.waiting.append(bench.make("x", 3))


def stall_prefill(bench: Bench) -> None:
    bench["p"].num_computed_tokens -= 1


def stall_decode(bench: Bench) -> None:
    bench["d"].num_computed_tokens -= 1


def fill_pool(bench: Bench) -> None:
    other = bench.make("o", 1)
    bench.pool.grow(other, 4 * bench.pool.num_free_blocks)


def cache_prefix(bench: Bench) -> None:
    twin = bench.make("w", 9)
    bench.pool.grow(twin, 9)
    twin.num_computed_tokens = 9
    bench.pool.commit(twin)


@pytest.mark.parametrize(
    "change",
    [arrive, stall_prefill, stall_decode, fill_pool, cache_prefix],
    ids=lambda change: change.__name__,
)
def test_a_plan_does_not_hold_where_something_else_came(change: Change) -> None:
    bench = Bench()
    ahead = bench.ahead()
    bench.land()
    change(bench)
    assert confirm(ahead, bench.view(), 1.0) is None


def test_a_plan_for_nobody_who_is_left_does_not_hold() -> None:
    bench = Bench()
    ahead = bench.ahead(num_scheduled_tokens={"d": 1}, start=[], admit=[])
    bench.land()
    bench.end("d")
    assert confirm(ahead, bench.view(), 1.0) is None


@pytest.mark.parametrize(
    "changes",
    [{"relegate": ["d"]}, {"reject": {"w": Refusal("compute", 1.0)}}, {"start_by_s": 0.9}],
    ids=str,
)
def test_nobody_is_given_up_by_a_guess_and_no_deadline_missed(changes: dict[str, Any]) -> None:
    bench = Bench()
    ahead = bench.ahead(**changes)
    bench.land()
    assert confirm(ahead, bench.view(), 1.0) is None


def test_nobody_is_preempted_by_a_guess() -> None:
    # Blocks of sequences that end by their length count as taken when the plan is made.
    bench = Bench()
    ahead = bench.ahead(num_scheduled_tokens={"d": 1, "w": 9}, preempt=["p"])
    bench.land()
    assert confirm(ahead, bench.view(), 1.0) is None


@pytest.mark.parametrize(
    ("limit", "num_output", "left"), [(4, 2, 3), (1, 2, 1), (0, 2, 0), (4, 6, 1), (4, 7, 0)]
)
def test_no_more_is_drafted_than_can_be_now(limit: int, num_output: int, left: int) -> None:
    bench = Bench()
    ahead = bench.ahead(
        num_scheduled_tokens={"d": 4, "p": 4}, start=[], admit=[], speculation={"d": 3}
    )
    bench.run("p", 4)
    bench.run("d", num_output - 1, *range(num_output - 1))
    bench.proposer.most = limit
    found = confirm(ahead, bench.view(), 1.0)
    assert found.num_scheduled_tokens == {"d": 1 + left, "p": 4}
    assert found.speculation == ({"d": left} if left else {})


def test_a_draft_model_catches_up_with_no_more_than_it_lacks() -> None:
    bench = Bench()
    ahead = bench.ahead(catch_up={"d": 3})
    bench.land()
    assert confirm(ahead, bench.view(), 1.0).catch_up == {"d": 3}
    bench.proposer.most = 2
    assert confirm(ahead, bench.view(), 1.0).catch_up == {"d": 2}
    bench.proposer.most = 0
    assert confirm(ahead, bench.view(), 1.0).catch_up == {}
