"""Forms one iteration's batch from deadlines: the sequences that run, their tokens, its length.

The batch is as long as the nearest decode deadlines allow
(`minserve.planner.batching.batch_length`), not of a fixed size. It is filled in this order:

1. decodes that could not wait for the iteration after this one, earliest deadline first,
   and best effort as far as its share is overdue;
2. prefill chunks of admitted sequences, earliest deadline first;
3. the other decodes: ahead of schedule, so that they may skip an iteration (the credits of
   Scorpio, arXiv 2505.23022) but get what is left, which builds up credit again;
4. sequences that are promised nothing but may still be in time, earliest deadline first: the
   refusal of a promise alone makes no request late;
5. best effort, decodes first, prefills in chunks.

Tokens are drafted for decodes that must run, if that leaves longer batches to the prefills behind
them, and with what time is left for all other decodes of the batch, as far as that saves time or
makes them faster (`minserve.planner.batching.draft_lengths`).

A sequence without a promise preempts no other. Admitted sequences preempt the others when blocks
or slots run out. All that was computed is lost then, so a sequence without a promise starts only
in blocks that promises have not held lately.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from minserve.planner.batching.batch_builder import BatchBuilder
from minserve.planner.batching.batch_drafts import draft_for_prefills, draft_with_the_rest
from minserve.planner.batching.batch_length import CALM, URGENT, USUAL_RISK, Stake, allowed_s
from minserve.planner.batching.draft_lengths import DraftCandidate, Drafting
from minserve.planner.batching.timed_batch_builder import TimedBatchBuilder
from minserve.planner.plan import IterationPlan, PlannerView
from minserve.planner.predict.acceptance import cautious_tokens
from minserve.planner.predict.pacing import Paces
from minserve.planner.predict.perf_model import EAGER, BatchShape, PerfModel
from minserve.request import Sequence, SequenceState

Due = tuple[float, Sequence]


@dataclass(slots=True, kw_only=True)
class Work:
    """The sequences of one iteration, sorted into the roles above.

    Attributes:
        decodes, prefills: admitted sequences with their next deadline, earliest first. Prefills may
            be waiting still.
        unpromised: sequences that are promised nothing, or no longer, and are not late yet, with
            their next deadline, earliest first.
        best_effort: the other sequences, which are late or have no SLO, in rank order.
        paces: what deadlines of whole outputs ask for.
    """

    decodes: list[Due] = field(default_factory=list)
    prefills: list[Due] = field(default_factory=list)
    unpromised: list[Due] = field(default_factory=list)
    best_effort: list[Sequence] = field(default_factory=list)
    paces: Paces = field(default_factory=Paces)

    def at_stake(self, decodes: list[Due]) -> list[Due]:
        """Return the decodes whose promise a late token breaks, with the time when it is late,
        earliest first. A pace that follows from a deadline can still be made up for.
        """
        if not self.paces.by_id:
            return decodes
        hard = [(seq.slo_progress.next_deadline_s, seq) for _, seq in decodes]
        return sorted((one for one in hard if one[0] < math.inf), key=_due_s)

    def tightest_of_deadlines_s(self) -> float:
        """Return the tightest pace of the admitted decodes that follows from a deadline."""
        if not self.paces.by_id:
            return math.inf
        return min((self.paces.of_deadline_s(seq) for _, seq in self.decodes), default=math.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """The limits of one iteration's time and memory.

    Attributes:
        longest_s: seconds that it may take if no decode is due; a new arrival may have to wait so
            long.
        guard_s: seconds before its deadline at which a token must be ready, so that it also reaches
            the client in time.
        best_effort_s: seconds of this iteration that best effort gets before admitted prefills; the
            nearest decode deadline stands all the same.
        spare_blocks: number of blocks that sequences without a promise may hold, so that promises
            seldom take them away again, with all that was computed.
        blocks_of: function that returns how many blocks a sequence will come to hold.
    """

    longest_s: float
    guard_s: float
    best_effort_s: float = 0.0
    spare_blocks: float = math.inf
    blocks_of: Callable[[Sequence], int] = lambda seq: len(seq.block_table)


def form_batch(
    view: PlannerView,
    work: Work,
    model: PerfModel | None,
    limits: BatchLimits,
    now: float,
    drafting: Drafting | None = None,
) -> IterationPlan:
    """Fill one iteration.

    Args:
        model: the performance model. Without one nothing is timed, and the token budget is the only
            bound.
        now: seconds on the engine's monotonic clock.
        drafting: facts about speculation; ``None`` drafts nothing.
    """
    order, num_kept = _order(work)
    batch = TimedBatchBuilder(BatchBuilder(view, order=order, num_kept=num_kept), model)
    at_stake = work.at_stake(work.decodes)
    stakes = _stakes(at_stake, batch, limits, now)
    decodes_s = batch.seconds_of_decodes([seq for _, seq in work.decodes])
    due, calm = _due_times(work, stakes, decodes_s, batch, limits, now)
    limit = min(due, limits.longest_s, work.tightest_of_deadlines_s() - limits.guard_s)

    candidates: dict[str, DraftCandidate] = {}
    if drafting is not None and work.prefills:
        decodes = (seq for _, seq in work.decodes)
        candidates = drafting.candidates_for_prefills(decodes, work.paces)
    paces = [work.paces.tpot_s(seq) for _, seq in work.decodes]
    with_drafts = _with_drafts(paces, work, candidates) if candidates else paces
    must, may = _split_decodes(work, batch, limit, limits, now, min(with_drafts, default=0.0))
    within = _must_end_s(at_stake, decodes_s, stakes, limits, now)
    run = batch.decodes([seq for _, seq in must], within)
    if drafting is not None and candidates:
        own = [one for seq in run if (one := candidates.get(seq.seq_id)) is not None]
        needed = drafting.for_prefills.needed
        draft_for_prefills(
            batch, drafting.model, own, len(work.decodes), limit, limits.guard_s, needed=needed
        )
    given = 0.0
    if limits.best_effort_s > 0:
        overdue = batch.seconds + limits.best_effort_s
        given = _best_effort(batch, work, limits, min(overdue, limit, calm))
    until = _prefill_promised(batch, work, limits, limit, now)
    limit, due = min(limit, until), min(due, until)
    batch.decodes([seq for _, seq in may], limit)
    # The credit of admitted decodes is not for others.
    given += _fill_up(batch, work, limits, min([limit, *paces]), calm, now)
    if drafting is not None:
        draft_with_the_rest(batch, view, len(work.decodes), drafting, limit, limits.guard_s)
    plan = batch.builder.plan
    plan.shape, plan.best_effort_s = batch.shape, given
    # A batch of plain decodes is as short as can be, however late it begins.
    if batch.num_prefills or plan.speculation or plan.catch_up:
        plan.start_by_s = now + max(0.0, due - batch.seconds) + limits.guard_s
    return plan


def _due_s(due: Due) -> float:
    return due[0]


def _order(work: Work) -> tuple[list[Sequence], int]:
    """Return the running sequences, of which the last is preempted first, and how many of them
    stand under a promise.
    """
    running = [seq for _, seq in work.decodes]
    running += [seq for _, seq in work.prefills if seq.state is SequenceState.RUNNING]
    # Of the admitted, the latest deadline gives way first.
    order = sorted(running, key=lambda seq: seq.rank)
    num_kept = len(order)
    order += [seq for _, seq in work.unpromised if seq.state is SequenceState.RUNNING]
    order += [seq for seq in work.best_effort if seq.state is SequenceState.RUNNING]
    return order, num_kept


def _stakes(
    decodes: list[Due], batch: TimedBatchBuilder, limits: BatchLimits, now: float
) -> list[Stake]:
    """Return the stakes of all decodes whose deadline can still be met, soonest first."""
    if not decodes:
        return []
    alone = batch.seconds_of_decodes([decodes[0][1]])
    left = [(deadline - limits.guard_s - now, seq) for deadline, seq in decodes]
    stakes = [(seconds, _value(seq)) for seconds, seq in left if seconds >= alone]
    return stakes or [(alone, _value(left[0][1]))]


def _must_end_s(
    decodes: list[Due], decodes_s: float, stakes: list[Stake], limits: BatchLimits, now: float
) -> float:
    """Return how many seconds the decodes that must run may take.

    They are to be done before the guard time. If that leaves some of them out, they are to be done
    just in time, which may still be good enough.

    Args:
        decodes_s: seconds that all decodes take together.
    """
    if not stakes:
        return limits.longest_s
    soonest = stakes[0][0]
    latest = next((d - now for d, _ in decodes if d - now >= soonest), soonest)
    return max(soonest, min(decodes_s, latest))


def _worthwhile(work: Work, batch: TimedBatchBuilder, now: float) -> list[Sequence]:
    """Return the prefills for which promises may be endangered: those that can run in this batch
    and belong to a request that may still attain its SLO.
    """
    view = batch.builder.view
    has_slot = len(view.running) < view.max_num_seqs
    waiting = [seq for _, seq in work.prefills]
    waiting += [
        seq
        for deadline, seq in work.unpromised
        if (has_slot or seq.state is SequenceState.RUNNING)
        and not seq.is_decoding
        and now + batch.seconds_of_rest(seq) <= deadline
    ]
    return waiting


def _due_times(
    work: Work,
    stakes: list[Stake],
    decodes_s: float,
    batch: TimedBatchBuilder,
    limits: BatchLimits,
    now: float,
) -> tuple[float, float]:
    """Return the seconds until a token of this batch is due: at the risk that its prefills are
    worth, and at next to none.

    Args:
        decodes_s: seconds that the decodes take alone.
    """
    if not stakes:
        return math.inf, math.inf
    share = URGENT if work.unpromised else CALM
    waiting = _worthwhile(work, batch, now)
    due = _allowed_s(stakes, decodes_s, waiting, share, batch, limits)
    return due, _allowed_s(stakes, decodes_s, [], share, batch, limits)


def _allowed_s(
    stakes: list[Stake],
    least_s: float,
    waiting: list[Sequence],
    share: float,
    batch: TimedBatchBuilder,
    limits: BatchLimits,
) -> float:
    """Return the expected seconds that the batch may take for the sake of its decodes.

    Args:
        least_s: seconds that they take alone.
        waiting: sequences whose prefills the batch could do meanwhile.
        share: worth of these prefills, as a share of their value.
    """
    if batch.model is None:
        return stakes[0][0]
    if not waiting:
        return allowed_s(stakes, batch.model)
    drift, steep = batch.model.drift, batch.model.steepest
    tokens = sum(seq.num_uncomputed_tokens for seq in waiting)
    work_s = drift * steep.added(BatchShape(tokens=tokens))
    start_s = drift * steep.added(EAGER)
    return allowed_s(
        stakes,
        batch.model,
        gain_per_s=share * sum(map(_value, waiting)) / work_s,
        least_s=least_s,
        start_s=start_s,
        most_s=min(limits.longest_s, least_s + start_s + work_s),
    )


def _value(seq: Sequence) -> float:
    """Return an output's part in the value of its request."""
    return seq.request.value / seq.request.params.n


