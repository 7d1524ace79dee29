"""`with_proposals`: has a proposer draft the tokens that a plan asks for."""

from __future__ import annotations

import logging

from minserve.engine.batch import Scheduled
from minserve.engine.speculation.proposal import Proposal
from minserve.engine.speculation.proposer import DraftRequest, Proposer
from minserve.planner.plan import IterationPlan

log = logging.getLogger(__name__)


def with_proposals(
    batch: list[Scheduled], plan: IterationPlan, proposer: Proposer | None
) -> list[Scheduled]:
    """Return the batch with the proposals that the plan asks for; without, where drafting fails."""
    if proposer is None or not (plan.speculation or plan.catch_up):
        return batch
    wanted = [
        DraftRequest(item.seq, plan.speculation.get(seq_id, 0), plan.catch_up.get(seq_id, 0))
        for item in batch
        if (seq_id := item.seq.seq_id) in plan.speculation or seq_id in plan.catch_up
    ]
    proposals: dict[str, Proposal] = {}
    try:
        proposals = proposer.propose(wanted)
    except Exception:
        # No request depends on a guess.
        log.exception("drafting failed; this iteration goes on without")
        for one in wanted:
            proposer.forget(one.seq)
    return [item._replace(proposal=proposals.get(item.seq.seq_id)) for item in batch]
