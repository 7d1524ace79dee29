"""Plans that contradict themselves or the state are told by whom they wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from minserve.engine.block_pool import BlockPool
from minserve.planner.plan import IterationPlan, PlannerView, Refusal
from minserve.planner.plan_check import faults_of
from minserve.request import Request, Sequence, SequenceState
from minserve.sampling_params import SamplingParams
from minserve.slo.objectives import SLO, Standing

NO = Refusal("compute", 1.0)


def sequences(name: str, n: int = 1) -> list[Sequence]:
    slo = SLO(ttft=9.0)
    request = Request(
        request_id=name,
        prompt_token_ids=tuple(range(9)),
        params=SamplingParams(n=n, max_tokens=8),
        seed=0,
        arrival_s=0.0,
        slo=slo,
        targets=slo.resolve(0.0, 0.0),
    )
    return [Sequence(request, index) for index in range(n)]


@pytest.fixture
def view() -> PlannerView:
    """``d`` decodes, ``p`` has computed 4 of 9 tokens, ``w`` and the two of ``m`` wait."""
    pool = BlockPool(40, 4)
    (decode,), (prefill,), (waiting,) = map(sequences, "dpw")
    for seq, computed, sampled in ((decode, 9, [7]), (prefill, 4, [])):
        pool.grow(seq, computed)
        seq.num_computed_tokens, seq.state = computed, SequenceState.RUNNING
        seq.token_ids += sampled
        seq.standing = Standing.ADMITTED
    return PlannerView(
        waiting=[waiting, *sequences("m", 2)],
        running=[decode, prefill],
        memory=pool,
        token_budget=64,
        max_num_seqs=8,
    )


GOOD = IterationPlan(
    num_scheduled_tokens={"d": 3, "p": 5, "w": 9},
    speculation={"d": 2},
    catch_up={"d": 4},
    start=["w"],
    admit=["w"],
    reject={"m/0": NO, "m/1": NO},
)


def with_tokens(**tokens: int) -> dict[str, int]:
    return {**GOOD.num_scheduled_tokens, **tokens}


def test_a_good_plan_has_no_faults(view: PlannerView) -> None:
    assert faults_of(GOOD, view) == {}
    assert faults_of(IterationPlan(), view) == {}
    tokens = {"d": 1, "m/0": 9}
    plan = IterationPlan(
        num_scheduled_tokens=tokens,
        start=["m/0"],
        preempt=["p"],
        admit=["m/0", "m/1"],
        relegate=["p"],
        declined=["w"],
    )
    assert faults_of(plan, view) == {}


@pytest.mark.parametrize(
    ("changes", "faulty"),
    [
        ({"num_scheduled_tokens": with_tokens(x=1)}, "x"),
        ({"admit": ["w", "x"]}, "x"),
        ({"declined": ["x"]}, "x"),
        ({"catch_up": {"x": 1}}, "x"),
        ({"reject": {**GOOD.reject, "x": NO}}, "x"),
        ({"num_scheduled_tokens": with_tokens(d=0)}, "d"),
        ({"num_scheduled_tokens": with_tokens(d=4)}, "d"),
        ({"num_scheduled_tokens": with_tokens(d=2)}, "d"),
        ({"num_scheduled_tokens": with_tokens(p=6)}, "p"),
        ({"num_scheduled_tokens": with_tokens(p=-1)}, "p"),
        ({"num_scheduled_tokens": with_tokens(w=10)}, "w"),
        ({"speculation": {"p": 2}}, "p"),
        ({"speculation": {"d": 2, "p": 1}}, "p"),
        ({"catch_up": {"d": 0}}, "d"),
        ({"catch_up": {"w": 1}}, "w"),
        ({"start": []}, "w"),
        ({"start": ["w", "w"]}, "w"),
        ({"start": ["w", "p"]}, "p"),
        ({"preempt": ["w"]}, "w"),
        ({"preempt": ["p"]}, "p"),
        ({"relegate": ["w"]}, "w"),
        ({"num_scheduled_tokens": {"d": 3, "p": 5}}, "w"),
        ({"reject": {"d": NO}}, "d"),
        ({"reject": {"w": NO}}, "w"),
    ],
    ids=str,
)
def test_a_fault_is_told_of_the_sequence_that_it_is_about(
    view: PlannerView, changes: dict, faulty: str
) -> None:
    found = faults_of(replace(GOOD, **changes), view)
    assert faulty in found
    rest = {"d"} if faulty == "p" and "speculation" in changes else set()
    assert found.keys() - rest == {faulty}


def test_siblings_are_refused_promised_and_given_up_together(view: PlannerView) -> None:
    half = IterationPlan(
        num_scheduled_tokens={"m/0": 9}, start=["m/0"], admit=["m/0"], reject={"m/1": NO}
    )
    assert faults_of(half, view).keys() == {"m/0", "m/1"}
    assert faults_of(IterationPlan(admit=["m/0"]), view).keys() == {"m/1"}
    assert faults_of(IterationPlan(relegate=["m/1"]), view).keys() == {"m/0"}
    for seq in view.waiting[1:]:
        seq.standing = Standing.BEST_EFFORT
    assert faults_of(IterationPlan(relegate=["m/1"]), view) == {}


def test_a_plan_without_some_sequences_keeps_the_rest(view: PlannerView) -> None:
    rest = GOOD.only({"d", "m/0", "m/1"})
    assert rest.num_scheduled_tokens == {"d": 3}
    assert (rest.start, rest.admit, rest.reject) == ([], [], GOOD.reject)
    assert faults_of(rest, view) == {}
    assert GOOD.only({"d", "p", "w", "m/0", "m/1"}) == GOOD
