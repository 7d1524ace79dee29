"""`Replay` that plans each iteration while the one before it runs."""

from __future__ import annotations

from replay import Replay

from minserve.engine.batch import Scheduled
from minserve.engine.lookahead import PlanAhead, confirm, project
from minserve.planner.plan import IterationPlan
from minserve.request import Sequence


class LookaheadReplay(Replay):
    """Plans ahead as the engine core does.

    Attributes:
        ahead: the plan made ahead.
        num_held, num_discarded: plans made ahead, by what became of them.
    """

    ahead: PlanAhead | None = None
    num_held = 0
    num_discarded = 0

    def plan(self) -> IterationPlan:
        view, ahead, self.ahead = self.view(), self.ahead, None
        if ahead is not None:
            plan = confirm(ahead, view, self.now)
            if plan is not None:
                self.num_held += 1
                self.planner.reckon(plan, view)
                return plan
            self.num_discarded += 1
            self.planner.discarded()
        return self.planner.plan(view, now=self.now)

    def launched(self, plan: IterationPlan, by_id: dict[str, Sequence]) -> None:
        if not plan.num_scheduled_tokens:
            return
        batch = [Scheduled(by_id[seq_id], num) for seq_id, num in plan.num_scheduled_tokens.items()]
        at = self.now + (plan.predicted_s or 0.0)
        view = project(self.view(), batch, at)
        if view.running or view.waiting:
            self.ahead = PlanAhead.of(self.planner.plan(view, now=at), view)
