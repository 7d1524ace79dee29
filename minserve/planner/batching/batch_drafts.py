"""Drafts tokens for the decodes of a batch that is being built, as far as its time allows.

`minserve.planner.batching.draft_lengths` says which lengths pay. A sequence of which the draft
model lacks many tokens catches up first.
"""

from __future__ import annotations

from dataclasses import replace

from minserve.planner.batching.draft_lengths import (
    MOST_LAG,
    DraftCandidate,
    Drafting,
    most_left_to_prefills,
    most_tokens_per_second,
)
from minserve.planner.batching.timed_batch_builder import TimedBatchBuilder
from minserve.planner.plan import PlannerView
from minserve.planner.predict.perf_model import PerfModel
from minserve.request import Sequence


def draft_for_prefills(
    batch: TimedBatchBuilder,
    model: PerfModel,
    candidates: list[DraftCandidate],
    num_decodes: int,
    limit: float,
    guard_s: float,
    *,
    needed: bool,
) -> None:
    """Draft for the decodes of a batch such that most time is left to prefills.

    Args:
        num_decodes: number of decodes under a promise, in this batch or not.
        limit: seconds that the batch may take.
        needed: True to draft all that was planned, because the decodes' own promises need it.
    """
    ready = []
    for one in candidates:
        if one.lag > MOST_LAG:
            batch.catch_up(one, (batch.seconds + limit) / 2)
        else:
            ready.append(one)
    if needed:
        lengths = tuple(one.limit for one in ready)
    else:
        lengths = most_left_to_prefills(model, batch.shape, num_decodes, ready, guard_s)
    batch.speculate(ready, lengths, limit)


def draft_with_the_rest(
    batch: TimedBatchBuilder,
    view: PlannerView,
    num_promised: int,
    drafting: Drafting,
    limit: float,
    guard_s: float,
) -> None:
    """Draft for the decodes that do not draft yet, as far as time is left.

    A decode that is done sooner holds its blocks for less long and comes round less often.

    Args:
        num_promised: number of decodes under a promise, in this batch or not.
    """
    plan = batch.builder.plan
    decodes = [
        seq for seq in view.running if seq.seq_id in plan.num_scheduled_tokens and seq.is_decoding
    ]
    if not batch.num_prefills:
        # Decodes that drafted for the sake of prefills have done so, even if none of them fits now.
        if not (plan.speculation or plan.catch_up):
            _draft_for_speed(batch, decodes, drafting, limit)
        return
    own = [
        one
        for seq in decodes
        if seq.seq_id not in plan.speculation
        and seq.seq_id not in plan.catch_up
        and (one := drafting.candidate(seq)).limit > 0
    ]
    num_decodes = max(num_promised, len(decodes))
    draft_for_prefills(batch, drafting.model, own, num_decodes, limit, guard_s, needed=False)


def _draft_for_speed(
    batch: TimedBatchBuilder, decodes: list[Sequence], drafting: Drafting, limit: float
) -> None:
    """Draft for the decodes of a batch such that it brings most tokens per second."""
    candidates = [one for seq in decodes if (one := drafting.candidate(seq)).limit > 0]
    # A decode that must catch up first is counted as if it had, to see what that is worth.
    ready = [one if one.lag <= MOST_LAG else replace(one, lag=0) for one in candidates]
    model = drafting.model
    plain_s, token_s = batch.seconds, model.drift * model.pieces[0].draft_tokens
    best = most_tokens_per_second(model, batch.shape, len(decodes), ready, limit)
    drafting.declined = bool(candidates) and not any(best.lengths)
    lengths = []
    for one, length in zip(candidates, best.lengths, strict=True):
        lengths.append(length if one.lag <= MOST_LAG else 0)
        if length == 0 or one.lag <= MOST_LAG:
            continue
        saved_s = plain_s * (1.0 - 1.0 / best.gain) / len(decodes)
        if drafting.remaining(one.seq) * saved_s >= one.lag * token_s:
            # An iteration at most doubles for it.
            batch.catch_up(one, min(limit, 2.0 * plain_s))
    batch.speculate(candidates, lengths, limit)
