"""Jobs of `reproduce.py`: one measurement of one worker, with its result as plain JSON."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from minserve.planner.plan import PlannerView
from minserve.simulator.simulation import SimulationResult, promises, simulate
from minserve.slo.objectives import Standing
from minserve.workload.conversation import num_turns
from minserve.workload.report import percentile, share
from shared.simulated.cases import Case, Size, attainment, measures_of
from shared.simulated.planners import watched
from shared.simulated.search import best_of

PACKAGE = Path(__file__).resolve().parents[3] / "minserve"
# The parts of the package that a simulation runs, and the files here that measure it.
SOURCES = (
    "planner",
    "engine",
    "simulator",
    "workload",
    "controller",
    "slo",
    "request.py",
)
MEASURING = ("cases.py", "planners.py", "search.py")

BIN_S = 5.0
# Planning times are grouped by these numbers of sequences.
CROWDS = (0, 8, 16, 32, 64, 128)

Result = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(ABC):
    """A measurement. A job with the same key has the same result.

    Attributes:
        cost: rough number of seconds that it takes; not part of the key.
        alone: True if nothing else may run beside it.
    """

    @property
    def key(self) -> str:
        """A hash of all settings, and of the code that they are run with."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:20]

    @property
    def text(self) -> str:
        """All settings, as readable text."""
        fields = {"kind": type(self).__name__, "source": fingerprint(), **asdict(self)}
        return json.dumps(fields, sort_keys=True)

    @property
    def cost(self) -> float:
        return 1.0

    @property
    def alone(self) -> bool:
        return False

    @abstractmethod
    def run(self) -> Result:
        """Measure it and return the result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Search(Job):
    """The capacity of the best of some cases, in requests per second and GPU.

    Attributes:
        start: the rate with which the search begins.
        near: True if the start is near, and there is only one case.
    """

    cases: tuple[Case, ...]
    start: float
    size: Size
    near: bool = False

    @property
    def cost(self) -> float:
        one = _simulation_s(self.cases[0], self.size.requests)
        coarse = 0.0 if self.near else (4.0 + 1.6 * len(self.cases)) * one
        return 6.0 * self.size.repeats * one + coarse * self.size.coarse / self.size.requests

    def run(self) -> Result:
        size = self.size
        best = best_of(
            self.cases,
            None if self.near else lambda case: measures_of(case, size.coarse, 1),
            lambda case: measures_of(case, size.requests, size.repeats),
            self.start,
            repeats=size.repeats,
            tolerance=size.tolerance,
        )
        return {
            **best.capacity.to_dict(),
            "best": asdict(best.variant),
            "variant": best.variant.variant,
            "variants": len(self.cases),
            "contenders": best.num_contenders,
            "coarse": {case.variant: round(rate, 4) for case, rate in best.coarse.items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Point(Job):
    """The attainment at one rate per GPU, over all repeats."""

    case: Case
    rate: float
    size: Size

    @property
    def cost(self) -> float:
        return self.size.repeats * _simulation_s(self.case, self.size.requests)

    def run(self) -> Result:
        case = self.case
        each = [
            attainment(
                case.workload(self.rate, self.size.requests, seed), case.setup(seed), case.make
            )
            for seed in range(self.size.repeats)
        ]
        return {"attainment": sum(each) / len(each), "each": each}


@dataclass(frozen=True, slots=True, kw_only=True)
class Series(Job):
    """A run over time, in bins of `BIN_S` seconds."""

    case: Case
    rate: float
    size: Size

    @property
    def cost(self) -> float:
        return _simulation_s(self.case, self.size.requests)

    def run(self) -> Result:
        case, result = self.case, SimulationResult()
        workload = case.workload(self.rate, self.size.requests, 0)
        # By bin: sequences that run under a promise (all, if the policy makes none), without,
        # waiting.
        running: dict[int, list[tuple[int, int, int]]] = {}

        def watch(view: PlannerView, now: float, _: float) -> None:
            late = sum(seq.standing is Standing.BEST_EFFORT for seq in view.running)
            counts = (len(view.running) - late, late, len(view.waiting))
            running.setdefault(int(now / BIN_S), []).append(counts)

        simulate(workload, case.setup(0), into=result, make=watched(case.make, watch))
        bins = range(int(result.seconds / BIN_S) + 1)
        arrived: dict[int, list[bool]] = {}
        for verdict in result.verdicts:
            arrived.setdefault(int(verdict.arrival_s / BIN_S), []).append(verdict.attained)
        promised, late, waiting = (
            [_mean([counts[part] for counts in running.get(i, [])]) for i in bins]
            for part in range(3)
        )
        return {
            "bin_s": BIN_S,
            "offered": num_turns(workload),
            "attainment": share(verdict.attained for verdict in result.verdicts),
            "arrivals": [len(arrived.get(i, [])) for i in bins],
            "attained": [sum(arrived.get(i, [])) for i in bins],
            "promised": promised,
            "best_effort": late,
            "waiting": waiting,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Planning(Job):
    """The real milliseconds per plan, by the number of sequences that wait or run."""

    case: Case
    rate: float
    size: Size

    @property
    def alone(self) -> bool:
        return True

    def run(self) -> Result:
        case = self.case
        taken: dict[int, list[float]] = {}

        def watch(view: PlannerView, _: float, seconds: float) -> None:
            crowd = len(view.waiting) + len(view.running)
            least = max(one for one in CROWDS if one <= crowd)
            taken.setdefault(least, []).append(1e3 * seconds)

        workload = case.workload(self.rate, self.size.requests, 0)
        simulate(workload, case.setup(0), make=watched(case.make, watch))
        everything = [one for each in taken.values() for one in each]
        return {
            "all": _percentiles(everything),
            "by_sequences": {str(least): _percentiles(taken[least]) for least in sorted(taken)},
        }


def case_of(fields: Mapping[str, Any]) -> Case:
    """Return the case that a result belongs to."""
    return Case(**{**fields, "ratio": tuple(fields["ratio"])})


@cache
def fingerprint() -> str:
    """Return a hash of the code that decides results: other code makes other keys."""
    files = [Path(__file__).with_name(name) for name in MEASURING]
    for name in SOURCES:
        path = PACKAGE / name
        files += [path] if path.is_file() else sorted(path.rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _simulation_s(case: Case, num_requests: int) -> float:
    """Return the rough seconds of one simulation; only the order of jobs depends on it."""
    tokens = {"coding": 60, "tools": 90, "reasoning": 5500, "mixed": 220}.get(case.scenario, 240)
    cost = 4e-6 if not promises(case.policy) else 2.2e-5 if case.max_speculation else 1.1e-5
    return num_requests * min(case.copies, 4) * tokens * cost


def _mean(values: list[int]) -> float:
    return round(sum(values) / len(values), 2) if values else 0.0


def _percentiles(values: list[float]) -> dict[str, float]:
    return {
        "plans": len(values),
        "p50_ms": round(percentile(values, 0.5), 4),
        "p99_ms": round(percentile(values, 0.99), 4),
        "max_ms": round(max(values), 4),
    }


def at(case: Case, **changes: Any) -> Case:
    """Return the same case with some values changed."""
    return replace(case, **changes)


Measured = Callable[[Job], Result | None]
