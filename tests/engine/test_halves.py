"""The two halves of an iteration, and what the core tells of requests in between."""

from __future__ import annotations

import random
from collections.abc import Sequence as SequenceOf

import pytest

from minserve.engine.batch import RunResult, Scheduled
from minserve.engine.block_pool import BlockPool
from minserve.engine.core import EngineCore
from minserve.engine.speculation.proposal import Proposal, SampledToken, Verified
from minserve.engine.speculation.proposer import DraftRequest, Proposer
from minserve.outputs import OutputDelta
from minserve.planner.plan import IterationPlan, PlannerView
from minserve.planner.policies.base import Planner
from minserve.planner.policies.sarathi import SarathiPlanner
from minserve.request import FinishReason, Request, Sequence, SequenceState
from minserve.sampling_params import SamplingParams
from minserve.slo.objectives import SLO, Standing

WORD = 7


class Device:
    """Samples one word for each sequence, and accepts every other draft as a whole."""

    device = "a device of a test"
    is_lost = False

    def __init__(self) -> None:
        self.launched: list[list[str]] = []
        self._rng = random.Random(0)

    def launch(self, batch: SequenceOf[Scheduled]) -> Device:
        self.launched.append([item.seq.seq_id for item in batch])
        self._batch = list(batch)
        return self

    def results(self) -> dict[str, RunResult]:
        found = {}
        for item in self._batch:
            num = len(item.drafted) if self._rng.random() < 0.5 else 0
            words = (SampledToken(WORD, None),) * (num + 1)
            found[item.seq.seq_id] = RunResult(Verified(words, num) if item.samples else None)
        return found


class Drafts(Proposer):
    name = "drafts"

    def limit(self, seq: Sequence) -> int:
        return self.max_tokens

    def propose(self, wanted: SequenceOf[DraftRequest]) -> dict[str, Proposal]:
        return {
            one.seq.seq_id: Proposal((WORD,) * one.num_tokens) for one in wanted if one.num_tokens
        }


def core_of(planner: Planner, proposer: Proposer | None = None) -> EngineCore:
    return EngineCore(
        Device(),
        BlockPool(40, 8),
        planner,
        token_budget=16,
        max_num_seqs=8,
        max_model_len=200,
        clock=lambda: 0.0,
        proposer=proposer,
    )


EASY = SLO(ttft=5.0, tpot=1.0)


def add(
    core: EngineCore,
    name: str,
    *,
    prompt: int = 5,
    n: int = 1,
    max_tokens: int = 6,
    slo: SLO = EASY,
) -> list[Sequence]:
    request = Request(
        request_id=name,
        prompt_token_ids=(int(name) + 10,) * prompt,
        params=SamplingParams(n=n, max_tokens=max_tokens),
        seed=1,
        arrival_s=0.0,
        slo=slo,
        targets=slo.resolve(1.0, 1.0),
    )
    seqs = [Sequence(request, index) for index in range(n)]
    for seq in seqs:
        core.add(seq, None)
    return seqs


def tokens(deltas: list[OutputDelta]) -> dict[str, list[int]]:
    return {one.request_id: list(one.token_ids) for one in deltas}


@pytest.mark.parametrize("drafts", [0, 3])
def test_two_halves_are_a_step(drafts: int) -> None:
    def make() -> EngineCore:
        core = core_of(SarathiPlanner(), Drafts(drafts) if drafts else None)
        for name in range(5):
            add(core, str(name), prompt=5 + 9 * name, n=1 + name % 3, max_tokens=9)
        return core

    whole, halved = make(), make()
    while whole.has_work:
        told = whole.step()
        assert halved.begin() == bool(whole.runner.launched)
        assert halved.take_untold() == []
        assert halved.end() == told
        halved.check_integrity()
    assert not halved.has_work
    assert halved.runner.launched == whole.runner.launched
    assert halved.stats.speculation == whole.stats.speculation
    assert (whole.stats.speculation.num_accepted_tokens > 0) == (drafts > 0)


def test_nothing_is_appended_before_the_second_half() -> None:
    core = core_of(SarathiPlanner())
    (seq,) = add(core, "0")
    assert core.begin()
    assert seq.num_output_tokens == seq.num_computed_tokens == 0
    (late,) = add(core, "1")
    assert tokens(core.end()) == {"0": [WORD]}
    assert not late.has_begun
    assert core.begin()
    core.end()
    assert late.num_output_tokens == 1


