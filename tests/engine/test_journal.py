"""What a core's journal keeps, beside what really ran, and that it keeps only so much."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
from test_halves import Drafts, add, core_of

from minserve.activity import Activity, Cursor, Lane
from minserve.engine import journal as journals
from minserve.engine.core import EngineCore
from minserve.engine.journal import Journal
from minserve.planner.policies.sarathi import SarathiPlanner
from minserve.request import SequenceState
from minserve.slo.attainment import Outcome
from minserve.slo.objectives import SLO, Standing


def ticking_core(**more: Any) -> tuple[EngineCore, Journal]:
    """A core whose clock goes on by a millisecond each time that it is asked."""
    core, ticks = core_of(SarathiPlanner(), **more), count(1)
    core.clock = lambda: next(ticks) / 1e3
    return core, Journal.of(core)


class Viewer:
    """Somebody who looks now and then, and puts together what is told."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.cursor: Cursor | None = None
        self.iterations: list[Any] = []
        self.lanes: dict[str, Lane] = {}
        self.ends: dict[tuple[float, str], Any] = {}

    def look(self) -> Activity:
        seen = self.journal.since(self.cursor)
        self.cursor = Cursor(seen.source, seen.tick)
        self.iterations += seen.iterations
        for lane in seen.lanes:
            old = self.lanes[lane.seq_id].marks if lane.seq_id in self.lanes else ()
            marks = (*old[: lane.first_mark], *lane.marks)
            self.lanes[lane.seq_id] = replace(lane, first_mark=0, marks=marks)
        self.ends.update({one[:2]: one for one in seen.ends})
        return seen


@pytest.mark.parametrize("every", [1, 3, 100])
def test_what_is_told_in_parts_is_what_is_told_at_once(every: int) -> None:
    core, journal = ticking_core(proposer=Drafts(3))
    viewer = Viewer(journal)
    viewer.look()
    for number in range(6):
        add(core, str(number), prompt=9 + 7 * number, max_tokens=12)
    num_steps = 0
    while core.has_work:
        core.step()
        num_steps += 1
        if num_steps % every == 0:
            viewer.look()
    viewer.look()
    whole = journal.since(None)
    assert whole.is_whole
    assert viewer.iterations == list(whole.iterations)
    assert viewer.lanes == {lane.seq_id: lane for lane in whole.lanes}
    assert viewer.ends == {one[:2]: one for one in whole.ends}
    assert len(whole.iterations) == num_steps


@pytest.mark.parametrize("is_watched", [False, True])
def test_tokens_are_those_that_the_counts_have(is_watched: bool) -> None:
    core, journal = ticking_core(proposer=Drafts(3))
    if is_watched:
        journal.since(None)
    for number in range(5):
        for seq in add(core, str(number), prompt=20, max_tokens=10):
            seq.standing = (Standing.ADMITTED, Standing.BEST_EFFORT)[number % 2]
    while core.has_work:
        core.step()
    whole, stats = journal.since(None), core.stats
    tokens = zip(*[one.tokens for one in whole.iterations], strict=True)
    decode, draft, prefill, *late = map(sum, tokens)
    assert decode + late[0] == stats.decode_tokens.total
    assert draft + late[1] == stats.draft_tokens.total
    assert prefill + late[2] == stats.prefill_tokens.total
    assert min(decode, prefill, late[0], late[2]) > 0
    assert sum(one.seconds for one in whole.iterations) == pytest.approx(stats.iteration_s.total)
    for lane in whole.lanes:
        output = [mark for mark in lane.marks if not mark.is_prefill]
        assert (len(output) > 1) is is_watched
        assert sum(mark.num_tokens for mark in output) == lane.num_output_tokens == 10
        chunks = sum(mark.num_tokens for mark in lane.marks if mark.is_prefill)
        assert chunks + lane.num_cached_tokens == lane.num_prompt_tokens == 20
        assert lane.outcome is Outcome.ATTAINED
        # The pace is a second per token, and a thousandth of that has gone by.
        assert all(mark.slack_s is not None and mark.slack_s > 0 for mark in output)
    assert sum(one.num_attained for one in whole.ends) == len(whole.lanes) == 5


def test_a_late_token_is_told_by_how_much() -> None:
    core, _ = ticking_core()
    (seq,) = add(core, "1", max_tokens=3)
    now = 10.0
    core.clock = lambda: now
    journal = Journal.of(core)
    journal.since(None)
    core.step()
    now = 10.2
    core.step()
    now = 14.0
    core.step()
    (lane,) = journal.since(None).lanes
    due = [seq.request.arrival_s + 5.0, 11.0, 12.0]
    came = [10.0, 10.2, 14.0]
    slacks = [mark.slack_s for mark in lane.marks if not mark.is_prefill]
    assert slacks == pytest.approx([at - when for at, when in zip(due, came, strict=True)])


