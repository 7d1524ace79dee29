"""Who is promised nothing but may still be in time is served by deadline with what promises leave."""

from __future__ import annotations

from collections.abc import Set

import pytest
from loads import TIGHT, replay_of, request
from replay import Replay

from minserve.planner.admission.review import ReviewResult
from minserve.planner.plan import PlannerView
from minserve.planner.policies.dp import DpPlanner
from minserve.planner.predict.perf_model import PerfModel
from minserve.request import Sequence, SequenceState
from minserve.slo.objectives import SLO, Standing


class Refusing(DpPlanner):
    """Promises nothing to requests whose id begins with ``no``."""

    def review(
        self, view: PlannerView, now: float, model: PerfModel, broken: Set[str]
    ) -> ReviewResult:
        result = super().review(view, now, model, broken)
        for seq in (*view.waiting, *view.running):
            if seq.seq_id.startswith("no"):
                result.chosen.pop(seq.seq_id, None)
        return result


def refusing(**settings: int) -> Replay:
    replay = replay_of(**settings)
    replay.planner = Refusing(replay.planner.model)
    return replay


@pytest.mark.parametrize("num", [1, 3])
def test_on_an_idle_device_the_unpromised_are_in_time_too(num: int) -> None:
    load = [request(f"no{i}", 100, 20, 0.3 * i, TIGHT) for i in range(num)]
    refusing().run(load)
    assert not any(seq.standing is Standing.ADMITTED for seq in load)
    assert all(seq.progress.attained for seq in load)


def test_they_take_nothing_from_promises() -> None:
    """Prompts of the unpromised keep coming; what is promised is served as if they did not."""
    promised = [request(f"yes{i}", 80, 30, 0.4 * i, TIGHT) for i in range(6)]
    others = [request(f"no{i}", 200, 10, 0.15 * i, TIGHT) for i in range(20)]
    refusing().run([*promised, *others])
    assert all(seq.progress.attained for seq in promised)


def test_they_go_before_the_late_and_those_without_an_slo() -> None:
    replay = refusing(max_num_seqs=1)
    late = request("no late", 100, 5, -100.0, TIGHT)
    load = [request("none", 100, 5, 0.0, None), late, request("no in time", 100, 5, 0.1, TIGHT)]
    replay.now = 0.1
    replay.run(load)
    assert replay.finished[0].seq_id == "no in time"


def test_of_the_unpromised_the_earliest_deadline_goes_first() -> None:
    replay = refusing(max_num_seqs=1)
    deadlines = {"a": 9.0, "b": 5.0, "c": 7.0}
    replay.run(
        [request(f"no {k}", 50, 2, 0.0, SLO(ttft=t, tpot=1.0)) for k, t in deadlines.items()]
    )
    assert [seq.seq_id for seq in replay.finished] == ["no b", "no c", "no a"]


def test_who_cannot_be_in_time_any_more_does_not_hold_up_who_can() -> None:
    """The first is due sooner, but its prompt alone takes longer than it has."""
    replay = refusing(max_num_seqs=1)
    hopeless = request("no hope", 400, 2, 0.0, SLO(ttft=0.3, tpot=1.0))
    other = request("no hurry", 100, 2, 0.0, SLO(ttft=0.5, tpot=1.0))
    replay.run([hopeless, other])
    assert other.progress.attained
    assert replay.finished[0] is other


def test_they_start_only_in_blocks_that_promises_leave() -> None:
    """Promises held most of the pool lately: one may run all the same, not four."""
    replay = refusing(blocks=60)
    replay.run([request(f"yes{i}", 150, 60, 0.0, SLO(ttft=60.0, tpot=10.0)) for i in range(4)])
    slo = SLO(ttft=60.0, tpot=10.0)
    replay.waiting = [request(f"no{i}", 150, 60, replay.now, slo) for i in range(4)]
    replay.step()
    assert [seq.seq_id for seq in replay.running] == ["no0"]


def test_a_promise_takes_their_blocks_where_it_needs_them() -> None:
    replay = refusing(blocks=30)
    slo = SLO(ttft=100.0, tpot=10.0)
    other = request("no", 200, 190, 0.0, slo)
    replay.waiting = [other]
    replay.step()
    assert other.state is SequenceState.RUNNING
    promised = request("yes", 250, 60, replay.now, SLO(ttft=3.0, tpot=1.0))
    replay.run([promised])
    assert promised.progress.attained
    assert other.num_preemptions > 0
    assert other.state is SequenceState.FINISHED


