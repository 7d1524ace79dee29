"""`Draw`: the source of a load test's workloads, which is a scenario or a trace, at any rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache

from minserve.errors import WorkloadError
from minserve.slo.objectives import SLO
from minserve.workload.conversation import Conversation
from minserve.workload.recordings import scaled
from minserve.workload.scenarios import SCENARIOS, Scenario
from minserve.workload.task_terms import TaskTerms
from minserve.workload.traces import TraceRequest, to_workload

# Returns a workload without texts, given requests per second (`None`: its own rate) and a seed.
Draw = Callable[[float | None, int], list[Conversation]]


def draw_scenario(
    scenario: Scenario,
    *,
    seconds: float | None = None,
    num_requests: int | None = None,
    terms: TaskTerms | None = None,
) -> Draw:
    """Return a source of workloads from a scenario, at any rate.

    Args:
        terms: makes a task of each conversation.
    """

    def draw(rate: float | None, seed: int) -> list[Conversation]:
        if rate is None:
            raise WorkloadError("a scenario needs a rate: give --rate or --capacity")
        drawn = scenario.draw(rate, seed=seed, seconds=seconds, num_requests=num_requests)
        return [replace(one, terms=terms) for one in drawn]

    return draw


def draw_trace(
    rows: Sequence[TraceRequest],
    slo_of: dict[str, SLO],
    default_class: str,
    *,
    length_scale: float = 1.0,
    seconds: float | None = None,
    num_requests: int | None = None,
) -> Draw:
    """Return a source of workloads from a trace, at its own rate or another.

    Seeds change only its texts.

    Args:
        length_scale: factor on all lengths; no length falls below 1 token.
        seconds: keep the requests of the first so many seconds, at the rate that is asked for.
        num_requests: keep so many of its first rows.

    Raises:
        WorkloadError: for a factor, a time or a number out of range.
    """
    if not 0 < length_scale < math.inf:
        raise WorkloadError(f"the factor on lengths must be above 0, not {length_scale}")
    if num_requests is not None and num_requests < 1:
        raise WorkloadError(f"the number of requests must be at least 1, not {num_requests}")
    if seconds is not None and not 0 < seconds < math.inf:
        raise WorkloadError(f"seconds must be above 0, not {seconds}")
    rows = [_scaled_row(row, length_scale) for row in rows[:num_requests]]

    def draw(rate: float | None, _: int) -> list[Conversation]:
        workload = to_workload(rows, slo_of, default_class, rate=rate)
        return [one for one in workload if seconds is None or one.arrival_s < seconds]

    return draw


def with_values(draw: Draw, values: Mapping[str, float]) -> Draw:
    """Return a source of the same workloads, in which the SLOs of some classes have other values.

    Args:
        values: by the name of the class.
    """

    @cache
    def valued(slo: SLO) -> SLO:
        return replace(slo, value=values.get(slo.name, slo.value))

    def draw_valued(rate: float | None, seed: int) -> list[Conversation]:
        """Draw a workload.

        Raises:
            WorkloadError: for a class that it does not have.
            InvalidSLOError: for a value out of range.
        """
        workload = draw(rate, seed)
        known = {turn.slo.name for conversation in workload for turn in conversation.turns}
        if unknown := sorted(values.keys() - known):
            raise WorkloadError(
                f"the workload has no class {unknown[0]}; it has {', '.join(sorted(known))}"
            )
        return [
            Conversation(one.arrival_s, tuple(replace(t, slo=valued(t.slo)) for t in one.turns))
            for one in workload
        ]

    return draw_valued


def not_longer(
    rows: Sequence[TraceRequest], longest: int, length_scale: float = 1.0
) -> list[TraceRequest]:
    """Return the rows whose prompt and output together, once scaled, have at most ``longest``
    tokens.

    Raises:
        WorkloadError: if there is no such row.
    """
    kept = [row for row in rows if _num_tokens(_scaled_row(row, length_scale)) <= longest]
    if not kept:
        raise WorkloadError(f"every request of the trace is longer than {longest} tokens")
    return kept


def _num_tokens(row: TraceRequest) -> int:
    return row.prompt_tokens + row.output_tokens


def _scaled_row(row: TraceRequest, factor: float) -> TraceRequest:
    """Return a row with its lengths multiplied; no length falls below 1 token."""
    return replace(
        row,
        prompt_tokens=scaled(row.prompt_tokens, factor),
        output_tokens=scaled(row.output_tokens, factor),
    )


def classes(*, tight: float | None = None, loose: float | None = None) -> dict[str, SLO]:
    """Return the classes of all scenarios, by name.

    Args:
        tight, loose: paces as slowdowns, as in `Scenario.scaled`.
    """
    scaled = [scenario.scaled(tight=tight, loose=loose) for scenario in SCENARIOS.values()]
    return {name: slo for scenario in scaled for name, slo in scenario.classes.items()}
