"""`PromisingPlanner`: the base of the policies that promise SLOs.

It works after SLOs-Serve (arXiv 2504.08784) and adds what that leaves open. Requests that do not
fit are served by deadline with what promises leave, and may be promised later. A request that would
doom others is given up instead. Output lengths are estimated. Memory and time are released at
predicted ends.

A request is promised its SLO once the prefill of one of its outputs starts; until then every round
of admission decides anew (`minserve.planner.admission.rounds`).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Set
from collections.abc import Sequence as SequenceOf
from typing import Protocol

from minserve.blocks import blocks_for
from minserve.planner.admission.outlook import Outlook
from minserve.planner.admission.prefill_rates import PrefillRates
from minserve.planner.admission.review import ReviewResult, ReviewSettings, review
from minserve.planner.admission.rounds import AdmissionRounds
from minserve.planner.admission.timeline import Admission, Candidate
from minserve.planner.batching.batch_length import USUAL_RISK
from minserve.planner.batching.best_effort import BestEffortAccount, PromisedMemory
from minserve.planner.batching.draft_lengths import Drafting
from minserve.planner.batching.formation import BatchLimits, Work, form_batch
from minserve.planner.batching.timed_batch_builder import decodes_alone
from minserve.planner.plan import IterationPlan, PlannerView
from minserve.planner.policies.base import Planner, PlannerSettings
from minserve.planner.predict.acceptance import AcceptanceEstimator
from minserve.planner.predict.arrivals import ArrivalSlack
from minserve.planner.predict.lengths import LengthEstimator, QuantileLengths
from minserve.planner.predict.pacing import Paces
from minserve.planner.predict.perf_model import BatchShape, PerfModel
from minserve.request import Sequence, SequenceState, by_rank
from minserve.slo.objectives import Standing

# An iteration in which no decode is due lasts at least as long as so many lone decodes, each with
# its guard time: what an iteration costs in any case is spread over it. It lasts longer where
# nothing decodes, and no request like those that came lately would be late for having to wait.
LONGEST_ITERATION = 5.0
# Beside decodes that are promised nothing an iteration lasts up to so many times as long as they
# take alone: prefills of best effort get three quarters of the time, since large batches cost less
# per token.
STRETCH = 4.0
# Of what the most urgent of remembered arrivals could wait, so that those which come at once with
# it, and the decodes, find time too.
SLACK_SHARE = 0.5
# A token still has to be detokenized, written and read.
GUARD_S = 0.003


class FormBatch(Protocol):
    """A function that decides what a batch holds, such as `form_batch`."""

    def __call__(
        self,
        view: PlannerView,
        work: Work,
        model: PerfModel | None,
        limits: BatchLimits,
        now: float,
        drafting: Drafting | None = None,
    ) -> IterationPlan: ...


class PromisingPlanner(Planner):
    """A planner that promises SLOs. A policy writes `choose`, and may take another `form`.

    From one plan to the next it remembers the newest round of admission, the time that best effort
    is owed, the memory that promises held, how long recent arrivals could have waited, and what it
    learned of output lengths and of drafts. Otherwise a plan depends on the view alone.

    Args:
        model: the performance model. Without one nothing is promised, and every sequence is best
            effort.
        lengths: guesses output lengths.
        best_effort_share: the least share of the device's time for best effort, in [0, 1).

    Attributes:
        form: the function that decides what a batch holds.
    """

    promises = True
    token_budget = 8192
    form: FormBatch = staticmethod(form_batch)

    def __init__(
        self,
        model: PerfModel | None = None,
        *,
        lengths: LengthEstimator | None = None,
        best_effort_share: float = 0.05,
    ) -> None:
        super().__init__(model)
        self.lengths = lengths or QuantileLengths()
        self.acceptance = AcceptanceEstimator()
        self._rounds = AdmissionRounds()
        self._account = BestEffortAccount(best_effort_share)
        self._promised = PromisedMemory()
        self._arrivals = ArrivalSlack()

    @classmethod
    def create(cls, settings: PlannerSettings) -> PromisingPlanner:
        cls.check_chunks(settings)
        return cls(
            settings.model,
            lengths=settings.lengths,
            best_effort_share=settings.best_effort_share,
        )

    @abstractmethod
    def choose(
        self, candidates: SequenceOf[Candidate], outlook: Outlook, rates: PrefillRates
    ) -> Admission:
        """Return the candidates that are admitted."""

    @property
    def best_effort_owed_s(self) -> float:
        """Seconds that best effort is owed once the plan under way has been carried out."""
        return self._account.owed_s

    @property
    def paces(self) -> Paces:
        """What deadlines of whole outputs ask for, by the newest round of admission."""
        return self._rounds.paces

    def finished(self, seq: Sequence) -> None:
        self.lengths.finished(seq)

    def verified(self, seq: Sequence, num_drafted: int, num_accepted: int) -> None:
        self.acceptance.verified(seq, num_drafted, num_accepted)

    def started(self, plan: IterationPlan) -> None:
        super().started(plan)
        self._account.started(plan)

    def discarded(self) -> None:
        self._rounds.discard()

    def observe(self, plan: IterationPlan, seconds: float) -> None:
        super().observe(plan, seconds)
        self._account.observe(plan, seconds)

    def _plan(self, view: PlannerView, now: float) -> IterationPlan:
        self._rounds.begin_plan()
        everyone = (*view.running, *view.waiting)
        broken = {
            seq.seq_id
            for seq in everyone
            if seq.progress is not None and seq.progress.is_broken(now)
        }
        result = ReviewResult()
        model = self.model
        newcomers = None if model is None else self._rounds.newcomers(view, now)
        if model is not None and newcomers is not None:
            self.acceptance.keep_only(self._rounds.seen)
            result = self.review(view, now, model, broken)
            self._rounds.decided(result)
            for seq in view.waiting if newcomers else ():
                if seq.seq_id in newcomers:
                    self._arrivals.see(seq, result.paces, model, now)
        work = self.roles(view, now, result, broken)
        drafting = self._drafting(view)
        held = sum(len(seq.block_table) for _, seq in (*work.decodes, *work.prefills))
        self._promised.see(held, now)
        plan = self.form(view, work, self.model, self.limits(work, view, now), now, drafting)
        plan.best_effort_waits = any(
            seq.seq_id not in plan.num_scheduled_tokens for seq in work.best_effort
        )
        if drafting is not None and drafting.declined:
            self._rounds.rest_from_drafts()
        plan.relegate, plan.reject = list(result.relegate), result.reject
        if newcomers is not None:
            plan.declined = [
                seq.seq_id
                for _, seq in work.unpromised
                if seq.state is SequenceState.WAITING
                and seq.standing is Standing.PENDING
                and seq.seq_id not in result.relegate
            ]
        plan.admit = _newly_promised(work, plan)
        return plan

    def review(
        self, view: PlannerView, now: float, model: PerfModel, broken: Set[str]
    ) -> ReviewResult:
        """Hold a round of admission.

        Args:
            broken: ids of the sequences whose SLO is broken.
        """
        settings = ReviewSettings(
            window_s=self.longest_s(model),
            guard_s=GUARD_S,
            best_effort_share=self._account.share,
            max_speculation=0 if view.speculation is None else view.speculation.max_tokens,
        )
        return review(
            view,
            now,
            model,
            self.lengths,
            lambda seq: self._rounds.cached_tokens(seq, view.memory),
            self.choose,
            settings,
            self.acceptance,
            broken,
            self._rounds.chosen,
        )

    def _drafting(self, view: PlannerView) -> Drafting | None:
        """Return what the batch needs to know of drafts; ``None`` if no drafts are weighed."""
        weighs = self._rounds.weighs_drafts()
        if view.speculation is None or self.model is None or not weighs:
            return None
        drafts = self._rounds.drafts
        remaining = self.lengths.remaining
        return Drafting(view.speculation, self.model, self.acceptance, remaining, drafts)

    def roles(self, view: PlannerView, now: float, result: ReviewResult, broken: set[str]) -> Work:
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
        paces, chosen = self._rounds.paces, self._rounds.chosen
        work = Work(paces=paces)
        lone_s = 0.0 if self.model is None else _lone_decode_s(self.model)
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
                    due_s = paces.due_s(seq) if seq.is_decoding else paces.latest_s(seq)
                    work.unpromised.append((due_s, seq))
            elif seq.is_decoding:
                work.decodes.append((paces.due_s(seq), seq))
            else:
                work.prefills.append((paces.due_s(seq), seq))
        for role in (work.decodes, work.prefills, work.unpromised):
            role.sort(key=_deadline)
        work.best_effort.sort(key=by_rank)
        return work

    def longest_s(self, model: PerfModel) -> float:
        """Return how many seconds an iteration may take in which no decode is due."""
        return LONGEST_ITERATION * (_lone_decode_s(model) + GUARD_S)

    def limits(self, work: Work, view: PlannerView, now: float) -> BatchLimits:
        """Return the limits of this iteration's time and memory, best effort's part included."""
        model = self.model
        if model is None:
            return BatchLimits(longest_s=math.inf, guard_s=GUARD_S)
        # Saved up until it is worth an iteration: a decode, or a few prefill tokens.
        longest_s = self.longest_s(model)
        owed = self._account.owed_s if work.best_effort else 0.0
        enough = owed >= longest_s / LONGEST_ITERATION
        return BatchLimits(
            longest_s=max(longest_s, self._unwatched_s(work, view, now, model)),
            guard_s=GUARD_S,
            best_effort_s=min(owed, longest_s / 2) if enough else 0.0,
            spare_blocks=self._promised.spare(view.memory.num_blocks),
            blocks_of=self._blocks_at_end(view.memory.block_size),
        )

    def _blocks_at_end(self, block_size: int) -> Callable[[Sequence], int]:
        def blocks_of(seq: Sequence) -> int:
            return blocks_for(seq.num_tokens + self.lengths.remaining(seq), block_size)

        return blocks_of

    def _unwatched_s(self, work: Work, view: PlannerView, now: float, model: PerfModel) -> float:
        """Return how many seconds an iteration may last for the sake of requests that are still to
        come; 0 if a request waits already to which more may be owed.
        """
        decodes = [seq for seq in view.running if seq.is_decoding]
        if not decodes:
            longest_s = model.predict(model.prefill_alone(0, view.token_budget))
            slack_s = self._arrivals.least_s
        elif work.decodes or work.prefills or work.unpromised:
            return 0.0
        else:
            longest_s = STRETCH * model.predict(decodes_alone(decodes))
            slack_s = SLACK_SHARE * self._arrivals.least_remembered_s(now) - GUARD_S
        return min(longest_s, slack_s / model.bound(1, USUAL_RISK))


def _lone_decode_s(model: PerfModel) -> float:
    """Return the predicted seconds of a decode that runs alone."""
    return model.predict(BatchShape.of([(0, 1)]))


def _newly_promised(work: Work, plan: IterationPlan) -> list[str]:
    """Return the ids of sequences that are promised their SLO now that an output of their request
    runs.
    """
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
