"""`Planner`: the one interface of every scheduling policy."""

from __future__ import annotations

from abc import ABC, abstractmethod

from minserve.planner.plan import IterationPlan, PlannerView


class Planner(ABC):
    """Decides what the next iteration runs. Reads sequences and never changes them.

    ``plan`` does what all policies share; a policy writes ``_plan``.

    Attributes:
        num_plans, num_preemptions, num_admissions: counted since the start.
    """

    name: str

    def __init__(self) -> None:
        self.num_plans = 0
        self.num_preemptions = 0
        self.num_admissions = 0

    def plan(self, view: PlannerView, now: float) -> IterationPlan:
        """Plan one iteration.

        Args:
            view: the engine's state.
            now: seconds on the engine's monotonic clock.
        """
        plan = self._plan(view, now)
        self.num_plans += 1
        self.num_preemptions += len(plan.preempt)
        self.num_admissions += len(plan.admit)
        return plan

    @abstractmethod
    def _plan(self, view: PlannerView, now: float) -> IterationPlan:
        """The policy's decision."""
