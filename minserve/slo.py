"""Service level objectives: what is promised, when each token is due, what was kept.

The only definition of attainment, used by the engine, the planner, the metrics, the load
client and the simulator alike. Times are float seconds on one monotonic clock; nothing
here reads a clock.

A request's output is one or more decode stages (thinking, then the answer)::

    arrival ──TTFT──► first token ──TPOT──► ... ──marker or count──► first token ──TPOT──► ... end
                      └──────── stage 1 ────────────────────────┘    └────── stage 2 ─────────────┘

*Deadline form* (`Progress.attained`): the first token comes within the TTFT, and token j of
every stage no later than that stage's first token + j x TPOT. *Mean form*
(`Progress.attained_mean`): the TTFT and the mean TPOT of every stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from types import MappingProxyType

from minserve.errors import InvalidSLOError

MAX_SECONDS = 1e6
MAX_SLOWDOWN = 1e6
# The name of SLOs that are no class's.
CUSTOM = "custom"
# Times are compared after sums of floats; a promise is not broken by their rounding.
ROUNDING_S = 1e-9


class OnUnattainable(Enum):
    """What becomes of a request whose SLO cannot be met."""

    BEST_EFFORT = "best_effort"
    REJECT = "reject"


class Standing(Enum):
    """What the planner has promised a sequence.

    ::

        PENDING ──► ADMITTED ──relegate──► BEST_EFFORT ──promote──► ADMITTED
           └──────────relegate──────────────────▲
    """

    PENDING = "pending"
    ADMITTED = "admitted"
    BEST_EFFORT = "best_effort"


class Outcome(Enum):
    """How a request with an SLO ended, for reports and metrics."""

    ATTAINED = "attained"
    LATE_TTFT = "late_ttft"
    LATE_TPOT = "late_tpot"
    BEST_EFFORT = "best_effort"
    REJECTED = "rejected"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeStage:
    """One part of an output with its own pace.

    Attributes:
        tpot: seconds per output token; or
        tpot_slowdown: the same as a multiple of the zero-load time per token.
        until: the stage ends with this text, such as ``</think>``; or
        tokens: it ends after this many tokens. The last stage has neither.

    Raises:
        InvalidSLOError: for a value outside its range.
    """

    tpot: float | None = None
    tpot_slowdown: float | None = None
    until: str | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        _check_seconds("tpot", self.tpot)
        _check_slowdown("tpot_slowdown", self.tpot_slowdown)
        _check_either("tpot", self.tpot, "tpot_slowdown", self.tpot_slowdown)
        if self.until is not None and (not isinstance(self.until, str) or not self.until):
            raise InvalidSLOError("until must be a text that is not empty", "until")
        _check_count("tokens", self.tokens)
        _check_either("until", self.until, "tokens", self.tokens)

    @property
    def has_end(self) -> bool:
        return self.until is not None or self.tokens is not None

    @property
    def has_pace(self) -> bool:
        return self.tpot is not None or self.tpot_slowdown is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class SLO:
    """What a request asks for. Absent objectives promise nothing.

    Attributes:
        ttft: seconds from arrival to the first token; or
        ttft_slowdown: the same as a multiple of the prompt's zero-load prefill time.
        tpot: seconds per output token; or
        tpot_slowdown: the same as a multiple of the zero-load time per token; or
        stages: several stages instead, each with its own pace and, but for the last, an end.
        expected_output_tokens: the client's own guess, for planning only.
        on_unattainable: serve late, or refuse at once.
        value: weight in the planner's choice among requests that do not all fit.
        name: of the class, for reports.

    Raises:
        InvalidSLOError: for values outside their range or that contradict each other.
    """

    ttft: float | None = None
    ttft_slowdown: float | None = None
    tpot: float | None = None
    tpot_slowdown: float | None = None
    stages: tuple[DecodeStage, ...] = ()
    expected_output_tokens: int | None = None
    on_unattainable: OnUnattainable = OnUnattainable.BEST_EFFORT
    value: float = 1.0
    name: str = CUSTOM

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        try:
            how = OnUnattainable(self.on_unattainable)
        except ValueError:
            choices = ", ".join(f"{one.value!r}" for one in OnUnattainable)
            raise InvalidSLOError(
                f"on_unattainable must be one of {choices}", "on_unattainable"
            ) from None
        object.__setattr__(self, "on_unattainable", how)
        _check_seconds("ttft", self.ttft)
        _check_slowdown("ttft_slowdown", self.ttft_slowdown)
        _check_either("ttft", self.ttft, "ttft_slowdown", self.ttft_slowdown)
        _check_seconds("tpot", self.tpot)
        _check_slowdown("tpot_slowdown", self.tpot_slowdown)
        _check_either("tpot", self.tpot, "tpot_slowdown", self.tpot_slowdown)
        _check_count("expected_output_tokens", self.expected_output_tokens)
        if not 0 < _number("value", self.value) <= MAX_SLOWDOWN:
            raise InvalidSLOError(
                f"value must be above 0 and at most {MAX_SLOWDOWN:g}, not {self.value}", "value"
            )
        self._check_stages()

    def _check_stages(self) -> None:
        if self.stages and (self.tpot is not None or self.tpot_slowdown is not None):
            raise InvalidSLOError("give tpot or stages, not both", "stages")
        for i, stage in enumerate(self.stages):
            last = i == len(self.stages) - 1
            if not last and not stage.has_end:
                raise InvalidSLOError(
                    f"stages[{i}] has no end: give it a marker (until) or a count (tokens)",
                    "stages",
                )
            if last and stage.has_end:
                raise InvalidSLOError(
                    "the last stage ends with the request: give it neither until nor tokens",
                    "stages",
                )
        if not self.promises_anything:
            raise InvalidSLOError(
                "an SLO needs an objective: ttft, ttft_slowdown, tpot, tpot_slowdown or stages"
            )

    @property
    def decode_stages(self) -> tuple[DecodeStage, ...]:
        """``stages``, or the single one that ``tpot`` or ``tpot_slowdown`` stands for."""
        return self.stages or (DecodeStage(tpot=self.tpot, tpot_slowdown=self.tpot_slowdown),)

    @property
    def promises_anything(self) -> bool:
        prompt = self.ttft is not None or self.ttft_slowdown is not None
        return prompt or any(stage.has_pace for stage in self.decode_stages)

    @property
    def refuses_delay(self) -> bool:
        """True where the request would rather be refused than be late."""
        return self.on_unattainable is OnUnattainable.REJECT

    @property
    def needs_profile(self) -> bool:
        """True where an objective is a multiple of this device's own speed."""
        return self.ttft_slowdown is not None or any(
            stage.tpot_slowdown is not None for stage in self.decode_stages
        )

    def named(self, name: str) -> SLO:
        """The same objectives under another name."""
        return replace(self, name=name)

    def resolve(self, zero_load_ttft_s: float, zero_load_tpot_s: float) -> Targets:
        """The objectives in seconds, for one request on one device.

        Args:
            zero_load_ttft_s: prefill time of the whole prompt on the idle device.
            zero_load_tpot_s: time per token of a lone request.
        """
        return Targets(
            ttft_s=_in_seconds(self.ttft, self.ttft_slowdown, zero_load_ttft_s),
            stages=tuple(
                StageTarget(
                    tpot_s=_in_seconds(stage.tpot, stage.tpot_slowdown, zero_load_tpot_s),
                    until=stage.until,
                    tokens=stage.tokens,
                )
                for stage in self.decode_stages
            ),
        )