def _split_decodes(
    work: Work,
    batch: TimedBatchBuilder,
    limit: float,
    limits: BatchLimits,
    now: float,
    pace_s: float,
) -> tuple[list[Due], list[Due]]:
    """Return the decodes that must run now, and those that could also run in the next iteration.

    Args:
        pace_s: seconds until the first of them must come round again.
    """
    if not work.prefills:
        return work.decodes, []
    # The next iteration has to hold all those that skip this one, and prefills that end now.
    # It should also be as long as the tightest pace allows, since each one has a constant
    # cost: a decode that would cut it short runs now.
    everyone = batch.seconds_of_decodes([seq for _, seq in (*work.decodes, *work.prefills)])
    margin = 1.0 if batch.model is None else batch.model.bound(1, USUAL_RISK)
    following = max(margin * everyone + 2 * limits.guard_s, min(pace_s, limits.longest_s))
    horizon = now + max(limit, everyone) + following
    for i, (deadline, _) in enumerate(work.decodes):
        if deadline > horizon:
            return work.decodes[:i], work.decodes[i:]
    return work.decodes, []


def _with_drafts(
    paces: list[float], work: Work, candidates: Mapping[str, DraftCandidate]
) -> list[float]:
    """Return the seconds until each decode must come round again, which is later with drafts.

    Args:
        paces: seconds per token of each decode.
    """
    drafts = [candidates.get(seq.seq_id) for _, seq in work.decodes]
    return [
        pace if one is None else pace * cautious_tokens(one.acceptance, one.limit)
        for pace, one in zip(paces, drafts, strict=True)
    ]