@pytest.mark.parametrize("is_watched", [False, True])
def test_a_token_behind_the_deadline_of_the_answer_is_late(is_watched: bool) -> None:
    core, _ = ticking_core()
    (seq,) = add(core, "1", max_tokens=3, slo=SLO(finish=5.0))
    now = seq.request.arrival_s
    core.clock = lambda: now
    journal = Journal.of(core)
    if is_watched:
        journal.since(None)
    due = seq.request.arrival_s + 5.0
    for slack in (3.0, 1.0, -2.0):
        now = due - slack
        core.step()
    (lane,) = journal.since(None).lanes
    slacks = [mark.slack_s for mark in lane.marks if not mark.is_prefill]
    assert slacks == pytest.approx([3.0, 1.0, -2.0] if is_watched else [-2.0])
    assert (lane.finish_due_s, lane.ttft_due_s) == (due, None)


def test_states_are_those_of_now() -> None:
    core, journal = ticking_core()
    for number in range(12):  # of which 8 may run
        add(core, str(number), prompt=2, max_tokens=30)
    for _ in range(3):
        core.step()
    seen = journal.since(None)
    assert sum(seen.running.values()) == len(core.running) == 8
    assert sum(seen.waiting.values()) == len(core.waiting) == 4
    states = [lane.state for lane in seen.lanes]
    assert states.count(SequenceState.RUNNING) == 8
    assert states.count(SequenceState.WAITING) == 4
    aborted, withdrawn = [seq.seq_id for seq in core.waiting[:2]]
    core.abort(aborted)
    core.withdraw(withdrawn)
    after = journal.since(Cursor(seen.source, seen.tick))
    told = {lane.seq_id: lane for lane in after.lanes}
    assert told[aborted].ended_s is not None
    assert withdrawn not in told


def test_preemptions_are_marked() -> None:
    core, journal = ticking_core()
    for number in range(8):
        add(core, str(number), prompt=14, max_tokens=60)  # 8 x 10 blocks; there are 40
    while core.has_work:
        core.step()
    lanes = journal.since(None).lanes
    assert core.planner.num_preemptions > 0
    assert any(lane.preempted_s for lane in lanes)
    assert all(lane.num_output_tokens == 60 for lane in lanes)


def test_it_keeps_only_so_much_however_long_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "NUM_LANES", 6)
    monkeypatch.setattr(journals, "NUM_ITERATIONS", 20)
    core, journal = ticking_core()
    for number in range(30):
        add(core, str(number), prompt=3, max_tokens=100 if number < 4 else 5)
        for _ in range(4):
            core.step()
        seen = journal.since(None)
        begun = [lane for lane in seen.lanes if lane.started_s is not None]
        assert len(begun) <= 6
        assert all(len(lane.marks) <= 97 for lane in begun)
    while core.has_work:
        core.step()
    whole = journal.since(None)
    assert len(whole.iterations) <= 20
    # The last to end are there.
    assert "29" in {lane.seq_id for lane in whole.lanes}


def test_where_nobody_looks_any_more_a_life_is_told_as_a_whole() -> None:
    core, _ = ticking_core()
    now = 0.0
    core.clock = lambda: now
    journal = Journal.of(core)
    journal.since(None)
    add(core, "1", max_tokens=40)
    for _ in range(20):
        now += 0.1
        core.step()
    assert len(journal.since(None).lanes[0].marks) > 10
    while core.has_work:
        now += 1.0
        core.step()
    (lane,) = journal.since(None).lanes
    assert [mark.num_tokens for mark in lane.marks] == [40]
    assert lane.marks[0][1:3] == (lane.first_token_s, lane.ended_s)


def test_outputs_that_have_ended_are_not_kept_alive() -> None:
    core, journal = ticking_core()
    (seq,) = add(core, "1", max_tokens=2)

    class Canary:
        pass

    canary = Canary()
    seq.block_hashes = [canary]  # type: ignore[list-item]  # whatever the sequence alone holds
    alive = weakref.ref(canary)
    while core.has_work:
        core.step()
    del canary, seq
    core.runner._batch = []  # type: ignore[attr-defined]  # the test's own device
    gc.collect()
    assert alive() is None
    assert [lane.seq_id for lane in journal.since(None).lanes] == ["1"]


def test_a_request_that_comes_again_has_a_new_lane() -> None:
    core, journal = ticking_core()
    add(core, "1", max_tokens=5)
    core.step()
    core.abort("1")
    add(core, "1", max_tokens=3)
    while core.has_work:
        core.step()
    (lane,) = journal.since(None).lanes
    assert lane.num_output_tokens == 3


def test_a_cursor_of_another_process_gets_all() -> None:
    core, journal = ticking_core()
    add(core, "1", max_tokens=2)
    while core.has_work:
        core.step()
    seen = journal.since(Cursor("another", 10**6))
    assert seen.is_whole
    assert len(seen.iterations) == 2
    assert not journal.since(Cursor(seen.source, seen.tick)).iterations
