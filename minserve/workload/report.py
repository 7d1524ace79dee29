"""`Report`: verdicts in numbers, for real and for simulated runs.

Attainment is a share of all offered requests. These requests count as missed: rejected, failed,
unanswered and unsent ones, and best-effort ones that came late. A report uses only verdicts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minserve.tables import text_table
from minserve.workload.task_terms import TaskVerdict
from minserve.workload.verdict import Cause, Verdict

QUANTILES = (0.5, 0.9, 0.99)
ALL = "all"
_HEADINGS = ("class", "offered", "attained", "mean form", "ttft p50", "p90", "p99",
             "tpot p50", "p90", "p99", "end p50", "p90", "p99")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Seconds that 50%, 90% and 99% of the requests did not exceed; NaN if there were none."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Percentiles:
        ordered = sorted(values)
        return cls(*(_at(ordered, q) for q in QUANTILES))

    def to_dict(self) -> dict[str, float | None]:
        """Return milliseconds by name; ``None`` where there is no finite number."""
        return {name: _ms(getattr(self, name)) for name in ("p50", "p90", "p99")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Results of a part of a run's requests, such as the requests of one class.

    Attributes:
        offered: number of requests, however they ended.
        attained: requests that attained their SLO in the deadline form.
        attained_mean: requests that attained their SLO in the mean form.
        misses: requests that did not attain their SLO in the deadline form, by cause.
        best_effort: missed requests that were served although the server had given up their SLO.
        ttft_s: of all requests; a request without a token counts as infinitely late.
        tpot_s: of the requests with at least two tokens.
        finish_s: time to the last token; a request whose output did not end counts as infinitely
            late.
        output_tokens: of all requests.
        attained_tokens: output tokens of the requests that attained their SLO in the deadline form.
    """

    offered: int
    attained: int
    attained_mean: int
    misses: Mapping[Cause, int]
    best_effort: int
    ttft_s: Percentiles
    tpot_s: Percentiles
    finish_s: Percentiles
    output_tokens: int
    attained_tokens: int

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> Part:
        kept = [verdict for verdict in verdicts if verdict.attained]
        return cls(
            offered=len(verdicts),
            attained=len(kept),
            attained_mean=sum(verdict.attained_mean for verdict in verdicts),
            misses=Counter(verdict.cause for verdict in verdicts if verdict.cause is not None),
            best_effort=sum(verdict.best_effort for verdict in verdicts),
            ttft_s=Percentiles.of(_late(v.ttft_s) for v in verdicts),
            tpot_s=Percentiles.of(v.tpot_s for v in verdicts if v.tpot_s is not None),
            finish_s=Percentiles.of(_late(v.finish_s) for v in verdicts),
            output_tokens=sum(verdict.output_tokens for verdict in verdicts),
            attained_tokens=sum(verdict.output_tokens for verdict in kept),
        )

    @property
    def attainment(self) -> float:
        """Share of the offered requests that attained their SLO; NaN if none was offered."""
        return _ratio(self.attained, self.offered)

    @property
    def attainment_mean(self) -> float:
        """Share of the offered requests that attained their SLO in the mean form."""
        return _ratio(self.attained_mean, self.offered)

    def to_dict(self) -> dict[str, Any]:
        """Return the results as JSON values, times in milliseconds."""
        return {
            "offered": self.offered,
            "attained": self.attained,
            "attainment": _rounded(self.attainment),
            "attainment_mean": _rounded(self.attainment_mean),
            "misses": {cause.name.lower(): self.misses.get(cause, 0) for cause in Cause},
            "best_effort": self.best_effort,
            "ttft_ms": self.ttft_s.to_dict(),
            "tpot_ms": self.tpot_s.to_dict(),
            "finish_ms": self.finish_s.to_dict(),
            "output_tokens": self.output_tokens,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskPart:
    """Results of a run's tasks.

    Attributes:
        offered: number of tasks, however they ended.
        attained: tasks that ended by their deadline.
        given_up: tasks of which the server said that they could not be in time.
        took_s: of all tasks; one that did not end counts as infinitely late.
    """

    offered: int
    attained: int
    given_up: int
    took_s: Percentiles

    @classmethod
    def of(cls, verdicts: Sequence[TaskVerdict]) -> TaskPart:
        return cls(
            offered=len(verdicts),
            attained=sum(one.attained for one in verdicts),
            given_up=sum(one.given_up for one in verdicts),
            took_s=Percentiles.of(math.inf if v.took_s is None else v.took_s for v in verdicts),
        )

    @property
    def attainment(self) -> float:
        """Share of the tasks that ended by their deadline; NaN if none was offered."""
        return _ratio(self.attained, self.offered)

    def to_dict(self) -> dict[str, Any]:
        """Return the results as JSON values, times in milliseconds."""
        return {
            "offered": self.offered,
            "attained": self.attained,
            "attainment": _rounded(self.attainment),
            "given_up": self.given_up,
            "took_ms": self.took_s.to_dict(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A run in numbers.

    Attributes:
        seconds: time over which the requests arrived.
        total: results of all requests.
        classes: results by class name, sorted by name.
        send_lag_s: how late the client itself sent its requests, in seconds.
        tasks: results of all tasks; ``None`` where requests are no calls of tasks.
    """

    seconds: float
    total: Part
    classes: Mapping[str, Part]
    send_lag_s: Percentiles
    tasks: TaskPart | None = None

    @classmethod
    def of(
        cls, verdicts: Sequence[Verdict], seconds: float, tasks: Sequence[TaskVerdict] = ()
    ) -> Report:
        """Return the report of verdicts; repeats are pooled if all their verdicts come together.

        Args:
            seconds: time over which the requests arrived, the sum over repeats.
            tasks: the verdicts on tasks, where there are some.
        """
        names = sorted({verdict.name for verdict in verdicts})
        return cls(
            seconds=seconds,
            total=Part.of(verdicts),
            classes={n: Part.of([v for v in verdicts if v.name == n]) for n in names},
            send_lag_s=Percentiles.of(verdict.send_lag_s for verdict in verdicts),
            tasks=TaskPart.of(tasks) if tasks else None,
        )

    @property
    def kept(self) -> float:
        """The share by which a capacity is judged: of tasks where there are some, else of requests."""
        return self.total.attainment if self.tasks is None else self.tasks.attainment

    @property
    def attainment(self) -> float:
        """Share of all offered requests that attained their SLO; NaN if none was offered."""
        return self.total.attainment

    @property
    def attainment_mean(self) -> float:
        return self.total.attainment_mean

    @property
    def rate(self) -> float:
        """Offered requests per second."""
        return _ratio(self.total.offered, self.seconds)

    @property
    def goodput(self) -> float:
        """Attained requests per second of arrivals."""
        return _ratio(self.total.attained, self.seconds)

    @property
    def goodput_tokens(self) -> float:
        """Output tokens of attained requests per second of arrivals."""
        return _ratio(self.total.attained_tokens, self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values: times in milliseconds, ``None`` for infinite ones."""
        return {
            "seconds": _rounded(self.seconds),
            "rate": _rounded(self.rate),
            "goodput": _rounded(self.goodput),
            "goodput_tokens": _rounded(self.goodput_tokens),
            "send_lag_ms": self.send_lag_s.to_dict(),
            **self.total.to_dict(),
            **({} if self.tasks is None else {"tasks": self.tasks.to_dict()}),
            "classes": {name: part.to_dict() for name, part in self.classes.items()},
        }

    def table(self) -> str:
        """Return a table for the terminal: a row per class, one for all, misses and goodput."""
        parts = dict(self.classes)
        if len(parts) != 1:
            parts[ALL] = self.total
        counts = [f"{n} {cause.value}" for cause in Cause if (n := self.total.misses.get(cause))]
        lines = [
            text_table(_HEADINGS, [(name, *_cells(part)) for name, part in parts.items()]),
            f"misses: {', '.join(counts) or 'none'}; best effort: {self.total.best_effort}",
            f"offered {self.rate:.3g} requests/s for {self.seconds:.1f} s; goodput "
            f"{self.goodput:.3g} requests/s, {self.goodput_tokens:.3g} output tokens/s",
        ]
        if (tasks := self.tasks) is not None:
            times = (_readable(getattr(tasks.took_s, q)) for q in ("p50", "p90", "p99"))
            lines.append(
                f"tasks: {tasks.offered}, {_percent(tasks.attainment)} in time, {tasks.given_up} "
                f"given up; they took {', '.join(times)} (p50, p90, p99)"
            )
        return "\n".join(lines)


def percentile(values: Iterable[float], q: float) -> float:
    """Return the smallest value that a share ``q`` of the values does not exceed; NaN of none."""
    return _at(sorted(values), q)


def share(flags: Iterable[bool]) -> float:
    """Return the share of flags that are true; NaN of none."""
    values = list(flags)
    return _ratio(sum(values), len(values))


def _late(seconds: float | None) -> float:
    """Return a time; infinity if what it is the time of never came."""
    return math.inf if seconds is None else seconds


def _at(ordered: Sequence[float], q: float) -> float:
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)] if ordered else math.nan


def _cells(part: Part) -> list[str]:
    """Return the cells of a row of the table, behind its name."""
    each = (part.ttft_s, part.tpot_s, part.finish_s)
    times = [getattr(one, q) for one in each for q in ("p50", "p90", "p99")]
    return [
        str(part.offered),
        _percent(part.attainment),
        _percent(part.attainment_mean),
        *map(_readable, times),
    ]


def _percent(one: float) -> str:
    return "-" if math.isnan(one) else f"{100 * one:.1f}%"


def _readable(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    if math.isinf(seconds):
        return "never"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def _rounded(one: float) -> float | None:
    return round(one, 4) if math.isfinite(one) else None


def _ms(seconds: float) -> float | None:
    return round(seconds * 1e3, 3) if math.isfinite(seconds) else None
