"""Service level objectives: what is promised. `minserve.slo.attainment` says what was kept.

A request's output is one or more decode stages (thinking, then the answer)::

    arrival ──TTFT──► first token ──TPOT──► ... ──marker or count──► first token ──TPOT──► ... end
                      └──────── stage 1 ────────────────────────┘    └────── stage 2 ─────────────┘
       └────────────────────────────────────── finish ────────────────────────────────────────────┘
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from types import MappingProxyType

from minserve.errors import InvalidSLOError

MAX_SECONDS = 1e6
MAX_SLOWDOWN = 1e6
# Characters of a task's id.
MOST_ID = 128
MIN_VALUE, MAX_VALUE = 1e-6, 1e6
# The name of SLOs that belong to no class.
CUSTOM = "custom"


class OnUnattainable(Enum):
    """The treatment of a request whose SLO cannot be met."""

    BEST_EFFORT = "best_effort"
    REJECT = "reject"


class Standing(Enum):
    """The planner's present promise to a sequence.

    ::

        PENDING ──admit──► ADMITTED ──relegate──► BEST_EFFORT ──admit──► ADMITTED
           └───────────────relegate───────────────────▲
    """

    PENDING = "pending"
    ADMITTED = "admitted"
    BEST_EFFORT = "best_effort"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeStage:
    """A part of an output with its own pace.

    Attributes:
        tpot: seconds per output token; or
        tpot_slowdown: the pace as a multiple of the zero-load time per token.
        until: the stage ends with this text, such as ``</think>``; or
        tokens: the stage ends after this many tokens. The last stage has neither.

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
class Task:
    """The task that a call belongs to: an agent's calls, and what its tools do between them.

    Attributes:
        id: the client's name for it: 1 to 128 printable characters. Each call of a task brings
            the same one, with the same values of the other fields.
        finish: seconds from the arrival of the first call to the last token of the last call.
        calls: the number of calls that the client expects; ``None`` if it does not know.

    Raises:
        InvalidSLOError: for a value outside its range.
    """

    id: str
    finish: float
    calls: int | None = None

    def __post_init__(self) -> None:
        if (
            not isinstance(self.id, str)
            or not 1 <= len(self.id) <= MOST_ID
            or not (self.id.isprintable())
        ):
            raise InvalidSLOError(f"id must be a text of 1 to {MOST_ID} printable characters", "id")
        _check_seconds("finish", self.finish)
        _check_count("calls", self.calls)