def test_a_large_request_without_an_slo_is_not_starved_by_small_unpromised_ones() -> None:
    """The small ones would take every block that becomes free, if they might pass it by."""
    replay = refusing(blocks=100, max_num_seqs=64)
    small = [request(f"no{i}", 100, 40, 0.25 * i, SLO(ttft=600.0, tpot=1.0)) for i in range(120)]
    large = request("large", 900, 20, 3.0, None)
    replay.run([*small, large])
    after = [seq.request.arrival_s for seq in replay.finished[replay.finished.index(large) :]]
    assert max(after) > 20.0, "it ended while small ones were still to come"


def test_a_pace_that_no_device_keeps_outranks_nobody() -> None:
    replay = replay_of(max_num_seqs=1)
    impossible = request("impossible", 50, 5, 0.1, SLO(tpot=0.001))
    replay.waiting = [request("plain", 50, 5, 0.0, None), impossible]
    replay.now = 0.1
    replay.run([])
    assert [seq.seq_id for seq in replay.finished] == ["plain", "impossible"]


@pytest.mark.parametrize("value", [1.0, 1e6])
def test_a_dear_request_that_cannot_run_endangers_nobody(value: float) -> None:
    """All slots are taken, and its pace is impossible: no batch is longer for its sake."""
    replay = replay_of(max_num_seqs=9, sigma=0.2)
    replay.run([request("the scatter is learned", 20, 190, 0.0, None)])
    now, slo = replay.now, SLO(ttft=5.0, tpot=0.12)
    promised = [request(f"yes{i}", 20, 150, now, slo) for i in range(8)]
    spare = request("spare", 1500, 5, now, None)
    replay.waiting = [*promised, spare]
    while spare.state is SequenceState.WAITING:
        replay.step()
    dear = request("dear", 100, 5, replay.now, SLO(ttft=600.0, tpot=0.021, value=value))
    replay.run([dear])
    assert sum(seq.progress.attained for seq in promised) >= 7


def _prompt_batches(replay: Replay, seq: Sequence) -> list[int]:
    """Serve it alone; returns the lengths of the chunks that its prompt was cut into."""
    replay.waiting.append(seq)
    chunks = []
    while seq.num_output_tokens == 0:
        chunks.append(replay.step().total_tokens)
    while replay.waiting or replay.running:
        replay.step()
    return chunks


@pytest.mark.parametrize("slo", [None, SLO(ttft=30.0, tpot=1.0)], ids=["no slo", "much time"])
def test_a_lone_prompt_is_not_cut_for_nobody(slo: SLO | None) -> None:
    replay = replay_of(budget=512)
    assert _prompt_batches(replay, request("lone", 500, 2, 0.0, slo)) == [500]


def test_a_lone_prompt_is_cut_where_one_like_those_before_would_be_late() -> None:
    replay = replay_of(budget=512)
    for i in range(3):
        _prompt_batches(replay, request(f"short{i}", 20, 2, replay.now, SLO(ttft=0.4, tpot=1.0)))
    chunks = _prompt_batches(replay, request("lone", 500, 2, replay.now, None))
    assert len(chunks) > 2
    # 20 tokens take 61 ms of the 400 ms that they have: a batch may take the rest.
    longest = max(chunks) * 0.002 + 0.02
    assert longest < 0.4 - 0.06


def test_who_is_late_at_once_makes_nobody_cut_prompts() -> None:
    replay = replay_of(budget=512)
    _prompt_batches(replay, request("hopeless", 20, 2, 0.0, SLO(ttft=1e-6)))
    assert _prompt_batches(replay, request("lone", 500, 2, replay.now, None)) == [500]


def test_a_prompt_is_cut_while_somebody_waits_for_a_token() -> None:
    replay = replay_of(budget=512)
    decode = request("decode", 20, 60, 0.0, None)
    replay.waiting = [decode]
    while decode.num_output_tokens < 2:
        replay.step()
    prompt = request("prompt", 500, 2, replay.now, None)
    replay.waiting = [prompt]
    while prompt.num_output_tokens == 0:
        assert replay.step().predicted_s < 0.2
