"""One iteration's batch from deadlines: who runs, how many tokens, how long it may take.

The batch is as long as the nearest decode deadline allows, not of a fixed size. In order:

1. decodes that could not wait for the iteration after this one, earliest deadline first,
   and best effort as far as its share is overdue;
2. prefill chunks of admitted sequences, earliest deadline first;
3. the other decodes: ahead of schedule, so that they may skip an iteration (the credits of
   Scorpio, arXiv 2505.23022) but get what is left, which builds up credit again;
4. pending sequences, all but their last prompt token: their clock must not start before
   anyone promises to keep up with it;
5. best effort, decodes first, prefills in chunks.

Tokens are drafted for decodes that must run, where that leaves longer batches to the prefills
behind them, and with what time is left for all other decodes of the batch, as far as that
saves time or makes them faster (`minserve.planner.speculation`).

Best effort may preempt nobody; admitted sequences preempt best effort when blocks or slots
run out. Since all that was computed is lost then, best effort starts only in blocks that
promises have not held lately.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

from minserve.planner.acceptance import cautious_tokens
from minserve.planner.batch import BatchDraft
from minserve.planner.perf_model import BatchShape, PerfModel
from minserve.planner.plan import IterationPlan, PlannerView
from minserve.planner.speculation import (
    MOST_LAG,
    Drafting,
    Speculator,
    most_left_to_prefills,
    most_tokens_per_second,
    with_drafts,
)
from minserve.request import Sequence, SequenceState

Due = tuple[float, Sequence]


@dataclass(slots=True, kw_only=True)
class Work:
    """The sequences of one iteration, sorted into the roles above.

    Attributes:
        decodes, prefills: admitted sequences with their next deadline, earliest first.
            Prefills may be waiting still.
        pending: neither promised nor given up, by deadline.
        best_effort: the others, in rank order.
    """

    decodes: list[Due] = field(default_factory=list)
    prefills: list[Due] = field(default_factory=list)
    pending: list[Due] = field(default_factory=list)
    best_effort: list[Sequence] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """How long an iteration may take.

    Attributes:
        longest_s: where no decode is due; what a new arrival may have to wait.
        guard_s: how long before its deadline a token must be ready, so that it also
            reaches the client in time.
        best_effort_s: of this iteration, what best effort gets before admitted prefills;
            the nearest decode deadline stands all the same.
        best_effort_blocks: that best effort may hold, so that promises seldom take them away
            again, with all that was computed.
        blocks_of: that a sequence will come to hold.
    """

    longest_s: float
    guard_s: float
    best_effort_s: float = 0.0
    best_effort_blocks: float = math.inf
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
        model: without one nothing is timed and the token budget is the only bound.
        now: seconds on the engine's monotonic clock.
        drafting: ``None`` drafts nothing.
    """
    order, num_kept = _order(work)
    batch = _TimedBatch(BatchDraft(view, order=order, num_kept=num_kept), model)
    slack = _slack(work.decodes, batch, limits, now)
    limit = min(slack / batch.margin, limits.longest_s)
    # Seconds until a token of this batch is due.
    due = slack / batch.margin if work.decodes else math.inf

    speculators: dict[str, Speculator] = {}
    if drafting is not None and work.prefills:
        speculators = drafting.speculators_for_prefills(seq for _, seq in work.decodes)
    must, may = _split_decodes(work, batch, limit, limits, now, speculators)
    run = [seq for _, seq in must if batch.decode(seq, slack)]
    if speculators:
        own = [one for seq in run if (one := speculators.get(seq.seq_id)) is not None]
        needed = drafting.for_prefills.needed
        _draft_for_prefills(batch, own, len(work.decodes), limit, limits.guard_s, needed)
    given = 0.0
    if limits.best_effort_s > 0:
        overdue = batch.seconds + limits.best_effort_s
        given = _best_effort(batch, work.best_effort, min(overdue, limit), limits)
    for deadline, seq in work.prefills:
        if batch.is_full(limit):
            break
        # One that ends in this batch gets its first token at the batch's end: in time for the
        # guard time too, or else just in time, which may still be good enough.
        latest = deadline - now
        if batch.prefill(seq, min(limit, latest), whole=True, evict=True):
            soon = latest - limits.guard_s
            until = soon if batch.seconds <= soon else latest
            limit, due = min(limit, until), min(due, until)
        else:
            batch.prefill(seq, limit, evict=True)
    for _, seq in may:
        batch.decode(seq, limit)
    given += _fill_up(batch, work, limits, limit)
    if drafting is not None and model is not None:
        _draft_with_the_rest(batch, view, len(work.decodes), drafting, limit, limits.guard_s)
    plan = batch.draft.plan
    plan.shape, plan.best_effort_s = batch.shape, given
    # A batch of plain decodes is as short as can be, however late it begins.
    if batch.num_prefills or plan.speculation or plan.catch_up:
        plan.start_by_s = now + max(0.0, due - batch.seconds) + limits.guard_s
    return plan


