"""`PlanMaker`: asks for plans, when they are due or while the iteration before still runs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from minserve.engine.batch import Scheduled
from minserve.engine.guarded_planning import GuardedPlanning
from minserve.engine.lookahead import PlanAhead, confirm, project
from minserve.engine.stats import EngineStats
from minserve.errors import InvalidPlanError
from minserve.planner.plan import IterationPlan, PlannerView
from minserve.planner.plan_check import faults_of

log = logging.getLogger(__name__)


class PlanMaker:
    """Makes an engine core's plans, and keeps the one that was made ahead.

    Args:
        stats: counts plans and their seconds.
    """

    def __init__(
        self, planning: GuardedPlanning, stats: EngineStats, clock: Callable[[], float]
    ) -> None:
        self._planning, self._stats, self._clock = planning, stats, clock
        self._ahead: PlanAhead | None = None

    def now(self, view: PlannerView) -> IterationPlan:
        """Return the plan for now: the one made ahead, where that still holds, else a new one."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            plan = confirm(ahead, view, self._clock())
            self._stats.plans_ahead["discarded" if plan is None else "held"] += 1
            if plan is not None:
                if plan is not ahead.plan:
                    self._planning.reckon(plan, view)
                return plan
            self._planning.discarded()
        return self._ask(view, self._clock())

    def look_ahead(
        self, view: PlannerView, batch: SequenceOf[Scheduled], ends_at: float
    ) -> PlannerView | None:
        """Plan the next iteration while a batch runs, and keep the plan.

        Args:
            view: the state while it runs.
            ends_at: when it should have ended.

        Returns:
            the state that the plan was made for; ``None`` where there is no plan.
        """
        at = max(ends_at, self._clock())
        try:
            view = project(view, batch, at)
            if not (view.running or view.waiting):
                return None
            plan = self._ask(view, at)
            if faults := faults_of(plan, view):
                raise InvalidPlanError(f"the plan contradicts itself or the state: {faults}")
            self._ahead = PlanAhead.of(plan, view)
        except Exception:
            # What the batch brings must not be lost. Without a plan the next step makes one.
            self._planning.discarded()
            log.exception("planning ahead failed; the next iteration is planned when it is due")
            return None
        return view

    def take(
        self, view: PlannerView, fits: Callable[[IterationPlan], bool]
    ) -> IterationPlan | None:
        """Return the plan made ahead, where it can be carried out before the batch has ended.

        Args:
            view: the state that it was made for.
            fits: says whether a plan may be launched behind that batch.
        """
        ahead = self._ahead
        if ahead is None or not fits(ahead.plan) or confirm(ahead, view, -math.inf) is None:
            return None
        self._ahead = None
        self._stats.plans_ahead["launched"] += 1
        return ahead.plan

    def checked(
        self, plan: IterationPlan, view: PlannerView
    ) -> tuple[IterationPlan, dict[str, str]]:
        """Return a plan, or another one where it has faults, and the faults that are left."""
        faults = faults_of(plan, view)
        if not faults:
            return plan, faults
        other = self._planning.replace(view, self._clock(), f"its plan is wrong: {faults}")
        return (plan, faults) if other is None else (other, faults_of(other, view))

    def _ask(self, view: PlannerView, now: float) -> IterationPlan:
        started = self._clock()
        plan = self._planning.plan(view, now)
        self._stats.planning_s.observe(self._clock() - started)
        return plan