def test_what_is_waiting_may_leave_while_a_batch_runs_and_what_runs_may_not() -> None:
    core = core_of(SarathiPlanner())
    add(core, "0")
    core.begin()
    add(core, "1")
    assert core.withdraw("1")
    assert not core.withdraw("0")
    with pytest.raises(AssertionError, match="has not ended"):
        core.begin()
    assert tokens(core.end()) == {"0": [WORD]}


@pytest.mark.parametrize("end", ["abort", "complete"])
def test_what_ends_while_its_batch_runs_keeps_its_blocks_until_that_is_over(end: str) -> None:
    core = core_of(SarathiPlanner())
    (gone,) = add(core, "0")
    (stays,) = add(core, "1", prompt=9)
    core.begin()
    (last,) = getattr(core, end)("0")
    assert last.finish_reason is (FinishReason.ABORT if end == "abort" else FinishReason.STOP)
    assert gone.state is SequenceState.FINISHED
    assert len(gone.block_table) == 1, "the device may still write there"
    assert core.pool.num_free_blocks == 40 - 3
    core.check_integrity()
    assert core.has_work
    assert tokens(core.end()) == {"1": [WORD]}
    assert not gone.block_table
    assert core.pool.num_free_blocks == 40 - 2
    assert stays.num_output_tokens == 1
    core.check_integrity()


def test_without_work_neither_half_does_anything() -> None:
    core = core_of(SarathiPlanner())
    assert not core.begin()
    assert core.end() == core.end() == []
    assert core.runner.launched == []


class Interrupting(Device):
    def results(self) -> dict[str, RunResult]:
        raise KeyboardInterrupt


def test_after_ctrl_c_in_a_step_requests_can_be_aborted() -> None:
    core = core_of(SarathiPlanner())
    add(core, "0")
    core.runner = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        core.step()
    assert len(core.abort("0")) == 1
    assert core.pool.num_free_blocks == 40


class DecliningPlanner(SarathiPlanner):
    """Promises nothing to anything that waits, and starts it all the same."""

    def _plan(self, view: PlannerView, now: float) -> IterationPlan:
        plan = super()._plan(view, now)
        waiting = [seq.seq_id for seq in view.waiting]
        plan.relegate, plan.declined = waiting[:1], waiting[1:]
        return plan


def test_a_request_that_is_promised_nothing_can_be_taken_before_it_starts() -> None:
    core = core_of(DecliningPlanner())
    seqs = [add(core, str(name), prompt=3)[0] for name in range(3)]
    offered: list[str] = []

    def takes(request_id: str) -> bool:
        offered.append(request_id)
        return request_id != "1"

    assert core.begin(takes)
    assert offered == ["0", "1", "2"], "what is given up, then what is declined"
    assert core.runner.launched == [["1"]]
    assert core.declined == ["1"]
    assert tokens(core.end()) == {"1": [WORD]}
    assert [seq.has_begun for seq in seqs] == [False, True, False]
    assert seqs[0].standing is Standing.BEST_EFFORT
    core.check_integrity()


class DecliningLatePlanner(SarathiPlanner):
    """Lets output 0 of a request run, and declines whatever waits for ever."""

    def _plan(self, view: PlannerView, now: float) -> IterationPlan:
        first = [seq for seq in (*view.running, *view.waiting) if seq.index == 0]
        plan = IterationPlan()
        if first:
            plan.num_scheduled_tokens = {first[0].seq_id: first[0].num_uncomputed_tokens}
            plan.start = [seq.seq_id for seq in first if seq in view.waiting]
        plan.declined = [seq.seq_id for seq in view.waiting if seq.index > 0]
        return plan


def test_a_request_whose_first_output_is_told_is_not_offered_elsewhere() -> None:
    core = core_of(DecliningLatePlanner())
    add(core, "0", n=2, max_tokens=2)
    told = [delta for _ in range(3) for delta in core.step()]
    assert [one.finish_reason for one in told] == [None, FinishReason.LENGTH]
    assert core.num_unfinished == 1
    assert core.declined == []
    assert not core.withdraw("0")


class CountingPlanner(SarathiPlanner):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def verified(self, seq: Sequence, num_drafted: int, num_accepted: int) -> None:
        self.seen.append((num_drafted, num_accepted))


def test_verifications_are_those_of_decodes() -> None:
    planner = CountingPlanner()
    core = core_of(planner, Drafts(2))
    add(core, "0", prompt=30, max_tokens=4)
    assert [len(core.step()) for _ in range(2)] == [0, 1]
    assert planner.seen == [], "the last chunk of a prompt verifies nothing"
    core.step()
    assert [num_drafted for num_drafted, _ in planner.seen] == [2]
