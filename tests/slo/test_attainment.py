"""When each token is due, and what counts as attained."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slo_targets import targets

from minserve.slo.attainment import Outcome, Progress, SLOReport, judge, report, worst_report
from minserve.slo.objectives import StageTarget, Targets

TICK = 2.0**-10  # seconds; sums of whole ticks are exact, so no test hangs on rounding


# --- attainment, by hand ---


def test_a_promise_is_kept_up_to_its_last_instant() -> None:
    kept = judge(targets(1.0, (0.5,)), 10.0, [11.0, 11.5, 12.0])
    assert kept.attained
    assert kept.attained_mean
    assert kept.ttft_s == 1.0
    assert kept.mean_tpot_s == 0.5
    assert kept.worst_token_lateness_s == 0.0
    assert not judge(targets(1.0, (0.5,)), 10.0, [11.0, 11.5, 12.001]).attained
    assert not judge(targets(1.0, (0.5,)), 10.0, [11.001, 11.5]).attained


def test_tokens_ahead_of_schedule_may_be_followed_by_a_long_gap() -> None:
    """Due at 1.5, 2.0, 2.5 and 3.0: three early tokens, then one just in time."""
    progress = judge(targets(1.0, (0.5,)), 0.0, [1.0, 1.1, 1.2, 1.3, 3.0])
    assert progress.attained
    assert progress.worst_token_lateness_s == 0.0


def test_one_late_token_breaks_the_deadline_form_and_not_the_mean_form() -> None:
    """The second token is due at 1.5 and comes at 2.0; the mean gap is still 0.5."""
    progress = judge(targets(1.0, (0.5,)), 0.0, [1.0, 2.0, 2.0])
    assert not progress.attained
    assert progress.attained_mean
    assert progress.worst_token_lateness_s == 0.5
    assert progress.mean_tpot_s == 0.5


def test_a_late_first_token_breaks_both_forms_whatever_follows() -> None:
    progress = judge(targets(1.0, (0.5,)), 0.0, [1.25, 1.25, 1.25])
    assert (progress.attained, progress.attained_mean) == (False, False)
    assert progress.late_ttft
    assert not progress.late_tpot


def test_an_output_without_a_token_attains_nothing() -> None:
    progress = judge(targets(1.0), 0.0, [])
    assert (progress.attained, progress.attained_mean) == (False, False)
    assert (progress.ttft_s, progress.mean_tpot_s, progress.worst_token_lateness_s) == (None,) * 3


def test_without_objectives_every_token_is_in_time() -> None:
    progress = judge(targets(), 0.0, [1e5, 1e6])
    assert progress.attained
    assert progress.attained_mean
    assert progress.next_deadline_s == math.inf
    assert not progress.is_broken(1e9)


def test_every_stage_is_counted_from_its_own_first_token() -> None:
    """Thinking at 0.5 ends with its third token; the answer at 1.0 begins when it likes."""
    goal = targets(1.0, (0.5, "</think>"), (1.0,))
    times = [1.0, 1.5, 2.0, 50.0, 51.0]
    progress = judge(goal, 0.0, times, stage_ends=[3])
    assert progress.attained
    assert progress.attained_mean
    assert progress.mean_tpot_s == pytest.approx((1.0 + 1.0) / 3)
    late_in_answer = judge(goal, 0.0, [*times, 52.5], stage_ends=[3])
    assert not late_in_answer.attained
    assert late_in_answer.worst_token_lateness_s == 0.5
    # The same tokens without the marker are all thinking.
    assert not judge(goal, 0.0, times).attained


def test_the_mean_form_does_not_let_one_stage_pay_for_another() -> None:
    goal = targets(1.0, (0.5, None, 2), (1.0,))
    progress = judge(goal, 0.0, [1.0, 1.75, 2.0, 2.0, 2.0])
    assert progress.mean_tpot_s == 0.25
    assert not progress.attained_mean


def test_a_stage_ends_at_its_count_by_itself() -> None:
    goal = targets(1.0, (0.5, None, 1), (0.5, None, 2), (1.0,))
    progress, seen = Progress(goal, 0.0), []
    for now in (1.0, 9.0, 9.5, 20.0, 21.0):
        progress.add_token(now)
        seen.append(progress.stage)
    assert seen == [1, 1, 2, 2, 2]
    assert progress.attained


def test_the_last_stage_has_no_end() -> None:
    progress = Progress(targets(1.0, (0.5,)), 0.0)
    progress.end_stage()
    progress.add_token(1.0)
    progress.end_stage()
    assert progress.stage == 0
    assert progress.next_deadline_s == 1.5


def test_deadlines_follow_the_stages() -> None:
    progress = Progress(targets(1.0, (0.5, "</think>"), (2.0,)), 10.0)
    assert progress.next_deadline_s == 11.0
    assert (progress.marker, progress.tpot_s) == ("</think>", 0.5)
    progress.add_token(10.25)
    assert progress.next_deadline_s == 10.75
    progress.add_token(10.3)
    assert progress.next_deadline_s == 11.25  # from the stage's first token, not the newest
    assert [stage.tpot_s for stage in progress.stages_left] == [0.5, 2.0]
    progress.end_stage()
    assert (progress.marker, progress.tpot_s) == (None, 2.0)
    assert [stage.tpot_s for stage in progress.stages_left] == [2.0]
    assert progress.next_deadline_s == 10.3 + 2.0  # so that the output does not stall
    progress.add_token(30.0)
    assert progress.next_deadline_s == 32.0


def test_a_stage_may_end_before_its_first_token() -> None:
    progress = Progress(targets(1.0, (0.5, "</think>"), (2.0,)), 0.0)
    progress.end_stage()
    assert progress.next_deadline_s == 1.0
    progress.add_token(1.0)
    assert progress.next_deadline_s == 3.0


def test_broken_means_that_nothing_can_mend_it() -> None:
    progress = Progress(targets(1.0, (0.5, "</think>"), (2.0,)), 0.0)
    assert not progress.is_broken(1.0)
    assert progress.is_broken(1.001)
    progress.add_token(1.0)
    assert not progress.is_broken(1.5)
    assert progress.is_broken(1.501)
    progress.add_token(1.5)
    progress.end_stage()
    assert not progress.is_broken(1e6)  # a later stage's first token is never late
    progress.add_token(10.0)
    assert progress.is_broken(12.1)
    progress.add_token(12.1)
    assert progress.is_broken(12.1)


# --- attainment, against the definition ---


@dataclass(frozen=True)
class Timeline:
    """Times in ticks; ``lengths`` of all stages but the last, ``by_count`` for each of them."""

    ttft: int | None
    paces: list[int | None]
    lengths: list[int]
    by_count: list[bool]
    arrival: int
    times: list[int]

    @property
    def parts(self) -> list[list[int]]:
        """The token times of each stage."""
        parts, rest = [], self.times
        for length in self.lengths:
            parts.append(rest[:length])
            rest = rest[length:]
        return [*parts, rest]

    @property
    def lateness(self) -> list[float]:
        """Of every token after its stage's first, where the stage has a pace."""
        return [
            (now - part[0]) - j * pace
            for part, pace in zip(self.parts, self.paces, strict=True)
            for j, now in enumerate(part)
            if j and pace is not None
        ]

    @property
    def ttft_met(self) -> bool:
        return bool(self.times) and (self.ttft is None or self.times[0] - self.arrival <= self.ttft)

    @property
    def mean_met(self) -> bool:
        return all(
            pace is None or len(part) < 2 or (part[-1] - part[0]) / (len(part) - 1) <= pace
            for part, pace in zip(self.parts, self.paces, strict=True)
        )

    @property
    def targets(self) -> Targets:
        ends = [
            (None, length) if counted else ("</think>", None)
            for length, counted in zip(self.lengths, self.by_count, strict=True)
        ]
        return Targets(
            math.inf if self.ttft is None else self.ttft * TICK,
            tuple(
                StageTarget(math.inf if pace is None else pace * TICK, *end)
                for pace, end in zip(self.paces, [*ends, (None, None)], strict=True)
            ),
        )

    @property
    def stage_ends(self) -> list[int]:
        """Numbers of tokens after which a marker came."""
        totals = [sum(self.lengths[: i + 1]) for i in range(len(self.lengths))]
        return [total for total, counted in zip(totals, self.by_count, strict=True) if not counted]


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    stages = draw(st.integers(1, 3))
    pace = st.none() | st.integers(1, 6)
    arrival = draw(st.integers(0, 1000))
    gaps = draw(st.lists(st.integers(0, 8), max_size=16))
    return Timeline(
        ttft=draw(st.none() | st.integers(1, 8)),
        paces=draw(st.lists(pace, min_size=stages, max_size=stages)),
        lengths=draw(st.lists(st.integers(1, 6), min_size=stages - 1, max_size=stages - 1)),
        by_count=draw(st.lists(st.booleans(), min_size=stages - 1, max_size=stages - 1)),
        arrival=arrival,
        times=[arrival + sum(gaps[: i + 1]) for i in range(len(gaps))],
    )


