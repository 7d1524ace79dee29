"""First come, first served: vLLM's original order (Kwon et al., SOSP 2023).

Waiting prefills go before decodes. Without chunking an iteration holds either whole
prompts or decodes, never both; with chunking prefills take the budget first and
decodes share what is left.
"""

from __future__ import annotations

from minserve.planner.batching.batch_builder import BatchBuilder
from minserve.planner.plan import IterationPlan, PlannerView
from minserve.planner.policies.base import Planner, PlannerSettings
from minserve.planner.predict.perf_model import PerfModel


class FcfsPlanner(Planner):
    """The policy that runs prefills first, then decodes.

    Args:
        chunked_prefill: True to split prompts over iterations and mix them with decodes.
    """

    name = "fcfs"

    def __init__(self, model: PerfModel | None = None, *, chunked_prefill: bool = True) -> None:
        super().__init__(model)
        self.chunked_prefill = chunked_prefill

    @classmethod
    def create(cls, settings: PlannerSettings) -> FcfsPlanner:
        return cls(settings.model, chunked_prefill=settings.chunked_prefill)

    def _plan(self, view: PlannerView, now: float) -> IterationPlan:
        return self._plan_chunked(view) if self.chunked_prefill else self._plan_whole(view)

    def _plan_chunked(self, view: PlannerView) -> IterationPlan:
        builder = BatchBuilder(view)
        for seq in view.running:
            if not seq.is_decoding and not builder.is_preempted(seq):
                builder.schedule(seq, seq.num_uncomputed_tokens, whole=False)
        for seq in view.waiting:
            if not (builder.awaits_sibling(seq) or builder.start(seq)):
                break
        builder.decodes()
        return builder.plan

    def _plan_whole(self, view: PlannerView) -> IterationPlan:
        # A prompt longer than the budget still has to run in one piece: alone.
        longest = max((s.num_tokens for s in view.waiting[:1]), default=0)
        builder = BatchBuilder(view, token_budget=max(view.token_budget, longest))
        for seq in view.waiting:
            if not (builder.awaits_sibling(seq) or builder.start(seq, whole=True)):
                break
        if not builder.plan.start:
            builder.decodes()
        return builder.plan
