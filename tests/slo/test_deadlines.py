"""Deadlines of whole answers: how they are asked for, judged and reported."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minserve.errors import InvalidSLOError
from minserve.slo.attainment import Outcome, judge, report, worst_report
from minserve.slo.objectives import SLO, StageTarget, Targets, preset_classes
from minserve.slo.slo_fields import parse_slo

TICK = 2.0**-10  # seconds; sums of whole ticks are exact

ticks = st.integers(1, 40)


@settings(max_examples=300, derandomize=True)
@given(
    finish=ticks, ttft=st.none() | ticks, tpot=st.none() | st.integers(1, 8),
    gaps=st.lists(st.integers(0, 8), max_size=8), arrival=st.integers(0, 9),
)  # fmt: skip
def test_all_objectives_together_are_judged_one_by_one(
    finish: int, ttft: int | None, tpot: int | None, gaps: list[int], arrival: int
) -> None:
    times = [arrival + sum(gaps[: i + 1]) for i in range(len(gaps))]
    kept = judge(
        Targets(
            math.inf if ttft is None else ttft * TICK,
            (StageTarget(math.inf if tpot is None else tpot * TICK),),
            finish * TICK,
        ),
        arrival * TICK,
        [one * TICK for one in times],
    )
    ttft_met = bool(times) and (ttft is None or times[0] - arrival <= ttft)
    tpot_met = tpot is None or all(t - times[0] <= i * tpot for i, t in enumerate(times))
    finish_met = bool(times) and times[-1] - arrival <= finish
    assert kept.attained == (ttft_met and tpot_met and finish_met)
    told = report("x", kept, admitted=True)
    expected = (
        Outcome.ATTAINED if kept.attained
        else Outcome.LATE_TTFT if not ttft_met
        else Outcome.LATE_TPOT if not tpot_met
        else Outcome.LATE_FINISH
    )  # fmt: skip
    assert told.outcome is expected
    assert told.finish_s == ((times[-1] - arrival) * TICK if times else None)
    # Broken from the moment on at which no further token could be in time.
    for now in range(times[-1] if times else arrival, arrival + 120):
        again = judge(kept.targets, arrival * TICK, [t * TICK for t in times] + [now * TICK])
        assert kept.is_broken(now * TICK) == (not again.attained)


def test_a_promise_is_broken_by_its_deadline_alone() -> None:
    kept = judge(Targets(finish_s=2.0), 10.0, [10.5, 11.0])
    assert (kept.finish_by_s, kept.attained, kept.next_deadline_s) == (12.0, True, math.inf)
    assert not kept.is_broken(12.0)
    assert kept.is_broken(12.001)
    later = kept.with_token(12.5)
    assert (later.late_finish, later.attained, later.attained_mean) == (True, False, False)
    assert (kept.late_finish, later.is_broken(0.0)) == (False, True)


def test_the_last_of_all_outputs_counts() -> None:
    early, late = (
        report("x", judge(Targets(0.6, finish_s=2.0), 0.0, times), admitted=True)
        for times in ([0.7, 0.8], [0.5, 1.9])
    )
    told = worst_report([early, late])
    assert (told.outcome, told.finish_s) == (Outcome.LATE_TTFT, 1.9)
    assert replace(told, finish_s=early.finish_s) == early


def parse(fields: dict[str, Any], base: SLO | None = None) -> SLO:
    return parse_slo(fields, where="slo", classes=preset_classes(), thinking_marker=None, base=base)


def test_fields_refine_a_deadline_like_the_other_objectives() -> None:
    assert parse({"finish_ms": 4000}) == SLO(finish=4.0)
    assert parse({"finish_ms": 800, "ttft_ms": 800}) == SLO(finish=0.8, ttft=0.8)
    assert parse({"class": "batch"}).name == "batch"
    assert parse({"class": "batch", "finish_ms": 5000}) == SLO(finish=5.0)
    assert parse({"class": "batch", "tpot_ms": 50}) == SLO(finish=60.0, tpot=0.05)


@pytest.mark.parametrize(
    "value", [0, -1, -0.0, math.nan, math.inf, True, "4", [], {}, 10**400, 1e300, 5e-324]
)
def test_a_wrong_deadline_is_named(value: Any) -> None:
    with pytest.raises(InvalidSLOError, match="milliseconds") as caught:
        parse({"finish_ms": value})
    assert caught.value.param == "slo.finish_ms"


def test_an_end_before_the_beginning_is_a_contradiction() -> None:
    for fields, param in (
        ({"finish_ms": 999, "ttft_ms": 1000}, "slo.finish_ms"),
        ({"class": "batch", "ttft_ms": 60_001}, "slo.ttft_ms"),
    ):
        with pytest.raises(InvalidSLOError, match="contradicts") as caught:
            parse(fields)
        assert caught.value.param == param
    with pytest.raises(InvalidSLOError, match="before"):
        SLO(ttft=2.0, finish=1.0)
    for wrong in (0.0, -1.0, math.nan, True, "1", 1e7):
        with pytest.raises(InvalidSLOError):
            SLO(finish=wrong)  # type: ignore[arg-type]
