"""`SimulatedReplica`: an engine core on a virtual clock, whose device is a performance model."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from minserve.activity import NO_TOKENS, BatchTokens
from minserve.engine.batch import Scheduled
from minserve.engine.block_pool import BlockPool
from minserve.engine.core import EngineCore
from minserve.engine.stats import EngineStats
from minserve.errors import SimulationError, SLOUnattainableError
from minserve.outputs import OutputDelta
from minserve.planner.plan import IterationPlan, PlannerView
from minserve.planner.policies.base import Planner
from minserve.planner.predict.perf_model import PerfModel
from minserve.request import Sequence
from minserve.simulator.device_time import DeviceTime
from minserve.simulator.simulated_device import SimulatedDevice, SimulatedProposer
from minserve.simulator.simulated_sequence import SimulatedSequence
from minserve.slo.attainment import SLOReport

# After an iteration that runs nothing, the next one begins so many seconds later.
IDLE_S = 0.001
# So many idle iterations in a row, while sequences wait, are a deadlock.
MOST_IDLE = 20_000

# Called with the first output of each request that has no promise and has not begun; returns True
# if the request goes to another replica instead of waiting here.
GivesAway = Callable[[SimulatedSequence], bool]


def _keep(_: SimulatedSequence) -> bool:
    return False


class UncountedStats(EngineStats):
    """Leaves out all that costs time for each sequence: a simulation is judged by its verdicts."""

    def started(self, seq: Sequence, now: float) -> None:
        pass

    def delivered(self, seq: Sequence, num: int, last: float | None, now: float) -> None:
        pass

    def ended(self, seq: Sequence, report: SLOReport | None) -> None:
        pass

    def batch(self, batch: SequenceOf[Scheduled]) -> BatchTokens:
        return NO_TOKENS

    def iteration(self, plan: IterationPlan, model: PerfModel | None, measured_s: float) -> None:
        pass


class SimulatedReplica:
    """Runs sequences to their end.

    Args:
        model: the usual times of batches; the planner has its own model.
        clock: virtual seconds; the caller moves it.
        device_time: how true times differ from the usual ones; ``None`` for not at all.
        clairvoyant: True if the planner's model is told, in its attribute ``next_factor``, the
            factor that the next batch will have on its usual time.
        acceptance: chance that a drafted token is accepted if those before it were.

    Attributes:
        core: plans, and keeps the books.
        busy: True from the beginning of an iteration to its end.
        busy_s: seconds in which batches ran.
    """

    def __init__(
        self,
        planner: Planner,
        pool: BlockPool,
        model: PerfModel,
        *,
        clock: Callable[[], float],
        token_budget: int,
        max_num_seqs: int,
        proposer: SimulatedProposer | None = None,
        acceptance: float = 0.0,
        device_time: DeviceTime | None = None,
        clairvoyant: bool = False,
        seed: int = 0,
    ) -> None:
        self._clock, self._clairvoyant = clock, clairvoyant
        self._device_time = device_time or DeviceTime()
        self.device = SimulatedDevice(
            model, self._device_time, clock, proposer=proposer, acceptance=acceptance, seed=seed
        )
        self.core = EngineCore(
            self.device,
            pool,
            planner,
            token_budget=token_budget,
            max_num_seqs=max_num_seqs,
            max_model_len=pool.num_blocks * pool.block_size,
            clock=clock,
            proposer=proposer,
            stats=UncountedStats(),
        )
        self.busy = False
        self.busy_s = 0.0
        self.num_iterations = 0
        self._sequences: dict[tuple[str, int], SimulatedSequence] = {}
        self._num_idle = 0

    @property
    def planner(self) -> Planner:
        return self.core.planner

    @property
    def pool(self) -> BlockPool:
        return self.core.pool

    @property
    def has_work(self) -> bool:
        return self.core.has_work

    def submit(self, seq: SimulatedSequence) -> None:
        """Add a sequence to the queue."""
        self._sequences[seq.request.request_id, seq.index] = seq
        self.core.enqueue(seq)

    def view(self) -> PlannerView:
        """Return the planner's view of the replica."""
        return self.core.view()

    def begin(self, gives_away: GivesAway = _keep) -> tuple[float, list[SimulatedSequence]]:
        """Plan an iteration and start it.

        Returns:
            the seconds until the iteration ends, and the first output of each refused request.

        Raises:
            SimulationError: if the policy runs nothing for too long although there is work.
        """
        num_before = len(self._sequences)

        def takes(request_id: str) -> bool:
            first = self._sequences[request_id, 0]
            if not gives_away(first):
                return False
            for one in first.siblings:
                del self._sequences[request_id, one.index]
            return True

        if self._clairvoyant and self.planner.model is not None:
            self.planner.model.next_factor = self._device_time.factor(self._clock())
        runs = self.core.begin(takes)
        refused = [seq for seq in self._ended(self.core.take_untold()) if seq is seq.siblings[0]]
        self.busy = True
        if not runs:
            # Nothing is waited for in vain while requests leave.
            self._num_idle = self._num_idle + 1 if len(self._sequences) == num_before else 0
            return self._idle(), refused
        self._num_idle = 0
        self.busy_s += self.device.took_s
        self.num_iterations += 1
        return self.device.took_s, refused

    def end(self) -> list[SimulatedSequence]:
        """End the iteration: apply its results, and return the sequences that have ended."""
        self.busy = False
        return self._ended(self.core.end(self.device.took_s))

    def _ended(self, deltas: list[OutputDelta]) -> list[SimulatedSequence]:
        """Return the sequences that have ended by these deltas.

        Raises:
            SimulationError: if an error other than a refusal has ended one.
        """
        ended = []
        for delta in deltas:
            if delta.error is not None and not isinstance(delta.error, SLOUnattainableError):
                raise SimulationError(f"request {delta.request_id}: {delta.error}") from delta.error
            ended.append(self._sequences.pop((delta.request_id, delta.index)))
        return ended

    def _idle(self) -> float:
        """Return the seconds after an iteration that runs nothing until the next one begins.

        Raises:
            SimulationError: if there were too many such iterations in a row.
        """
        if self._num_idle > MOST_IDLE:
            raise SimulationError(
                f"{self.planner.name} runs nothing although {len(self._sequences)} sequences wait"
            )
        return IDLE_S
