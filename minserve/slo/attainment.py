"""Attainment: how an output stands against its promise, and whether the promise was kept.

This is the only definition: the engine, the planner, the metrics, the load client and the
simulator all use it. Times are float seconds on one monotonic clock; no function reads a clock.

*Deadline form* (`Progress.attained`): the first token comes within the TTFT, and token j of
every stage no later than that stage's first token + j x TPOT. *Mean form*
(`Progress.attained_mean`): the TTFT and the mean TPOT of every stage. In both forms the last token
comes by the finish deadline, if there is one. An output ends with its last token.

An output attains its SLO by itself; a request of several outputs attains it only if all of
them do (`worst_report`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum

from minserve.slo.objectives import StageTarget, Targets
from minserve.slo.task_call import TaskReport
from minserve.slots import copy_slots

# Times are compared after sums of floats; rounding alone must not break a promise.
ROUNDING_S = 1e-9


class Outcome(Enum):
    """The outcome of a request with an SLO, for reports and metrics."""

    ATTAINED = "attained"
    LATE_TTFT = "late_ttft"
    LATE_TPOT = "late_tpot"
    LATE_FINISH = "late_finish"
    BEST_EFFORT = "best_effort"
    REJECTED = "rejected"
    FAILED = "failed"


@dataclass(slots=True)
class _StageTimes:
    """The times of a stage's first and newest token, and the number of tokens after the first."""

    first_s: float
    last_s: float
    num_gaps: int = 0