@dataclass(frozen=True, slots=True)
class StageTarget:
    """A stage's pace in seconds per token (inf: none promised) and its end."""

    tpot_s: float = math.inf
    until: str | None = None
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Targets:
    """An SLO in absolute seconds; inf where nothing is promised."""

    ttft_s: float = math.inf
    stages: tuple[StageTarget, ...] = (StageTarget(),)


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
        if self.late_ttft or self.late_tpot:
            return True
        if self.first_token_s is not None and self._times is None:
            return False  # the first token of a later stage is never late
        return now > self.next_deadline_s + ROUNDING_S

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


@cache
def preset_classes() -> Mapping[str, SLO]:
    """The classes of the SLOs-Serve evaluation (arXiv 2504.08784), by name."""
    tight, loose = 0.050, 0.100
    thinking = (DecodeStage(tpot=tight, until="</think>"), DecodeStage(tpot=loose))
    classes = {
        "summarization": SLO(ttft_slowdown=3, tpot=loose),
        "coding": SLO(ttft_slowdown=5, tpot=tight),
        "chatbot": SLO(ttft_slowdown=5, tpot=loose),
        "tool_loop": SLO(ttft_slowdown=3, tpot=tight),
        "tool_final": SLO(ttft_slowdown=3, tpot=loose),
        "reasoning": SLO(ttft_slowdown=3, stages=thinking),
    }
    return MappingProxyType({name: slo.named(name) for name, slo in classes.items()})


def _in_seconds(seconds: float | None, slowdown: float | None, zero_load_s: float) -> float:
    if seconds is not None:
        return seconds
    return math.inf if slowdown is None else slowdown * zero_load_s


def _number(name: str, value: object) -> float:
    # Not repeated in the message: it may be of any type and length.
    problem = InvalidSLOError(f"{name} must be a finite number", name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise problem
    try:
        number = float(value)
    except OverflowError:
        raise problem from None
    if not math.isfinite(number):
        raise problem
    return number


def _check_seconds(name: str, value: float | None) -> None:
    if value is not None and not 0 < _number(name, value) <= MAX_SECONDS:
        raise InvalidSLOError(
            f"{name} must be above 0 and at most {MAX_SECONDS:g} seconds, not {value}", name
        )


def _check_slowdown(name: str, value: float | None) -> None:
    if value is not None and not 1 <= _number(name, value) <= MAX_SLOWDOWN:
        raise InvalidSLOError(
            f"{name} must be at least 1 (an idle device) and at most {MAX_SLOWDOWN:g}, not {value}",
            name,
        )


def _check_count(name: str, value: int | None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise InvalidSLOError(f"{name} must be a whole number from 1 to {2**31 - 1}", name)


def _check_either(name: str, value: object, other: str, other_value: object) -> None:
    if value is not None and other_value is not None:
        raise InvalidSLOError(f"give {name} or {other}, not both", other)
