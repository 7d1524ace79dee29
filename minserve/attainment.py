"""Attainment: how an output stands against its promise, and what was kept in the end.

The only definition, used by the engine, the planner, the metrics, the load client and the
simulator alike. Times are float seconds on one monotonic clock; nothing here reads a clock.

*Deadline form* (`Progress.attained`): the first token comes within the TTFT, and token j of
every stage no later than that stage's first token + j x TPOT. *Mean form*
(`Progress.attained_mean`): the TTFT and the mean TPOT of every stage.

An output attains its SLO by itself; a request of several outputs only if all of them do
(`worst_report`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from minserve.slo import Targets
from minserve.slots import copy_slots

# Times are compared after sums of floats; a promise is not broken by their rounding.
ROUNDING_S = 1e-9


class Outcome(Enum):
    """How a request with an SLO ended, for reports and metrics."""

    ATTAINED = "attained"
    LATE_TTFT = "late_ttft"
    LATE_TPOT = "late_tpot"
    BEST_EFFORT = "best_effort"
    REJECTED = "rejected"
    FAILED = "failed"


@dataclass(slots=True)
class _StageTimes:
    """When a stage's first and newest token came, and how many followed the first."""

    first_s: float
    last_s: float
    num_gaps: int = 0


class Progress:
    """How one output stands against its targets, token by token.

    Attributes:
        arrival_s: when the request arrived.
        stage: index of the stage that the next token belongs to.
        first_token_s: ``None`` before it came.
        worst_token_lateness_s: of all tokens after a stage's first, how late the latest
            one came; negative while every token was early, ``None`` before there is one.
    """

    __slots__ = (
        "_closed",
        "_times",
        "arrival_s",
        "first_token_s",
        "stage",
        "targets",
        "worst_token_lateness_s",
    )

    def __init__(self, targets: Targets, arrival_s: float) -> None:
        self.targets = targets
        self.arrival_s = arrival_s
        self.stage = 0
        self.first_token_s: float | None = None
        self.worst_token_lateness_s: float | None = None
        self._times: _StageTimes | None = None
        self._closed: list[tuple[int, _StageTimes]] = []

    def add_token(self, now: float) -> None:
        """A token came. A stage that ends at a count ends here by itself."""
        if self.first_token_s is None:
            self.first_token_s = now
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

    def with_token(self, now: float) -> Progress:
        """A copy to which one token more has come."""
        twin, times = copy_slots(self), self._times
        if times is not None:
            twin._times = copy_slots(times)
        twin._closed = self._closed.copy()
        twin.add_token(now)
        return twin

    def end_stage(self) -> None:
        """The marker of this stage has come; does nothing in the last stage."""
        if self.stage < len(self.targets.stages) - 1:
            if self._times is not None:
                self._closed.append((self.stage, self._times))
            self.stage += 1
            self._times = None

    @property
    def marker(self) -> str | None:
        """The text that ends the current stage, if one does."""
        return self.targets.stages[self.stage].until

    @property
    def tpot_s(self) -> float:
        """Pace of the current stage; inf where none is promised."""
        return self.targets.stages[self.stage].tpot_s

    @property
    def stage_tokens_left(self) -> int | None:
        """Tokens until the current stage ends at its count; ``None`` where nothing counts."""
        count = self.targets.stages[self.stage].tokens
        if count is None:
            return None
        return count - (0 if self._times is None else self._times.num_gaps + 1)

    @property
    def next_deadline_s(self) -> float:
        """When the next token is due; inf where nothing is promised.

        The first token of a later stage has no deadline of its own. For planning it is
        due one token's time after the newest token, so that the output does not stall.
        """
        if self.first_token_s is None:
            return self.arrival_s + self.targets.ttft_s
        times = self._times
        if times is None:
            return self._closed[-1][1].last_s + self.tpot_s if self._closed else math.inf
        return times.first_s + (times.num_gaps + 1) * self.targets.stages[self.stage].tpot_s

    @property
    def late_ttft(self) -> bool:
        """True once the first token came too late."""
        if self.first_token_s is None:
            return False
        return self.first_token_s - self.arrival_s > self.targets.ttft_s + ROUNDING_S

    @property
    def late_tpot(self) -> bool:
        """True once a token of any stage came too late."""
        worst = self.worst_token_lateness_s
        return worst is not None and worst > ROUNDING_S

    def is_broken(self, now: float) -> bool:
        """True where the SLO can no longer be attained, whatever comes."""
        # Asked of each sequence in each iteration, hence without the properties around it.
        worst, first = self.worst_token_lateness_s, self.first_token_s
        if worst is not None and worst > ROUNDING_S:
            return True
        if first is None:
            return now > self.arrival_s + self.targets.ttft_s + ROUNDING_S
        if first - self.arrival_s > self.targets.ttft_s + ROUNDING_S:
            return True
        times = self._times
        if times is None:
            return False  # the first token of a later stage is never late
        due = times.first_s + (times.num_gaps + 1) * self.targets.stages[self.stage].tpot_s
        return now > due + ROUNDING_S

    @property
    def attained(self) -> bool:
        """Deadline form, of the tokens so far: ask at the end."""
        return self.first_token_s is not None and not self.late_ttft and not self.late_tpot

    @property
    def attained_mean(self) -> bool:
        """Mean form, of the tokens so far: ask at the end."""
        if self.first_token_s is None or self.late_ttft:
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
    def mean_tpot_s(self) -> float | None:
        """Over all stages, the time between a stage's tokens per token; ``None`` before two."""
        gaps = sum(times.num_gaps for _, times in self._all_stages())
        span = sum(times.last_s - times.first_s for _, times in self._all_stages())
        return span / gaps if gaps else None

    def _all_stages(self) -> list[tuple[int, _StageTimes]]:
        current = [(self.stage, self._times)] if self._times is not None else []
        return self._closed + current