class Progress:
    """Compares one output with its targets, token by token.

    Attributes:
        arrival_s: time at which the request arrived.
        stage: index of the stage that the next token belongs to.
        first_token_s: time of the first token; ``None`` before it came.
        last_token_s: time of the newest token; ``None`` before there is one.
        finish_by_s: the time by which the last token must come; inf if that is not promised.
        worst_token_lateness_s: largest lateness in seconds of the tokens after a stage's first;
            negative while every token was early, ``None`` before there is one.
        next_deadline_s: the time at which the next token is due by TTFT and TPOT; inf if neither is
            promised. The first token of a later stage has no deadline in the SLO. For planning
            it is due one token's time after the newest token, so that the output does not
            stall. When it is due for the sake of ``finish_by_s`` depends on how many tokens are
            still to come, which the planner guesses (`minserve.planner.predict.pacing`).
        breaks_s: the time after which the SLO can no longer be attained, if no token comes until
            then; -inf where it is broken already.
    """

    __slots__ = (
        "_closed",
        "_times",
        "arrival_s",
        "breaks_s",
        "finish_by_s",
        "first_token_s",
        "last_token_s",
        "next_deadline_s",
        "stage",
        "targets",
        "worst_token_lateness_s",
    )

    def __init__(self, targets: Targets, arrival_s: float) -> None:
        self.targets = targets
        self.arrival_s = arrival_s
        self.stage = 0
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self.finish_by_s = arrival_s + targets.finish_s
        self.worst_token_lateness_s: float | None = None
        self._times: _StageTimes | None = None
        self._closed: list[tuple[int, _StageTimes]] = []
        self._look_ahead()

    def add_token(self, now: float) -> None:
        """Note that a token came. A stage that ends at a count ends here by itself."""
        if self.first_token_s is None:
            self.first_token_s = now
        self.last_token_s = now
        times, target = self._times, self.targets.stages[self.stage]
        if times is None:
            self._times = times = _StageTimes(now, now)
        else:
            times.num_gaps += 1
            times.last_s = now
            lateness = now - (times.first_s + times.num_gaps * target.tpot_s)
            if self.worst_token_lateness_s is None or lateness > self.worst_token_lateness_s:
                self.worst_token_lateness_s = lateness
        if target.tokens is not None and times.num_gaps + 1 >= target.tokens:
            self.end_stage()
        else:
            self._look_ahead()

    def with_token(self, now: float) -> Progress:
        """Return a copy to which one more token has come."""
        twin, times = copy_slots(self), self._times
        if times is not None:
            twin._times = copy_slots(times)
        twin._closed = self._closed.copy()
        twin.add_token(now)
        return twin

    def end_stage(self) -> None:
        """End the current stage, whose marker has come; does nothing in the last stage."""
        if self.stage < len(self.targets.stages) - 1:
            if self._times is not None:
                self._closed.append((self.stage, self._times))
            self.stage += 1
            self._times = None
        self._look_ahead()

    def _look_ahead(self) -> None:
        """Work out when the next token is due, and until when the SLO can be attained.

        Both are asked for each sequence in each iteration, and change with its tokens alone.
        """
        worst, first, times = self.worst_token_lateness_s, self.first_token_s, self._times
        finish, newest = self.finish_by_s, self.last_token_s
        if first is None or newest is None:
            self.next_deadline_s = self.arrival_s + self.targets.ttft_s
            self.breaks_s = min(self.next_deadline_s, finish) + ROUNDING_S
            return
        if times is not None:
            tpot_s = self.targets.stages[self.stage].tpot_s
            due = self.next_deadline_s = times.first_s + (times.num_gaps + 1) * tpot_s
            self.breaks_s = (due if due < finish else finish) + ROUNDING_S
        else:
            # The first token of a later stage is never late.
            closed = self._closed
            self.next_deadline_s = closed[-1][1].last_s + self.tpot_s if closed else math.inf
            self.breaks_s = finish + ROUNDING_S
        late = newest > finish + ROUNDING_S or (worst is not None and worst > ROUNDING_S)
        if late or self.late_ttft:
            self.breaks_s = -math.inf

    @property
    def due_s(self) -> float:
        """The time by which the next token must come, whatever comes behind it; inf for none."""
        return min(self.next_deadline_s, self.finish_by_s)

    @property
    def marker(self) -> str | None:
        """The text that ends the current stage; ``None`` if no text ends it."""
        return self.targets.stages[self.stage].until

    @property
    def tpot_s(self) -> float:
        """Pace of the current stage in seconds per token; inf if none is promised."""
        return self.targets.stages[self.stage].tpot_s

    @property
    def stages_left(self) -> tuple[StageTarget, ...]:
        """The current stage and those after it."""
        return self.targets.stages[self.stage :]

    @property
    def stage_tokens_left(self) -> int | None:
        """Tokens until the current stage ends at its count; ``None`` if it has no count."""
        count = self.targets.stages[self.stage].tokens
        if count is None:
            return None
        return count - (0 if self._times is None else self._times.num_gaps + 1)

    @property
    def late_ttft(self) -> bool:
        """True if the first token came too late."""
        if self.first_token_s is None:
            return False
        return self.first_token_s - self.arrival_s > self.targets.ttft_s + ROUNDING_S

    @property
    def late_tpot(self) -> bool:
        """True if a token of any stage came too late."""
        worst = self.worst_token_lateness_s
        return worst is not None and worst > ROUNDING_S

    @property
    def late_finish(self) -> bool:
        """True if a token came after the finish deadline."""
        finish_s = self.finish_s
        return finish_s is not None and finish_s > self.targets.finish_s + ROUNDING_S

    def is_broken(self, now: float) -> bool:
        """Return True if the SLO can no longer be attained, whatever comes."""
        return now > self.breaks_s

    @property
    def attained(self) -> bool:
        """True if the tokens so far attain the SLO in the deadline form; final at the end."""
        if self.first_token_s is None or self.late_ttft:
            return False
        return not self.late_tpot and not self.late_finish

    @property
    def attained_mean(self) -> bool:
        """True if the tokens so far attain the SLO in the mean form; final at the end."""
        if self.first_token_s is None or self.late_ttft or self.late_finish:
            return False
        return all(
            times.last_s - times.first_s
            <= times.num_gaps * self.targets.stages[stage].tpot_s + ROUNDING_S
            for stage, times in self._all_stages()
            if times.num_gaps
        )

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def finish_s(self) -> float | None:
        """Seconds from arrival to the newest token; ``None`` before there is one."""
        return None if self.last_token_s is None else self.last_token_s - self.arrival_s

    @property
    def mean_tpot_s(self) -> float | None:
        """Mean seconds between tokens of the same stage, over all stages; ``None`` before two
        tokens.
        """
        gaps = sum(times.num_gaps for _, times in self._all_stages())
        span = sum(times.last_s - times.first_s for _, times in self._all_stages())
        return span / gaps if gaps else None

    def _all_stages(self) -> list[tuple[int, _StageTimes]]:
        current = [(self.stage, self._times)] if self._times is not None else []
        return self._closed + current


