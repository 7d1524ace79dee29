"""`Experiment`: a workload at one rate after another against a server."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from minserve.errors import WorkloadError
from minserve.slo import SLO, Targets
from minserve.workload.client import Load, Tally, run_load
from minserve.workload.conversation import Conversation, num_turns
from minserve.workload.endpoint import Endpoint
from minserve.workload.report import Report
from minserve.workload.scenarios import SCENARIOS, Scenario
from minserve.workload.targets import typical_targets
from minserve.workload.texts import fill
from minserve.workload.traces import Row, to_workload
from minserve.workload.zero_load import ZeroLoad

# A workload without texts, from requests per second (`None`: its own) and a seed.
Draw = Callable[[float | None, int], list[Conversation]]


@dataclass(frozen=True, slots=True)
class Run:
    """One load.

    Attributes:
        rate: that was wanted; ``None`` for a trace's own.
        seconds: over which the requests arrived.
    """

    rate: float | None
    seed: int
    seconds: float
    load: Load

    @property
    def report(self) -> Report:
        return Report.of(self.load.verdicts(), self.seconds)

    @property
    def targets(self) -> dict[str, Targets]:
        """Typical ones by class."""
        return typical_targets((one.turn.slo.name, one.targets) for one in self.load.answers)


@dataclass(slots=True)
class Experiment:
    """What is tried on which server.

    Attributes:
        runs: so far, also one that was cut short.
    """

    endpoint: Endpoint
    speed: ZeroLoad
    draw: Draw
    runs: list[Run] = field(default_factory=list)

    def workload(self, rate: float | None, seed: int) -> list[Conversation]:
        """With texts of about as many tokens as each prompt should have on this server.

        Raises:
            WorkloadError: where it cannot be drawn, or is too long for the model.
        """
        workload = self.draw(rate, seed)
        _check_lengths(workload, self.endpoint.max_model_len)
        return fill(workload, self.speed.count_tokens, seed=seed)

    def run(
        self,
        workload: Sequence[Conversation],
        rate: float | None,
        seed: int,
        on_progress: Callable[[Tally], None] | None = None,
    ) -> Run:
        """Send a workload. Ctrl-C cuts it short; the run is kept all the same."""
        load = run_load(self.endpoint, workload, self.speed, on_progress=on_progress)
        planned = load.complete and rate is not None
        seconds = num_turns(list(workload)) / rate if planned and rate else load.seconds
        self.runs.append(Run(rate, seed, seconds, load))
        return self.runs[-1]

    def guess_capacity(self, workload: Sequence[Conversation]) -> float:
        """Requests per second if each had the server for itself: where to begin a search."""
        turns = [turn for conversation in workload for turn in conversation.turns]
        busy_s = sum(
            self.speed.zero_load_prefill_s(turn.prompt_tokens - turn.shared_tokens)
            + self.speed.decode_s * turn.output_tokens
            for turn in turns
        )
        return len(turns) / max(busy_s, 1e-9)


def draw_scenario(
    scenario: Scenario, *, seconds: float | None = None, num_requests: int | None = None
) -> Draw:
    """A scenario at any rate."""

    def draw(rate: float | None, seed: int) -> list[Conversation]:
        if rate is None:
            raise WorkloadError("a scenario needs a rate: give --rate or --capacity")
        return scenario.draw(rate, seed=seed, seconds=seconds, num_requests=num_requests)

    return draw


def draw_trace(
    rows: Sequence[Row],
    slo_of: dict[str, SLO],
    default_class: str,
    *,
    length_scale: float = 1.0,
    seconds: float | None = None,
    num_requests: int | None = None,
) -> Draw:
    """A trace, at its own rate or any. Seeds change its texts alone.

    Args:
        length_scale: factor on all lengths; none falls below 1 token.
        seconds: from its beginning, at the rate that is asked for; or
        num_requests: as many of its first rows.

    Raises:
        WorkloadError: for a factor or number that is none.
    """
    if not 0 < length_scale < math.inf:
        raise WorkloadError(f"the factor on lengths must be above 0, not {length_scale}")
    if num_requests is not None and num_requests < 1:
        raise WorkloadError(f"the number of requests must be at least 1, not {num_requests}")
    if seconds is not None and not 0 < seconds < math.inf:
        raise WorkloadError(f"seconds must be above 0, not {seconds}")
    rows = [
        replace(
            row,
            prompt_tokens=max(1, round(row.prompt_tokens * length_scale)),
            output_tokens=max(1, round(row.output_tokens * length_scale)),
        )
        for row in rows[:num_requests]
    ]

    def draw(rate: float | None, _: int) -> list[Conversation]:
        workload = to_workload(rows, slo_of, default_class, rate=rate)
        return [one for one in workload if seconds is None or one.arrival_s < seconds]

    return draw


def classes(*, tight: float | None = None, loose: float | None = None) -> dict[str, SLO]:
    """Those of all scenarios, by name.

    Args:
        tight, loose: paces as slowdowns, as in `Scenario.scaled`.
    """
    scaled = [scenario.scaled(tight=tight, loose=loose) for scenario in SCENARIOS.values()]
    return {name: slo for scenario in scaled for name, slo in scenario.classes.items()}


def _check_lengths(workload: Sequence[Conversation], max_model_len: int | None) -> None:
    if max_model_len is None:
        return
    lengths = [
        turn.prompt_tokens + turn.output_tokens
        for conversation in workload
        for turn in conversation.turns
    ]
    if long := [length for length in lengths if length > max_model_len]:
        raise WorkloadError(
            f"{len(long)} of {len(lengths)} requests are longer than the model's {max_model_len} "
            f"tokens; the longest has {max(long)}. Lower --length-scale, or serve another model"
        )