def _order(work: Work) -> tuple[list[Sequence], int]:
    """Who runs, the last to be preempted first, and how many of them stand under a promise."""
    running = [seq for _, seq in work.decodes]
    running += [seq for _, seq in work.prefills if seq.state is SequenceState.RUNNING]
    # Of the admitted, the latest deadline gives way first.
    order = sorted(running, key=lambda seq: seq.rank)
    num_kept = len(order)
    order += [seq for _, seq in work.pending if seq.state is SequenceState.RUNNING]
    order += [seq for seq in work.best_effort if seq.state is SequenceState.RUNNING]
    return order, num_kept


class _TimedBatch:
    """A `BatchDraft` that also knows how long the batch will take."""

    def __init__(self, draft: BatchDraft, model: PerfModel | None) -> None:
        self.draft = draft
        self.model = model
        self.margin = 1.0 if model is None else model.margin
        self.num_prefills = 0
        self._tokens = self._seqs = self._context = self._pairs = 0
        self._draft_steps = self._draft_tokens = 0
        drift = 1.0 if model is None else model.drift
        pieces = () if model is None else model.pieces
        # Per piece: seconds of one decode, and of each token of its context.
        self._per_decode = [
            (
                drift * (p.tokens + p.seqs),
                drift * (p.context_tokens + p.attention_pairs),
            )
            for p in pieces
        ]
        self._sums = [drift * p.base for p in pieces]

    @property
    def seconds(self) -> float:
        """Predicted seconds of what is scheduled so far."""
        return max(self._sums, default=0.0) if self._seqs else 0.0

    def is_full(self, limit: float) -> bool:
        """True where not one more token fits within the limit."""
        if not self._seqs:
            return False
        least = (total + one for total, (one, _) in zip(self._sums, self._per_decode, strict=True))
        return self.draft.budget <= 0 or max(least, default=0.0) > limit

    def seconds_of_decodes(self, seqs: SequenceOf[Sequence]) -> float:
        """Predicted seconds of a batch of these decodes alone."""
        if self.model is None or not seqs:
            return 0.0
        context = sum(len(seq.token_ids) for seq in seqs)
        return self.model.predict(BatchShape(len(seqs), len(seqs), context, context))

    def decode(self, seq: Sequence, limit: float) -> bool:
        """Run one token, where the batch then still ends within the limit."""
        context = len(seq.token_ids)
        sums = [
            total + one + each * context
            for total, (one, each) in zip(self._sums, self._per_decode, strict=True)
        ]
        # The first one runs however late it is: a batch of nobody helps nobody.
        if self._seqs and sums and max(sums) > limit:
            return False
        if self.draft.is_preempted(seq) or not self.draft.schedule(seq, 1):
            return False
        self._sums = sums
        self._tokens += 1
        self._seqs += 1
        self._context += context
        self._pairs += context
        return True

    def prefill(
        self,
        seq: Sequence,
        limit: float,
        *,
        whole: bool = False,
        evict: bool = False,
        hold: bool = False,
    ) -> int:
        """Run a chunk as long as the limit allows, of a running or a waiting sequence.

        Args:
            whole: all that is left, or nothing.
            evict: preempt best effort to start it.
            hold: stop short of the last token, whose run would sample the next.
        """
        if self.draft.budget <= 0 or self.draft.is_preempted(seq) or self.draft.awaits_sibling(seq):
            return 0
        hit = (
            self.draft.view.memory.cached_prefix(seq)
            if seq.state is SequenceState.WAITING
            else None
        )
        start = seq.num_computed_tokens if hit is None else hit.num_tokens
        most = seq.num_tokens - start - (1 if hold else 0)
        wanted = most
        if self.model is not None:
            fitting = self.model.max_tokens_within(limit, self.shape, start)
            most = min(most, fitting if self._seqs else max(fitting, 1))
        if most <= 0 or (whole and most < wanted):
            return 0
        if hit is not None:
            num_tokens = self.draft.admit(seq, most=most, whole=whole, evict=evict, hit=hit)
        else:
            num_tokens = self.draft.schedule(seq, most, whole=whole)
        if num_tokens:
            self._add_chunk(start, num_tokens)
        return num_tokens

    @property
    def shape(self) -> BatchShape:
        """Of what is scheduled so far."""
        return BatchShape(
            self._tokens,
            self._seqs,
            self._context,
            self._pairs,
            self._draft_steps,
            self._draft_tokens,
        )

    def speculate(
        self, speculators: SequenceOf[Speculator], lengths: SequenceOf[int], limit: float
    ) -> None:
        """Draft up to so many tokens for scheduled decodes, as far as blocks, budget and the
        limit allow.
        """
        if self.model.predict(with_drafts(self.shape, speculators, lengths)) > limit:
            lengths = self._fitting(speculators, lengths, limit)
        granted = [
            self.draft.speculate(one.seq, length) if length else 0
            for one, length in zip(speculators, lengths, strict=True)
        ]
        if any(granted):
            self._grow(with_drafts(self.shape, speculators, granted))

    def _fitting(
        self, speculators: SequenceOf[Speculator], lengths: SequenceOf[int], limit: float
    ) -> list[int]:
        """As much of these lengths as fits within the limit, first come, first served."""
        shape, fitting = self.shape, []
        for one, length in zip(speculators, lengths, strict=True):
            while length and self.model.predict(with_drafts(shape, [one], [length])) > limit:
                length -= 1
            shape = with_drafts(shape, [one], [length])
            fitting.append(length)
        return fitting

    def catch_up(self, one: Speculator, limit: float) -> None:
        """Let the draft model run what it lacks of a sequence, as far as the limit allows."""
        token_s = self.model.drift * max(piece.draft_tokens for piece in self.model.pieces)
        shape = replace(self.shape, draft_steps=max(self._draft_steps, 1))
        left = limit - self.model.predict(shape)
        if left <= 0:
            return
        num_tokens = one.lag if token_s == 0 else min(one.lag, int(left / token_s))
        if num_tokens > 0:
            self.draft.plan.catch_up[one.seq.seq_id] = num_tokens
            self._grow(replace(shape, draft_tokens=self._draft_tokens + num_tokens))

    def _add_chunk(self, start: int, num_tokens: int) -> None:
        chunk, shape = BatchShape.of([(start, num_tokens)]), self.shape
        self.num_prefills += 1
        self._grow(
            replace(
                shape,
                tokens=shape.tokens + num_tokens,
                seqs=shape.seqs + 1,
                context_tokens=shape.context_tokens + chunk.context_tokens,
                attention_pairs=shape.attention_pairs + chunk.attention_pairs,
            )
        )

    def _grow(self, shape: BatchShape) -> None:
        """The batch has this shape now."""
        self._tokens, self._seqs, self._context, self._pairs = (
            shape.tokens,
            shape.seqs,
            shape.context_tokens,
            shape.attention_pairs,
        )
        self._draft_steps, self._draft_tokens = shape.draft_steps, shape.draft_tokens
        if self.model is not None:
            drift = self.model.correction(shape)
            self._sums = [drift * piece.seconds(shape) for piece in self.model.pieces]