@dataclass(frozen=True, slots=True, kw_only=True)
class SLOReport:
    """The promise to a request and how it was kept; for ``n`` outputs, by the worst of them.

    Attributes:
        name: name of the class.
        admitted: False if the planner served it as best effort, or refused it.
        attained: it attained its SLO in the deadline form.
        attained_mean: it attained its SLO in the mean form.
        outcome: attained, or the cause of the miss.
        targets: what was promised, in seconds.
        ttft_s: seconds to the first token; ``None`` without a token.
        mean_tpot_s: mean seconds per token; ``None`` without a second token.
        worst_token_lateness_s: largest lateness in seconds of the tokens after a stage's first;
            negative if all were early, ``None`` if there was none or no pace was promised.
        finish_s: seconds to the last token of all outputs; ``None`` without a token.
        task: how its task stands; ``None`` without one.
    """

    name: str
    admitted: bool
    attained: bool
    attained_mean: bool
    outcome: Outcome
    targets: Targets
    ttft_s: float | None = None
    mean_tpot_s: float | None = None
    worst_token_lateness_s: float | None = None
    finish_s: float | None = None
    task: TaskReport | None = None


def report(name: str, progress: Progress, *, admitted: bool) -> SLOReport:
    """Judge a finished output by its deadlines alone, and return the report."""
    if progress.attained:
        outcome = Outcome.ATTAINED
    elif not admitted:
        outcome = Outcome.BEST_EFFORT
    elif progress.first_token_s is None or progress.late_ttft:
        outcome = Outcome.LATE_TTFT
    elif progress.late_tpot:
        outcome = Outcome.LATE_TPOT
    else:
        outcome = Outcome.LATE_FINISH
    worst = progress.worst_token_lateness_s
    return SLOReport(
        name=name,
        admitted=admitted,
        attained=progress.attained,
        attained_mean=progress.attained_mean,
        outcome=outcome,
        targets=progress.targets,
        ttft_s=progress.ttft_s,
        mean_tpot_s=progress.mean_tpot_s,
        worst_token_lateness_s=worst if worst is not None and math.isfinite(worst) else None,
        finish_s=progress.finish_s,
    )


def worst_report(reports: Iterable[SLOReport]) -> SLOReport:
    """Return the report of a request with several outputs: that of the worst output, but with the
    time of the last token of all.
    """
    reports = list(reports)

    def badness(one: SLOReport) -> tuple[bool, bool, float, float, float]:
        late, ttft = one.worst_token_lateness_s, one.ttft_s
        return (
            not one.attained,
            not one.attained_mean,
            # An output that never began is the worst case.
            math.inf if ttft is None else -math.inf if late is None else late,
            math.inf if ttft is None else ttft,
            one.finish_s or 0.0,
        )

    worst = max(reports, key=badness)
    ends = (one.finish_s for one in reports if one.finish_s is not None)
    last = max(ends, default=None)
    return worst if worst.finish_s == last else replace(worst, finish_s=last)


def judge(
    targets: Targets,
    arrival_s: float,
    token_times: Iterable[float],
    stage_ends: Iterable[int] = (),
) -> Progress:
    """Judge recorded timestamps, such as a client's, against targets.

    Args:
        token_times: time of each output token, in order.
        stage_ends: for each stage that ended at its marker, the number of tokens until then;
            stages that end at a count are not listed.

    Returns:
        the progress after the last token; read ``attained`` and ``attained_mean``.
    """
    progress, ends = Progress(targets, arrival_s), set(stage_ends)
    for number, now in enumerate(token_times, 1):
        progress.add_token(now)
        if number in ends:
            progress.end_stage()
    return progress