@dataclass(frozen=True, slots=True, kw_only=True)
class SLOReport:
    """What was promised and what was kept. Of ``n`` outputs, the worst.

    Attributes:
        name: the class.
        admitted: False where the planner served it as best effort, or refused it.
        attained: deadline form; ``attained_mean``: mean form.
        outcome: attained, or why not.
        targets: what was promised, in seconds.
        ttft_s, mean_tpot_s: ``None`` where there was no (second) token.
        worst_token_lateness_s: of the latest token after a stage's first; negative where
            all were early, ``None`` where there was none or no pace was promised.
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


def report(name: str, progress: Progress, *, admitted: bool) -> SLOReport:
    """Judge a finished output by the deadlines alone, whatever the planner called it."""
    if progress.attained:
        outcome = Outcome.ATTAINED
    elif not admitted:
        outcome = Outcome.BEST_EFFORT
    elif progress.late_tpot and not progress.late_ttft:
        outcome = Outcome.LATE_TPOT
    else:
        outcome = Outcome.LATE_TTFT
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
    )


def worst_report(reports: Iterable[SLOReport]) -> SLOReport:
    """The report of a request with several outputs: the one that fared worst."""

    def badness(one: SLOReport) -> tuple[bool, bool, float, float]:
        late, ttft = one.worst_token_lateness_s, one.ttft_s
        return (
            not one.attained,
            not one.attained_mean,
            # Nothing is worse than an output that never began.
            math.inf if ttft is None else -math.inf if late is None else late,
            math.inf if ttft is None else ttft,
        )

    return max(reports, key=badness)


def judge(
    targets: Targets,
    arrival_s: float,
    token_times: Iterable[float],
    stage_ends: Iterable[int] = (),
) -> Progress:
    """Attainment from recorded timestamps, such as a client's.

    Args:
        token_times: when each output token came, in order.
        stage_ends: numbers of tokens after which a stage ended at its marker; stages
            that end at a count need none.

    Returns:
        the progress after the last token; read ``attained`` and ``attained_mean``.
    """
    progress, ends = Progress(targets, arrival_s), set(stage_ends)
    for number, now in enumerate(token_times, 1):
        progress.add_token(now)
        if number in ends:
            progress.end_stage()
    return progress