@settings(max_examples=200, derandomize=True)
@given(timelines())
def test_attainment_is_the_papers_definition(line: Timeline) -> None:
    progress = judge(
        line.targets, line.arrival * TICK, [t * TICK for t in line.times], line.stage_ends
    )
    in_time = all(late <= 0 for late in line.lateness)
    assert progress.attained == (line.ttft_met and in_time)
    assert progress.attained_mean == (line.ttft_met and line.mean_met)
    worst = progress.worst_token_lateness_s
    if line.lateness:
        assert worst == max(line.lateness) * TICK
    else:
        assert worst in (None, -math.inf)
    gaps = sum(max(len(part) - 1, 0) for part in line.parts)
    spans = sum(part[-1] - part[0] for part in line.parts if part)
    expected = pytest.approx(spans * TICK / gaps) if gaps else None
    assert progress.mean_tpot_s == expected
    final = report("x", progress, admitted=True)
    assert final.attained == (final.outcome is Outcome.ATTAINED)


@settings(max_examples=200, derandomize=True)
@given(timelines())
def test_deadlines_and_breaks_foretell_attainment(line: Timeline) -> None:
    """What is attained at the end is what was never broken when its tokens came."""
    progress, ends = Progress(line.targets, line.arrival * TICK), set(line.stage_ends)
    first_of_later = {sum(line.lengths[: i + 1]) + 1 for i in range(len(line.lengths))}
    broken = False
    for number, tick in enumerate(line.times, 1):
        now = tick * TICK
        late = number not in first_of_later and now > progress.next_deadline_s
        assert progress.is_broken(now) == (broken or late)
        broken |= late
        progress.add_token(now)
        if number in ends:
            progress.end_stage()
    assert progress.attained == (bool(line.times) and not broken)


