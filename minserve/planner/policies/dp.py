"""Planning by promises: whoever's SLOs can be kept runs, chosen by a dynamic program.

After SLOs-Serve (arXiv 2504.08784), with what it leaves open: requests that do not fit are served
by deadline with what promises leave, and may be promised later; doomed ones are relegated instead
of dooming the others; output lengths are estimated; memory and time are released at predicted ends.

A request is promised its SLO once the prefill of one of its outputs starts; until then every
round of admission decides anew. Rounds take place when a sequence comes or goes, and every 0.1 s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from collections.abc import Set
from dataclasses import dataclass, field, replace

from minserve.planner.admission.dynamic_program import Admission, admit
from minserve.planner.admission.outlook import Outlook
from minserve.planner.admission.prefill_rates import PrefillRates
from minserve.planner.admission.review import ReviewResult, ReviewSettings, review
from minserve.planner.admission.timeline import Candidate
from minserve.planner.batching.batch_length import USUAL_RISK
from minserve.planner.batching.draft_lengths import NO_DRAFTS, Drafting, DraftsForPrefills
from minserve.planner.batching.formation import BatchLimits, Work, form_batch
from minserve.planner.plan import IterationPlan, PlannerView
from minserve.planner.policies.base import Planner
from minserve.planner.predict.acceptance import AcceptanceEstimator
from minserve.planner.predict.arrivals import ArrivalSlack
from minserve.planner.predict.lengths import LengthEstimator, QuantileLengths
from minserve.planner.predict.perf_model import BatchShape, PerfModel
from minserve.request import Sequence, SequenceState, by_rank
from minserve.slo.objectives import Standing

REVIEW_EVERY_S = 0.1
# An iteration in which no decode is due lasts at least as long as so many lone decodes, each with
# its guard time: what an iteration costs in any case is spread over it. It lasts longer where
# nobody decodes, and nobody like those who came lately would be late for having to wait for it.
LONGEST_ITERATION = 5.0
# Beside decodes that are promised nothing an iteration lasts up to so many times as long as they
# take alone: prefills of best effort get three quarters of the time, since large batches cost less
# per token.
STRETCH = 4.0
# Of what the most urgent of remembered arrivals could wait, so that those which come at once with
# it, and the decodes, find time too.
SLACK_SHARE = 0.5
# How long it is remembered that promises held much memory. Longer than outputs take: best
# effort that starts in a lull should end before the next rush.
MEMORY_FADE_S = 60.0
# Of the pool, at most, what best effort leaves free beside that: for a larger rush than those
# before it, and for prefixes that stay cached until somebody asks for them again.
SPARE_MEMORY = 1 / 3
# A token still has to be detokenized, written and read.
GUARD_S = 0.003
# Where drafts do not pay, they are not weighed again for so many iterations of the same
# sequences: for a tiny model weighing them costs as much as they could bring.
REST = 16


@dataclass(slots=True)
class _LastReview:
    """What the newest round of admission found, and holds until the next.

    Attributes:
        chosen: who is served, by sequence id.
        drafts: what drafting is worth while prefills wait.
        seen: ids of everybody it knew.
        reviewed_s: when it took place.
        rest: iterations for which drafts are not weighed; below 0 they are.
    """

    chosen: dict[str, None] = field(default_factory=dict)
    drafts: DraftsForPrefills = NO_DRAFTS
    seen: list[str] = field(default_factory=list)
    reviewed_s: float = -math.inf
    rest: int = 0


class PromisedMemory:
    """The most blocks that sequences under a promise held lately.

    Attributes:
        most: fades away, by half in 0.7 `MEMORY_FADE_S`.
    """

    def __init__(self) -> None:
        self.most = 0.0
        self._seen_s = 0.0

    def see(self, num_blocks: int, now: float) -> None:
        """So many are held now."""
        faded = self.most * math.exp(-max(0.0, now - self._seen_s) / MEMORY_FADE_S)
        self.most, self._seen_s = max(float(num_blocks), faded), now


class DpPlanner(Planner):
    """Admission by `minserve.planner.admission.dynamic_program`, batches by `minserve.planner.batching.formation`.

    Args:
        model: without one nothing can be promised and every sequence is best effort.
        lengths: guesses output lengths.
        best_effort_share: of the device's time, at least, in [0, 1).
    """

    name = "dp"

    def __init__(
        self,
        model: PerfModel | None = None,
        *,
        lengths: LengthEstimator | None = None,
        best_effort_share: float = 0.05,
    ) -> None:
        super().__init__(model)
        self.lengths = lengths or QuantileLengths()
        self.best_effort_share = best_effort_share
        self.acceptance = AcceptanceEstimator()
        self._round = self._round_before = _LastReview()
        self._cached: dict[str, int] = {}
        # Best effort's account, without the plan under way.
        self._owed_s = 0.0
        self._promised = PromisedMemory()
        self._arrivals = ArrivalSlack()
        self._under_way: IterationPlan | None = None

    @staticmethod
    def choose(
        candidates: SequenceOf[Candidate], outlook: Outlook, rates: PrefillRates
    ) -> Admission:
        """Who of the candidates is served."""
        return admit(candidates, outlook, rates)

    def finished(self, seq: Sequence) -> None:
        self.lengths.finished(seq)

    def verified(self, seq: Sequence, num_drafted: int, num_accepted: int) -> None:
        self.acceptance.verified(seq, num_drafted, num_accepted)

    def started(self, plan: IterationPlan) -> None:
        super().started(plan)
        self._under_way = plan

    def discarded(self) -> None:
        self._round = self._round_before

    def observe(self, plan: IterationPlan, seconds: float) -> None:
        super().observe(plan, seconds)
        self._owed_s = self._owed_after(plan, seconds)
        self._under_way = None

    def _owed_now(self) -> float:
        """What best effort is owed when the plan under way, if there is one, has been carried out."""
        if self._under_way is None:
            return self._owed_s
        return self._owed_after(self._under_way, self._under_way.predicted_s or 0.0)

    def _owed_after(self, plan: IterationPlan, seconds: float) -> float:
        """What best effort is owed once a plan was carried out in so many seconds."""
        more = self.best_effort_share * seconds if plan.best_effort_waits else 0.0
        return max(0.0, self._owed_s + more - plan.best_effort_s)

    def _plan(self, view: PlannerView, now: float) -> IterationPlan:
        self._round_before, self._round = self._round, replace(self._round)
        result = ReviewResult()
        broken = {
            seq.seq_id
            for seq in (*view.running, *view.waiting)
            if seq.progress is not None and seq.progress.is_broken(now)
        }
        is_due = self.model is not None and self._is_due(view, now)
        if is_due:
            result = self._review(view, now, broken)
        work = self._sort(view, result, broken)
        drafting = None
        self._round.rest -= 1
        if view.speculation is not None and self.model is not None and self._round.rest < 0:
            drafting = Drafting(
                view.speculation, self.acceptance, self.lengths.remaining, self._round.drafts
            )
        held = sum(len(seq.block_table) for _, seq in (*work.decodes, *work.prefills))
        self._promised.see(held, now)
        limits = self._limits(work, view, now)
        plan = form_batch(view, work, self.model, limits, now, drafting)
        plan.best_effort_waits = any(
            seq.seq_id not in plan.num_scheduled_tokens for seq in work.best_effort
        )
        if drafting is not None and drafting.declined:
            self._round.rest = REST
        plan.relegate, plan.reject = list(result.relegate), result.reject
        if is_due:
            plan.declined = [
                seq.seq_id
                for _, seq in work.unpromised
                if seq.state is SequenceState.WAITING
                and seq.standing is Standing.PENDING
                and seq.seq_id not in result.relegate
            ]
        plan.admit = _newly_promised(work, plan)
        return plan

    def _is_due(self, view: PlannerView, now: float) -> bool:
        """True where someone came or went since the last round, or that is 0.1 s ago."""
        ids = [seq.seq_id for seq in view.waiting]
        ids += [seq.seq_id for seq in view.running]
        last = self._round
        if ids == last.seen and now - last.reviewed_s < REVIEW_EVERY_S:
            return False
        for seq_id in self._cached.keys() - ids:
            del self._cached[seq_id]
        self.acceptance.keep_only(ids)
        if ids != last.seen:
            last.rest = 0
            self._see_arrivals(view, set(last.seen), now)
        last.seen, last.reviewed_s = ids, now
        return True

    def _see_arrivals(self, view: PlannerView, known: set[str], now: float) -> None:
        """Note who has come since the last round, which knew those ids."""
        for seq in view.waiting:
            if self.model is not None and seq.seq_id not in known:
                self._arrivals.see(seq, self.model, now)

    def _review(self, view: PlannerView, now: float, broken: Set[str]) -> ReviewResult:
        def cached_tokens(seq: Sequence) -> int:
            # Looked up once per wait: it costs hashing the prompt.
            if seq.seq_id not in self._cached:
                self._cached[seq.seq_id] = view.memory.cached_prefix(seq).num_tokens
            return self._cached[seq.seq_id]

        settings = ReviewSettings(
            window_s=self._longest_s(),
            guard_s=GUARD_S,
            best_effort_share=self.best_effort_share,
            max_speculation=0 if view.speculation is None else view.speculation.max_tokens,
        )
        result = review(
            view,
            now,
            self.model,
            self.lengths,
            cached_tokens,
            self.choose,
            settings,
            self.acceptance,
            broken,
            self._round.chosen,
        )
        self._round.chosen, self._round.drafts = result.chosen, result.drafts
        return result

    def _sort(self, view: PlannerView, result: ReviewResult, broken: set[str]) -> Work:
        """Give every sequence its role in this iteration; relegate requests whose SLO is broken.

        Args:
            broken: ids of the sequences whose SLO is broken; their siblings are added.
        """
        everyone = (*view.running, *view.waiting)
        # All outputs of a request share its fate.
        requests = {
            seq.request.request_id
            for seq in everyone
            if seq.request.params.n > 1 and seq.seq_id in broken
        }
        if requests:
            broken |= {seq.seq_id for seq in everyone if seq.request.request_id in requests}
        work, chosen = Work(), self._round.chosen
        lone_s = 0.0 if self.model is None else self.model.predict(BatchShape.of([(0, 1)]))
        for seq in everyone:
            seq_id, progress = seq.seq_id, seq.progress
            if seq_id in result.reject:
                continue
            if progress is None or self.model is None:
                work.best_effort.append(seq)
            elif seq_id in broken:
                if seq.standing is not Standing.BEST_EFFORT:
                    result.relegate[seq_id] = None
                work.best_effort.append(seq)
            elif seq_id in result.relegate or not (
                seq_id in chosen or seq.standing is Standing.ADMITTED
            ):
                # At a pace that not even a lone decode keeps nothing is in time.
                if progress.tpot_s < lone_s:
                    work.best_effort.append(seq)
                else:
                    work.unpromised.append((progress.next_deadline_s, seq))
            elif seq.is_decoding:
                work.decodes.append((progress.next_deadline_s, seq))
            else:
                work.prefills.append((progress.next_deadline_s, seq))
        for role in (work.decodes, work.prefills, work.unpromised):
            role.sort(key=_deadline)
        work.best_effort.sort(key=by_rank)
        return work

    def _longest_s(self) -> float:
        return LONGEST_ITERATION * (self.model.predict(BatchShape.of([(0, 1)])) + GUARD_S)

    def _limits(self, work: Work, view: PlannerView, now: float) -> BatchLimits:
        if self.model is None:
            return BatchLimits(longest_s=math.inf, guard_s=GUARD_S)
        # Saved up until it is worth an iteration: a decode, or a few prefill tokens.
        longest_s = self._longest_s()
        owed = self._owed_now() if work.best_effort else 0.0
        enough = owed >= longest_s / LONGEST_ITERATION
        memory, promised = view.memory, self._promised.most
        # Where little is promised, little is kept free.
        kept = promised + min(promised, SPARE_MEMORY * memory.num_blocks)
        return BatchLimits(
            longest_s=max(longest_s, self._unwatched_s(work, view, now)),
            guard_s=GUARD_S,
            best_effort_s=min(owed, longest_s / 2) if enough else 0.0,
            spare_blocks=memory.num_blocks - kept,
            blocks_of=lambda seq: (
                -(-(seq.num_tokens + self.lengths.remaining(seq)) // memory.block_size)
            ),
        )

    def _unwatched_s(self, work: Work, view: PlannerView, now: float) -> float:
        """How long an iteration may last for the sake of requests that are still to come; 0 where
        one to which more may be owed waits for it already.
        """
        decodes = [seq for seq in view.running if seq.is_decoding]
        if not decodes:
            longest_s = self.model.predict(BatchShape.of([(0, view.token_budget)], eager=True))
            slack_s = self._arrivals.least_s
        elif work.decodes or work.prefills or work.unpromised:
            return 0.0
        else:
            alone = BatchShape.of([(seq.num_computed_tokens, 1) for seq in decodes])
            longest_s = STRETCH * self.model.predict(alone)
            slack_s = SLACK_SHARE * self._arrivals.least_remembered_s(now) - GUARD_S
        return min(longest_s, slack_s / self.model.bound(1, USUAL_RISK))


def _newly_promised(work: Work, plan: IterationPlan) -> list[str]:
    """Ids of sequences that are promised their SLO now that one of their request's runs."""
    chosen = [
        seq for _, seq in (*work.prefills, *work.decodes) if seq.standing is not Standing.ADMITTED
    ]
    started = {
        seq.request.request_id
        for seq in chosen
        if seq.state is SequenceState.RUNNING or seq.seq_id in plan.num_scheduled_tokens
    }
    return [seq.seq_id for seq in chosen if seq.request.request_id in started]


def _deadline(due: tuple[float, Sequence]) -> float:
    return due[0]
