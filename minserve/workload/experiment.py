"""`Experiment`: sends a workload to a server at one rate after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from minserve.errors import WorkloadError
from minserve.slo.objectives import Targets
from minserve.workload.client import Load, LoadProgress, run_load
from minserve.workload.conversation import Conversation, num_turns
from minserve.workload.draws import Draw
from minserve.workload.endpoint import Endpoint
from minserve.workload.reference import Reference
from minserve.workload.report import Report
from minserve.workload.texts import fill
from minserve.workload.turn_targets import typical_targets
from minserve.workload.zero_load import ZeroLoad


@dataclass(frozen=True, slots=True)
class ExperimentRun:
    """A load test at one rate.

    Attributes:
        rate: requests per second that were wanted; ``None`` for a trace's own rate.
        seconds: time over which the requests arrived.
    """

    rate: float | None
    seed: int
    seconds: float
    load: Load

    @property
    def report(self) -> Report:
        return Report.of(self.load.verdicts(), self.seconds, self.load.task_verdicts())

    @property
    def targets(self) -> dict[str, Targets]:
        """Typical targets by class."""
        return typical_targets((one.turn.slo.name, one.targets) for one in self.load.answers)


@dataclass(slots=True)
class Experiment:
    """The load tests of one server.

    Attributes:
        reference: the speed of which slowdowns are multiples.
        runs: all runs so far, also a run that was cut short.
    """

    endpoint: Endpoint
    reference: Reference
    draw: Draw
    runs: list[ExperimentRun] = field(default_factory=list)

    @property
    def speed(self) -> ZeroLoad:
        return self.reference.speed

    def workload(self, rate: float | None, seed: int) -> list[Conversation]:
        """Return a workload whose texts have about the wanted number of tokens on this server.

        Raises:
            WorkloadError: if it cannot be drawn, or is too long for the model.
        """
        workload = self.draw(rate, seed)
        _check_lengths(workload, self.endpoint.max_model_len)
        return fill(workload, self.speed.count_tokens, seed=seed)

    def run(
        self,
        workload: Sequence[Conversation],
        rate: float | None,
        seed: int,
        on_progress: Callable[[LoadProgress], None] | None = None,
    ) -> ExperimentRun:
        """Send a workload and keep the run. Ctrl-C cuts the run short; it is kept nevertheless."""
        load = run_load(self.endpoint, workload, self.speed, on_progress=on_progress)
        planned = load.complete and rate is not None
        seconds = num_turns(workload) / rate if planned and rate else load.seconds
        self.runs.append(ExperimentRun(rate, seed, seconds, load))
        return self.runs[-1]

    def guess_capacity(self, workload: Sequence[Conversation]) -> float:
        """Return the rate to start a search with: requests per second served one after another."""
        turns = [turn for conversation in workload for turn in conversation.turns]
        busy_s = sum(
            self.speed.zero_load_prefill_s(turn.prompt_tokens - turn.shared_tokens)
            + self.speed.decode_s * turn.output_tokens
            for turn in turns
        )
        return len(turns) / max(busy_s, 1e-9)


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