def _slack(decodes: list[Due], batch: _TimedBatch, limits: BatchLimits, now: float) -> float:
    """Seconds until the first decode deadline that can still be met."""
    if not decodes:
        return limits.longest_s * batch.margin
    alone = batch.seconds_of_decodes([decodes[0][1]])
    for deadline, _ in decodes:
        slack = deadline - limits.guard_s - now
        if slack >= alone:
            return slack
    return alone


def _split_decodes(
    work: Work,
    batch: _TimedBatch,
    limit: float,
    limits: BatchLimits,
    now: float,
    speculators: Mapping[str, Speculator],
) -> tuple[list[Due], list[Due]]:
    """Decodes that must run now, and those that could also run in the next iteration."""
    if not work.prefills:
        return work.decodes, []
    # The next iteration has to hold all those that skip this one, and prefills that end now.
    # It should also be as long as the tightest pace allows, since each one has a constant
    # cost: whoever would cut it short runs now.
    everyone = batch.seconds_of_decodes([seq for _, seq in (*work.decodes, *work.prefills)])
    pace = min((_pace_s(seq, speculators) for _, seq in work.decodes), default=0.0)
    following = max(batch.margin * everyone + 2 * limits.guard_s, min(pace, limits.longest_s))
    horizon = now + max(limit, everyone) + following
    for i, (deadline, _) in enumerate(work.decodes):
        if deadline > horizon:
            return work.decodes[:i], work.decodes[i:]
    return work.decodes, []


def _pace_s(seq: Sequence, speculators: Mapping[str, Speculator]) -> float:
    """Seconds until a decode must come round again, which with drafts is later."""
    one = speculators.get(seq.seq_id)
    if one is None:
        return seq.progress.tpot_s
    return cautious_tokens(one.acceptance, one.limit) * seq.progress.tpot_s


