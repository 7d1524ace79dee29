"""The simulations of `reproduce.py`: a `Case` is one workload on one setup, in plain values."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from minserve.devices import PUBLISHED
from minserve.simulator.simulation import (
    MakePlanner,
    Setup,
    SimulationResult,
    planner_of,
    promises,
    simulate,
)
from minserve.slo.objectives import SLO
from minserve.workload.capacity import LEVEL, Measure
from minserve.workload.conversation import Conversation, num_turns
from minserve.workload.scenarios import find_scenario
from shared.simulated.planners import ABLATIONS

# With more replicas than this, the number of requests stays the same. The window then becomes
# shorter than that of one replica.
MOST_COPIES = 4
# A run is cut short once less than this share can still attain: by then it is overloaded.
HOPELESS = 0.75
# The least distance that the cut leaves between a mean of repeats and the level.
CLEARANCE = 0.05
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A workload on a setup.

    Attributes:
        planner: an ablation's name; empty for the policy's own planner.
        ttft_slowdown: TTFT of all requests as a slowdown; ``None`` leaves their own.
        tpot_scale: factor on the paces of all requests.
        The other attributes are those of `Setup`.
    """

    scenario: str
    device: str
    policy: str = "dp"
    planner: str = ""
    lengths: str = "oracle"
    token_budget: int | None = None
    max_speculation: int = 0
    ratio: tuple[int, int] = (1, 1)
    replicas: int = 1
    router: str = "slo"
    hop_limit: int = 2
    slowness: float = 1.0
    noise: float = 0.0
    length_error: float = 0.0
    ttft_slowdown: float | None = None
    tpot_scale: float = 1.0

    def setup(self, seed: int) -> Setup:
        """Return a setup for the simulator."""
        return Setup(
            device=PUBLISHED[self.device],
            policy=self.policy,
            lengths=self.lengths,
            token_budget=self.token_budget,
            max_speculation=self.max_speculation,
            ratio=self.ratio,
            replicas=self.replicas,
            router=self.router,
            hop_limit=self.hop_limit,
            slowness=self.slowness,
            noise=self.noise,
            length_error=self.length_error,
            seed=seed,
        )

    @property
    def num_gpus(self) -> int:
        """The number of GPUs; capacities are per GPU."""
        return self.setup(0).num_gpus

    @property
    def copies(self) -> int:
        """The number of models that share the load."""
        return self.replicas * (sum(self.ratio) if self.policy == "distserve" else 1)

    @property
    def make(self) -> MakePlanner:
        """The function that makes the planner of each replica."""
        return ABLATIONS[self.planner] if self.planner else planner_of

    @property
    def variant(self) -> str:
        """Words that distinguish it from other cases of its policy."""
        parts = [self.planner] if self.planner else []
        if self.policy == "distserve":
            parts.append(f"{self.ratio[0]}:{self.ratio[1]}")
        if self.token_budget is not None:
            parts.append(f"budget {self.token_budget}")
        if self.max_speculation:
            most = "up to " if promises(self.policy) else ""
            parts.append(f"{most}{self.max_speculation} drafted")
        return ", ".join(parts) or "default"

    def workload(self, rate: float, num_requests: int, seed: int) -> list[Conversation]:
        """Return a workload.

        Args:
            rate: requests per second and GPU.
            num_requests: requests for each of the models that share the load.
        """
        drawn = find_scenario(self.scenario).draw(
            rate * self.num_gpus,
            seed=seed,
            num_requests=num_requests * min(self.copies, MOST_COPIES),
        )
        if self.ttft_slowdown is None and self.tpot_scale == 1.0:
            return drawn
        return [
            Conversation(
                one.arrival_s,
                tuple(replace(turn, slo=self._slo(turn.slo)) for turn in one.turns),
            )
            for one in drawn
        ]

    def _slo(self, slo: SLO) -> SLO:
        ttft = slo.ttft_slowdown if self.ttft_slowdown is None else self.ttft_slowdown
        return replace(slo, ttft_slowdown=ttft, tpot=slo.tpot * self.tpot_scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The amount of simulation.

    Attributes:
        requests: requests of each simulation, for each model that shares the load.
        repeats: number of seeds at each rate.
        tolerance: relative tolerance of a capacity.
        coarse: requests in the search for the best of several variants.
    """

    requests: int
    repeats: int
    tolerance: float
    coarse: int


class _OutOfReach(Exception):
    """Ends a run: too many requests missed their SLO for the rest to change the decision."""


def cut_below(repeats: int, *, decides: bool = False) -> float:
    """Return the share below which a run may be cut short.

    Even if all other repeats attained everything, their mean with this run would lie below the
    level: a run that is cut short cannot change the search's next step.

    Args:
        decides: True if only it counts whether the mean is below the level; otherwise the share
            lies clearly below, since capacities are interpolated between two rates.
    """
    # A mean of exactly the level attains it, and rounding must not change that.
    least = repeats * LEVEL - (repeats - 1) - ROUNDING
    return max(0.0, least if decides else min(HOPELESS, least - CLEARANCE))


def attainment(
    workload: list[Conversation], setup: Setup, make: MakePlanner = planner_of, *, cut: float = 0.0
) -> float:
    """Return the share of all offered requests that attain their SLO (deadline form).

    Args:
        cut: the simulation ends as soon as less than this share can still attain; the result
            is then the share that still could, an upper bound.
    """
    offered, result = num_turns(workload), SimulationResult()
    num_misses = 0

    def progressed(load) -> None:
        nonlocal num_misses
        num_misses += not load.verdicts[-1].attained
        if offered - num_misses < cut * offered:
            raise _OutOfReach

    with suppress(_OutOfReach):
        simulate(workload, setup, progressed, result, make)
    return 1.0 - num_misses / offered


def measures_of(case: Case, num_requests: int, repeats: int) -> tuple[Measure, Measure]:
    """Return two functions for attainment at a rate per GPU, by seed.

    The first serves a search. The second may cut runs earlier, where only the decision counts.
    """

    def measure(rate: float, seed: int, decides: bool) -> float:
        workload = case.workload(rate, num_requests, seed)
        cut = cut_below(repeats, decides=decides)
        return attainment(workload, case.setup(seed), case.make, cut=cut)

    return partial(measure, decides=False), partial(measure, decides=True)
