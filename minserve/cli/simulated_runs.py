"""`SimulatedRuns`: simulates a workload at one rate after another, and keeps all runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from minserve.interrupt import Interrupt
from minserve.progress_bar import progress_bar
from minserve.simulator.offered_load import OfferedLoad
from minserve.simulator.simulation import Setup, SimulationResult, simulate
from minserve.workload.conversation import Conversation, num_turns
from minserve.workload.draws import Draw
from minserve.workload.report import Report


@dataclass(frozen=True, slots=True)
class SimulatedRun:
    """A simulation at one rate, with its results.

    Attributes:
        rate: requests per second that were wanted; ``None`` for a trace's own rate.
        seconds: time over which the requests arrived.
    """

    rate: float | None
    setup: Setup
    seconds: float
    result: SimulationResult


@dataclass(slots=True)
class SimulatedRuns:
    """The runs of one workload, kept for the report; also a run that was cut short."""

    setup: Setup
    draw: Draw
    interrupt: Interrupt
    runs: list[SimulatedRun] = field(default_factory=list)

    def attainment(self, rate: float | None, repeat: int, replicas: int | None = None) -> float:
        """Simulate the workload at a rate, keep the run, and return its attainment.

        Args:
            repeat: is added to the seed.
            replicas: number of replicas instead of the setup's.
        """
        setup = replace(self.setup, seed=self.setup.seed + repeat)
        if replicas is not None:
            setup = replace(setup, replicas=replicas)
        workload = self.draw(rate, setup.seed)
        name = "trace" if rate is None else f"{rate:.3g}/s"
        if replicas is not None:
            name += f", {replicas} replicas"
        result = SimulationResult()
        with progress_bar(total=num_turns(workload), desc=name, unit="request", leave=False) as bar:

            def progressed(_: OfferedLoad) -> None:
                bar.update()
                self.interrupt.check()

            try:
                simulate(workload, setup, progressed, into=result)
            except KeyboardInterrupt:
                seconds = min(result.seconds, _span_s(workload, rate))
                self.runs.append(SimulatedRun(rate, setup, seconds, result))
                raise
        self.runs.append(SimulatedRun(rate, setup, _span_s(workload, rate), result))
        return Report.of(result.verdicts, self.runs[-1].seconds, result.task_verdicts).kept


def _span_s(workload: Sequence[Conversation], rate: float | None) -> float:
    """Return the seconds over which a workload arrives."""
    return workload[-1].arrival_s if rate is None else num_turns(workload) / rate
