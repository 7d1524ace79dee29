"""Plans an iteration while the one before it runs on the device.

Such a plan is made from a guess at the state to come: `project` is that guess, and `confirm`
says later which part of the plan still holds. Nearly always that is the plan without the
sequences that ended meanwhile. Where it is not, the iteration is planned anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from minserve.blocks import blocks_for
from minserve.engine.batch import Scheduled
from minserve.planner.plan import IterationPlan, MemoryView, PlannerView, SpeculationView
from minserve.planner.predict.eager import DraftPasses
from minserve.request import Sequence


@dataclass(frozen=True, slots=True)
class PlanAhead:
    """A plan, and what it relies on.

    Attributes:
        seen: the ids of all sequences that it was made for.
        starts: for each chunk of a prefill, the number of tokens that are computed before it.
    """

    plan: IterationPlan
    seen: frozenset[str]
    starts: Mapping[str, int]

    @classmethod
    def of(cls, plan: IterationPlan, view: PlannerView) -> PlanAhead:
        """Return a plan with what it relies on of the view that it was made from."""
        starts = {
            seq.seq_id: seq.num_computed_tokens
            for seq in view.running
            if seq.seq_id in plan.num_scheduled_tokens and not seq.is_decoding
        }
        started = set(plan.start)
        for seq in view.waiting:
            if seq.seq_id in started:
                starts[seq.seq_id] = view.memory.cached_prefix(seq).num_tokens
        return cls(plan, frozenset(s.seq_id for s in (*view.running, *view.waiting)), starts)


@dataclass(frozen=True, slots=True)
class _ProjectedSpeculation:
    """The proposer, asked about sequences whose newest token is not known yet.

    Attributes:
        known: the sequences as they are.
    """

    proposer: SpeculationView
    known: Mapping[str, Sequence]

    @property
    def max_tokens(self) -> int:
        return self.proposer.max_tokens

    @property
    def passes(self) -> DraftPasses:
        return self.proposer.passes

    def limit(self, seq: Sequence) -> int:
        return self.proposer.limit(self.known[seq.seq_id])

    def lag(self, seq: Sequence) -> int:
        # Drafts under way may reach beyond what is certain to be kept of them.
        return max(0, self.proposer.lag(seq))


def project(view: PlannerView, batch: Iterable[Scheduled], at: float) -> PlannerView:
    """Return the engine's state after a batch, as far as that can be told while it runs.

    Each sequence of the batch that samples has one token more, no draft is accepted, and only
    sequences that reach ``max_tokens`` end. The view's sequences do not change.

    Args:
        view: the state while the batch runs.
        at: the time at which its tokens come.
    """
    num_tokens = {item.seq.seq_id: item.num_tokens for item in batch}
    running = [
        seq.ahead(num_tokens[seq.seq_id], at) if seq.seq_id in num_tokens else seq
        for seq in view.running
    ]
    drafts = None
    if view.speculation is not None:
        drafts = _ProjectedSpeculation(view.speculation, {s.seq_id: s for s in view.running})
    return replace(
        view,
        running=[s for s in running if s.num_output_tokens < s.request.max_tokens],
        speculation=drafts,
    )


def confirm(ahead: PlanAhead, view: PlannerView, now: float) -> IterationPlan | None:
    """Return the part of a plan made ahead that can be carried out.

    Args:
        view: the state that has come to be.
        now: seconds on the engine's monotonic clock.

    Returns:
        The plan itself, or one without the sequences that ended and without drafts that are
        no longer possible, with the shape still to be reckoned; ``None`` where it is better
        to plan anew.
    """
    plan = ahead.plan
    live = {seq.seq_id: seq for seq in (*view.running, *view.waiting)}
    if not live.keys() <= ahead.seen:
        return None  # a sequence has come
    # Nobody is given up, refused or preempted by a guess: blocks may be free by now that were
    # not when it was made.
    if plan.reject or plan.relegate or plan.preempt or now > plan.start_by_s:
        return None
    if len(live) < len(ahead.seen):
        plan = plan.only(live)
    if view.speculation is not None and (plan.speculation or plan.catch_up):
        plan = _with_possible_drafts(plan, live, view.speculation)
    if not plan.num_scheduled_tokens or not _fits(plan, ahead.starts, live, view.memory):
        return None
    return plan


def _with_possible_drafts(
    plan: IterationPlan, live: Mapping[str, Sequence], proposer: SpeculationView
) -> IterationPlan:
    """Return the plan without drafts that cannot be made now or lie behind an output's end."""
    scheduled, speculation = dict(plan.num_scheduled_tokens), {}
    for seq_id, planned in plan.speculation.items():
        seq = live[seq_id]
        left = seq.request.max_tokens - seq.num_output_tokens - 1
        length = max(0, min(planned, left, proposer.limit(seq)))
        scheduled[seq_id] -= planned - length
        if length:
            speculation[seq_id] = length
    catch_up = {
        seq_id: min(num, proposer.lag(live[seq_id])) for seq_id, num in plan.catch_up.items()
    }
    catch_up = {seq_id: num for seq_id, num in catch_up.items() if num > 0}
    if speculation == plan.speculation and catch_up == plan.catch_up:
        return plan
    return replace(plan, num_scheduled_tokens=scheduled, speculation=speculation, catch_up=catch_up)


def _fits(
    plan: IterationPlan,
    starts: Mapping[str, int],
    live: Mapping[str, Sequence],
    memory: MemoryView,
) -> bool:
    """Return whether each sequence stands where the plan has it, and the blocks suffice."""
    size, starting = memory.block_size, set(plan.start)
    free = memory.num_free_blocks
    for seq_id, num_tokens in plan.num_scheduled_tokens.items():
        seq = live[seq_id]
        start, num_held = seq.num_computed_tokens, len(seq.block_table)
        if seq_id in starting:
            hit = memory.cached_prefix(seq)
            start, num_held = hit.num_tokens, hit.num_tokens // size - hit.num_idle_blocks
        if not (start == starts[seq_id] if seq_id in starts else seq.is_decoding):
            return False
        free -= max(0, blocks_for(start + num_tokens, size) - num_held)
    return free >= 0