def _prefill_promised(
    batch: TimedBatchBuilder, work: Work, limits: BatchLimits, limit: float, now: float
) -> float:
    """Run prefills under a promise, earliest deadline first.

    Args:
        limit: seconds that the batch may take.

    Returns:
        seconds until the first token of one of them is due that ends in this batch; inf if none
        ends in it.
    """
    due = math.inf
    for deadline, seq in work.prefills:
        if batch.is_full(limit):
            break
        # One that ends in this batch gets its first token at the batch's end: in time for the
        # guard time too, or else just in time, which may still be good enough.
        latest = deadline - now
        if batch.prefill(seq, min(limit, latest), whole=True, evict=True):
            soon = latest - limits.guard_s
            due = min(due, soon if batch.seconds <= soon else latest)
            limit = min(limit, due)
        else:
            batch.prefill(seq, limit, evict=True)
    return due


def _fill_up(
    batch: TimedBatchBuilder, work: Work, limits: BatchLimits, spare: float, calm: float, now: float
) -> float:
    """Run sequences that are promised nothing, and return the predicted seconds of best effort.

    Args:
        spare: seconds that the batch may take for the sake of sequences that may be in time.
        calm: seconds that it may take for the sake of best effort.
    """
    decodes = [(deadline, seq) for deadline, seq in work.unpromised if seq.is_decoding]
    prefills = [(deadline, seq) for deadline, seq in work.unpromised if not seq.is_decoding]
    batch.decodes([seq for _, seq in decodes], spare)
    stakes = _stakes(work.at_stake(decodes), batch, limits, now)
    if stakes:
        waiting = [seq for _, seq in prefills]
        decodes_s = batch.seconds_of_decodes([seq for _, seq in decodes])
        spare = min(spare, _allowed_s(stakes, decodes_s, waiting, URGENT, batch, limits))
    late = _prefill_unpromised(batch, work, prefills, limits, spare, now)
    return _best_effort(batch, work, limits, min(spare, calm), first=late)


