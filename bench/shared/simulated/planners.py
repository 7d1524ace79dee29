"""Planners for `reproduce.py`: `dp` with something taken away, and planners that are observed."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import replace

from minserve.planner.admission.review import ReviewResult
from minserve.planner.batching.formation import Work
from minserve.planner.plan import IterationPlan, PlannerView, Refusal
from minserve.planner.policies.base import Planner
from minserve.planner.policies.dp import DpPlanner
from minserve.planner.policies.promising import GUARD_S
from minserve.planner.predict.lengths import LengthEstimator
from minserve.planner.predict.perf_model import BatchShape, PerfModel
from minserve.request import Sequence, SequenceState
from minserve.simulator.simulation import MakePlanner, Setup
from minserve.slo.objectives import Standing


class NoPendingPlanner(DpPlanner):
    """Declines for good every request that a round of admission does not choose: best effort."""

    name = "dp"

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._declined: set[str] = set()

    def finished(self, seq: Sequence) -> None:
        super().finished(seq)
        self._declined.discard(seq.seq_id)

    def review(
        self, view: PlannerView, now: float, model: PerfModel, broken: Set[str]
    ) -> ReviewResult:
        shown = replace(
            view,
            waiting=[self._shown(seq) for seq in view.waiting],
            running=[self._shown(seq) for seq in view.running],
        )
        result = super().review(shown, now, model, broken - self._declined)
        for seq in (*view.waiting, *view.running):
            if seq.standing is Standing.PENDING and seq.seq_id not in result.chosen:
                result.relegate[seq.seq_id] = None
        self._declined.update(result.relegate)
        return result

    def _shown(self, seq: Sequence) -> Sequence:
        """Return the sequence as admission sees it: without an SLO once it was declined."""
        if seq.seq_id not in self._declined:
            return seq
        twin = copy.copy(seq)
        twin.progress = None
        return twin


class NoBestEffortPlanner(DpPlanner):
    """Refuses a request whose SLO is given up before it has begun, instead of serving it late.

    A request that has begun is finished, even if its promise was broken on the way.
    """

    name = "dp"

    def roles(self, view: PlannerView, now: float, result: ReviewResult, broken: set[str]) -> Work:
        work = super().roles(view, now, result, broken)
        for seq in [seq for seq in work.best_effort if _untouched(seq)]:
            work.best_effort.remove(seq)
            result.relegate.pop(seq.seq_id, None)
            result.reject[seq.seq_id] = Refusal("compute", 0.0)
        return work


def _untouched(seq: Sequence) -> bool:
    return seq.state is SequenceState.WAITING and seq.num_output_tokens == 0


class FixedBatchPlanner(DpPlanner):
    """Lets every iteration take as long as one of `budget` tokens, whatever is due.

    Decodes run first, all of them in every iteration. Admission takes this into account: while
    no sequence decodes, it counts on iterations of the same length.
    """

    name = "dp"
    budget = DpPlanner.token_budget

    def longest_s(self, model: PerfModel) -> float:
        return model.predict(BatchShape.of([(0, self.budget)], eager=True))

    def roles(self, view: PlannerView, now: float, result: ReviewResult, broken: set[str]) -> Work:
        work = super().roles(view, now, result, broken)
        due = now + GUARD_S + self.model.margin * self.longest_s(self.model)
        work.decodes = [(due, seq) for _, seq in work.decodes]
        return work


def _ablation(kind: type[DpPlanner], share: float | None = None) -> MakePlanner:
    def make(setup: Setup, lengths: LengthEstimator) -> Planner:
        planner = kind(
            setup.device.perf_model(),
            lengths=lengths,
            best_effort_share=setup.best_effort_share if share is None else share,
        )
        if isinstance(planner, FixedBatchPlanner):
            planner.budget = setup.budget
        return planner

    return make


ABLATIONS: Mapping[str, MakePlanner] = {
    "no pending": _ablation(NoPendingPlanner),
    "no best effort": _ablation(NoBestEffortPlanner, share=0.0),
    "fixed batches": _ablation(FixedBatchPlanner),
}

Watch = Callable[[PlannerView, float, float], None]


def watched(make: MakePlanner, watch: Watch) -> MakePlanner:
    """Return a maker of planners whose calls of `plan` are reported.

    Args:
        watch: called with the view, the virtual time, and the real seconds that planning took.
    """

    def make_watched(setup: Setup, lengths: LengthEstimator) -> Planner:
        planner = make(setup, lengths)
        plan = planner.plan

        def noted(view: PlannerView, now: float) -> IterationPlan:
            began = time.perf_counter()
            made = plan(view, now)
            watch(view, now, time.perf_counter() - began)
            return made

        planner.plan = noted
        return planner

    return make_watched