def _fill_up(batch: _TimedBatch, work: Work, limits: BatchLimits, limit: float) -> float:
    """Run pending sequences and best effort; returns the predicted seconds of best effort."""
    # Neither may use up the credit of admitted decodes.
    pace = min((seq.progress.tpot_s for _, seq in work.decodes), default=limit)
    spare = min(limit, pace / batch.margin)
    hold = bool(work.decodes or work.prefills)
    for _, seq in work.pending:
        if batch.is_full(spare):
            break
        batch.prefill(seq, spare, hold=hold)
    return _best_effort(batch, work.best_effort, spare, limits)


def _best_effort(
    batch: _TimedBatch, sequences: list[Sequence], until: float, limits: BatchLimits
) -> float:
    """Run best effort until the batch takes so long; returns the predicted seconds of it."""
    before = batch.seconds
    todo = [seq for seq in sequences if seq.seq_id not in batch.draft.plan.num_scheduled_tokens]
    for seq in todo:
        if batch.is_full(until):
            return batch.seconds - before
        if seq.is_decoding:
            batch.decode(seq, until)
    for seq in todo:
        if seq.state is SequenceState.RUNNING and not seq.is_decoding:
            batch.prefill(seq, until)
    held = sum(len(seq.block_table) for seq in sequences)
    for seq in todo:
        if seq.state is not SequenceState.WAITING:
            continue
        needed, room = limits.blocks_of(seq), limits.best_effort_blocks - held
        # One of them may always run, while blocks are free.
        if not held:
            room = max(room, batch.draft.view.memory.num_free_blocks)
        if needed > room or not batch.prefill(seq, until):
            break
        held += needed
    return batch.seconds - before


def _draft_for_prefills(
    batch: _TimedBatch,
    speculators: list[Speculator],
    num_decodes: int,
    limit: float,
    guard_s: float,
    needed: bool,
) -> None:
    """Draft for the decodes of a batch such that most is left to prefills; where drafts are
    needed for the decodes' own promises, all that was planned.
    """
    ready = []
    for one in speculators:
        if one.lag > MOST_LAG:
            batch.catch_up(one, (batch.seconds + limit) / 2)
        else:
            ready.append(one)
    if needed:
        lengths = tuple(one.limit for one in ready)
    else:
        lengths = most_left_to_prefills(batch.model, batch.shape, num_decodes, ready, guard_s)
    batch.speculate(ready, lengths, limit)


def _draft_with_the_rest(
    batch: _TimedBatch,
    view: PlannerView,
    num_promised: int,
    drafting: Drafting,
    limit: float,
    guard_s: float,
) -> None:
    """Draft for the decodes that do not yet, as far as time is left.

    Whoever is done sooner holds its blocks for less long and comes round less often.

    Args:
        num_promised: decodes under a promise, in this batch or not.
    """
    plan = batch.draft.plan
    decodes = [
        seq for seq in view.running if seq.seq_id in plan.num_scheduled_tokens and seq.is_decoding
    ]
    if not batch.num_prefills:
        # Whoever drafted for the sake of prefills has done so, even if none of them fits now.
        if not (plan.speculation or plan.catch_up):
            _draft_for_speed(batch, decodes, drafting, limit)
        return
    own = [
        one
        for seq in decodes
        if seq.seq_id not in plan.speculation
        and seq.seq_id not in plan.catch_up
        and (one := drafting.speculator(seq)).limit > 0
    ]
    num_decodes = max(num_promised, len(decodes))
    _draft_for_prefills(batch, own, num_decodes, limit, guard_s, needed=False)


def _draft_for_speed(
    batch: _TimedBatch, decodes: list[Sequence], drafting: Drafting, limit: float
) -> None:
    """Draft for the decodes of a batch such that it brings most tokens per second."""
    speculators = [one for seq in decodes if (one := drafting.speculator(seq)).limit > 0]
    # Whoever must catch up first is counted as if it had, to see what that is worth.
    ready = [one if one.lag <= MOST_LAG else replace(one, lag=0) for one in speculators]
    plain_s, token_s = batch.seconds, batch.model.drift * batch.model.pieces[0].draft_tokens
    best = most_tokens_per_second(batch.model, batch.shape, len(decodes), ready, limit)
    drafting.declined = bool(speculators) and not any(best.lengths)
    lengths = []
    for one, length in zip(speculators, best.lengths, strict=True):
        lengths.append(length if one.lag <= MOST_LAG else 0)
        if length == 0 or one.lag <= MOST_LAG:
            continue
        saved_s = plain_s * (1.0 - 1.0 / best.gain) / len(decodes)
        if drafting.remaining(one.seq) * saved_s >= one.lag * token_s:
            # An iteration at most doubles for it.
            batch.catch_up(one, min(limit, 2.0 * plain_s))
    batch.speculate(speculators, lengths, limit)
