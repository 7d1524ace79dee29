"""Sarathi-Serve's order (Agrawal et al., OSDI 2024): stall-free batches.

Every decode runs in every iteration; what is left of the token budget goes to
prefills in progress and then to new ones, in chunks.
"""

from __future__ import annotations

from minserve.planner.batching.batch_builder import BatchBuilder
from minserve.planner.plan import IterationPlan, PlannerView
from minserve.planner.policies.base import Planner


class SarathiPlanner(Planner):
    """The policy that runs decodes first, then chunked prefills under the token budget."""

    name = "sarathi"
    token_budget = 512

    def _plan(self, view: PlannerView, now: float) -> IterationPlan:
        builder = BatchBuilder(view)
        builder.decodes()
        for seq in view.running:
            if not seq.is_decoding and not builder.is_preempted(seq):
                builder.schedule(seq, seq.num_uncomputed_tokens, whole=False)
        for seq in view.waiting:
            if not (builder.awaits_sibling(seq) or builder.start(seq)):
                break
        return builder.plan