def _prefill_unpromised(
    batch: TimedBatchBuilder,
    work: Work,
    prefills: list[Due],
    limits: BatchLimits,
    until: float,
    now: float,
) -> list[Sequence]:
    """Run prefills that may still be in time, by deadline, and return those that will not be."""
    room, late = _Room(batch, work, limits), []
    if limits.best_effort_s > 0:
        room.keep_for_best_effort(work)
    for deadline, seq in prefills:
        if batch.is_full(until):
            break
        if now + batch.seconds_of_rest(seq) > deadline:
            late.append(seq)
        elif seq.state is SequenceState.RUNNING:
            batch.prefill(seq, until)
        elif not room.has(seq):
            break  # else small ones would take whatever becomes free, for ever
        elif batch.prefill(seq, until):
            room.take(seq)
    return late


def _best_effort(
    batch: TimedBatchBuilder,
    work: Work,
    limits: BatchLimits,
    until: float,
    first: SequenceOf[Sequence] = (),
) -> float:
    """Run best effort until the batch takes ``until`` seconds, and return the predicted seconds of
    it.

    Args:
        first: other sequences that go before it.
    """
    before = batch.seconds
    scheduled = batch.builder.plan.num_scheduled_tokens
    todo = [seq for seq in (*first, *work.best_effort) if seq.seq_id not in scheduled]
    if batch.is_full(until):
        return 0.0
    decodes = [seq for seq in todo if seq.is_decoding]
    if not batch.decode_all(decodes, until):
        for seq in decodes:
            # Whether a batch is full takes as long to tell as running one more decode.
            if not batch.decode(seq, until) and batch.is_full(until):
                break
    if batch.is_full(until):
        return batch.seconds - before
    for seq in todo:
        if seq.state is SequenceState.RUNNING and not seq.is_decoding:
            batch.prefill(seq, until)
    room = _Room(batch, work, limits)
    for seq in todo:
        if seq.state is SequenceState.WAITING:
            if not room.has(seq) or not batch.prefill(seq, until):
                break
            room.take(seq)
    return batch.seconds - before


class _Room:
    """Blocks in which sequences without a promise may start."""

    def __init__(self, batch: TimedBatchBuilder, work: Work, limits: BatchLimits) -> None:
        self._limits = limits
        self._free = batch.builder.view.memory.num_free_blocks
        scheduled = batch.builder.plan.num_scheduled_tokens
        # Those that start in this batch hold no blocks yet.
        self._held = sum(
            len(seq.block_table) or limits.blocks_of(seq)
            for seq in (*work.best_effort, *(seq for _, seq in work.unpromised))
            if seq.block_table or seq.seq_id in scheduled
        )

    def keep_for_best_effort(self, work: Work) -> None:
        """Keep free what the first waiting sequence of best effort needs, because it is overdue."""
        first = next((s for s in work.best_effort if s.state is SequenceState.WAITING), None)
        if first is not None and self._held:
            self._held += self._limits.blocks_of(first)

    def has(self, seq: Sequence) -> bool:
        """Return True if a sequence fits. One sequence may always run while blocks are free."""
        left = self._limits.spare_blocks - self._held
        return self._limits.blocks_of(seq) <= (left if self._held else max(left, self._free))

    def take(self, seq: Sequence) -> None:
        self._held += self._limits.blocks_of(seq)