@dataclass(frozen=True, slots=True, kw_only=True)
class SLO:
    """The objectives that a request asks for. An absent objective promises nothing.

    Attributes:
        ttft: seconds from arrival to the first token; or
        ttft_slowdown: the TTFT as a multiple of the prompt's zero-load prefill time.
        tpot: seconds per output token; or
        tpot_slowdown: the TPOT as a multiple of the zero-load time per token; or
        stages: several stages instead, each with its own pace and, except the last, an end.
        finish: seconds from arrival to the last token, however many there are; alone, or beside
            the others.
        task: the task that the request is a call of, with a deadline of its own.
        expected_output_tokens: the client's own guess, for planning only.
        on_unattainable: serve late, or refuse at once.
        value: weight in the planner's choice among requests that do not all fit, from 1e-6 to 1e6;
            a request's priority multiplies it (`minserve.request.Request.value`).
        name: name of the class, for reports.

    Raises:
        InvalidSLOError: for values outside their range or that contradict each other.
    """

    ttft: float | None = None
    ttft_slowdown: float | None = None
    tpot: float | None = None
    tpot_slowdown: float | None = None
    stages: tuple[DecodeStage, ...] = ()
    finish: float | None = None
    task: Task | None = None
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
        _check_seconds("finish", self.finish)
        if self.finish is not None and self.ttft is not None and self.finish < self.ttft:
            raise InvalidSLOError("finish must not be before ttft", "finish")
        _check_count("expected_output_tokens", self.expected_output_tokens)
        if not MIN_VALUE <= _number("value", self.value) <= MAX_VALUE:
            raise InvalidSLOError(
                f"value must be from {MIN_VALUE:g} to {MAX_VALUE:g}, not {self.value}", "value"
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
                "an SLO needs an objective: "
                "ttft, ttft_slowdown, tpot, tpot_slowdown, stages, finish or task"
            )

    @property
    def decode_stages(self) -> tuple[DecodeStage, ...]:
        """``stages``, or the single stage that ``tpot`` or ``tpot_slowdown`` stands for."""
        return self.stages or (DecodeStage(tpot=self.tpot, tpot_slowdown=self.tpot_slowdown),)

    @property
    def promises_anything(self) -> bool:
        times = (self.ttft, self.ttft_slowdown, self.finish, self.task)
        return any(one is not None for one in times) or any(
            stage.has_pace for stage in self.decode_stages
        )

    @property
    def refuses_delay(self) -> bool:
        """True if the request would rather be refused than be late."""
        return self.on_unattainable is OnUnattainable.REJECT

    @property
    def needs_profile(self) -> bool:
        """True if an objective is a multiple of this device's own speed."""
        return self.ttft_slowdown is not None or any(
            stage.tpot_slowdown is not None for stage in self.decode_stages
        )

    def named(self, name: str) -> SLO:
        """Return the same objectives under another name."""
        return replace(self, name=name)

    def behind(self, marker: str) -> SLO:
        """Return the objectives of an output that begins behind a stage's marker."""
        ends = [stage.until for stage in self.stages]
        if marker not in ends:
            return self
        rest = self.stages[ends.index(marker) + 1 :]
        others = (self.ttft, self.ttft_slowdown, self.finish, self.task)
        if all(one is None for one in others) and not any(stage.has_pace for stage in rest):
            return self  # nothing would be left of it
        if len(rest) > 1:
            return replace(self, stages=rest)
        [one] = rest
        return replace(self, stages=(), tpot=one.tpot, tpot_slowdown=one.tpot_slowdown)

    def resolve(self, zero_load_ttft_s: float, zero_load_tpot_s: float) -> Targets:
        """Return the objectives in seconds, for one request on one device.

        Args:
            zero_load_ttft_s: seconds to prefill the whole prompt on the idle device.
            zero_load_tpot_s: seconds per token of a lone request.
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
            finish_s=math.inf if self.finish is None else self.finish,
        )


@dataclass(frozen=True, slots=True)
class StageTarget:
    """A stage's pace in seconds per token (inf: no pace is promised) and its end."""

    tpot_s: float = math.inf
    until: str | None = None
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Targets:
    """An SLO in seconds; inf where nothing is promised.

    Attributes:
        aim_s: an earlier deadline than ``finish_s`` to plan for, as long as it can be kept; no part
            of the promise.
    """

    ttft_s: float = math.inf
    stages: tuple[StageTarget, ...] = (StageTarget(),)
    finish_s: float = math.inf
    aim_s: float = math.inf


@cache
def preset_classes() -> Mapping[str, SLO]:
    """Return the classes of the SLOs-Serve evaluation (arXiv 2504.08784), by name, and two general
    ones: somebody watches the answer come, or waits for it as a whole.
    """
    tight, loose = 0.050, 0.100
    thinking = (DecodeStage(tpot=tight, until="</think>"), DecodeStage(tpot=loose))
    classes = {
        "summarization": SLO(ttft_slowdown=3, tpot=loose),
        "coding": SLO(ttft_slowdown=5, tpot=tight),
        "chatbot": SLO(ttft_slowdown=5, tpot=loose),
        "tool_loop": SLO(ttft_slowdown=3, tpot=tight),
        "tool_final": SLO(ttft_slowdown=3, tpot=loose),
        "reasoning": SLO(ttft_slowdown=3, stages=thinking),
        "interactive": SLO(ttft_slowdown=5, tpot=loose),
        "batch": SLO(finish=60.0),
    }
    return MappingProxyType({name: slo.named(name) for name, slo in classes.items()})


def _in_seconds(seconds: float | None, slowdown: float | None, zero_load_s: float) -> float:
    if seconds is not None:
        return seconds
    return math.inf if slowdown is None else slowdown * zero_load_s


def _number(name: str, value: object) -> float:
    # The message does not repeat the value, which may be of any type and length.
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