# --- reports ---


def finished(*times: float, ttft: float = 1.0, tpot: float = 0.5) -> Progress:
    return judge(targets(ttft, (tpot,)), 0.0, times)


@pytest.mark.parametrize(
    ("times", "admitted", "outcome"),
    [
        ((1.0, 1.5), True, Outcome.ATTAINED),
        ((1.0, 1.5), False, Outcome.ATTAINED),
        ((2.0, 2.5), True, Outcome.LATE_TTFT),
        ((1.0, 2.0), True, Outcome.LATE_TPOT),
        ((2.0, 9.0), True, Outcome.LATE_TTFT),
        ((2.0, 2.5), False, Outcome.BEST_EFFORT),
        ((1.0, 2.0), False, Outcome.BEST_EFFORT),
        ((), True, Outcome.LATE_TTFT),
        ((), False, Outcome.BEST_EFFORT),
    ],
)
def test_an_outcome_says_what_went_wrong(
    times: tuple[float, ...], admitted: bool, outcome: Outcome
) -> None:
    told = report("coding", finished(*times), admitted=admitted)
    assert (told.name, told.admitted, told.outcome) == ("coding", admitted, outcome)
    assert told.attained == (outcome is Outcome.ATTAINED)


def test_a_report_holds_no_infinity_but_in_its_targets() -> None:
    told = report("x", judge(targets(1.0), 0.0, [1.0, 2.0]), admitted=True)
    assert (told.ttft_s, told.mean_tpot_s, told.worst_token_lateness_s) == (1.0, 1.0, None)


def test_the_worst_report_speaks_for_the_request() -> None:
    def of(*times: float) -> SLOReport:
        return report("x", finished(*times), admitted=True)

    early, just, late, later = of(0.5, 0.6), of(1.0, 1.5), of(1.0, 2.0), of(1.0, 3.0)
    never, slow_start, jerky = of(), of(2.0, 2.1), of(1.0, 2.0, 2.0)
    assert worst_report([early]) is early
    for better, worse in (
        (early, just),
        (just, late),
        (late, later),
        (just, slow_start),
        (jerky, slow_start),
        (of(0.5), of(1.0)),
        (later, never),
        (slow_start, never),
    ):
        # All but the time of the last token, which is that of all outputs together.
        ends = [one.finish_s for one in (better, worse) if one.finish_s is not None]
        expected = replace(worse, finish_s=max(ends))
        assert worst_report([better, worse]) == expected
        assert worst_report([worse, better]) == expected
