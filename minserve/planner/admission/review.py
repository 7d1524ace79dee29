"""One round of admission: it turns sequences into candidates, has them chosen, and reads the
answer.

Sequences that decode under a promise are settled: the outlook holds what they need. All others that
have an unbroken SLO are candidates; of these, prefills under way are forced in.

A promise belongs to a request: its outputs are candidates together, and are promised, given up and
refused together (`minserve.planner.admission.parties`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Set
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

import numpy as np

from minserve.blocks import blocks_for
from minserve.planner.admission.outlook import (
    Demand,
    Holding,
    Outlook,
    build_outlook,
    group_tiers,
)
from minserve.planner.admission.parties import Party, partition, spared_blocks, starts_of
from minserve.planner.admission.prefill_rates import PrefillRates, TierSpeculation
from minserve.planner.admission.timeline import Admission, Candidate
from minserve.planner.batching.draft_lengths import NO_DRAFTS, DraftsForPrefills
from minserve.planner.batching.timed_batch_builder import decodes_alone
from minserve.planner.plan import PlannerView, Refusal
from minserve.planner.predict.acceptance import AcceptanceEstimator
from minserve.planner.predict.lengths import LengthEstimator
from minserve.planner.predict.pacing import Pace, PaceLimits, Paces, pace_of
from minserve.planner.predict.perf_model import BatchShape, PerfModel
from minserve.request import Sequence
from minserve.slo.objectives import Standing

# Stands for "no deadline"; finite, so that what never gets done is never accepted.
FAR_S = 1e7
SOON_S = 0.1

Choose = Callable[[SequenceOf[Candidate], Outlook, PrefillRates], Admission]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewSettings:
    """The settings of a round.

    Attributes:
        window_s: seconds of an iteration in which no decode is due.
        guard_s: seconds before its deadline at which a token must be ready.
        best_effort_share: share of the device's time that is kept free while best effort waits.
        max_speculation: the most tokens drafted for a sequence; 0 if no tokens are drafted.
    """

    window_s: float
    guard_s: float
    best_effort_share: float
    max_speculation: int = 0


@dataclass(slots=True)
class ReviewResult:
    """The decisions of a round, by sequence id. A sequence without a decision waits.

    Attributes:
        chosen: sequences that are served under a promise.
        relegate: sequences whose SLO is given up.
        reject: sequences that are refused, with the reason.
        drafts: the worth of drafting while prefills wait.
        paces: when tokens are due for the sake of deadlines of whole outputs.
    """

    chosen: dict[str, None] = field(default_factory=dict)
    relegate: dict[str, None] = field(default_factory=dict)
    reject: dict[str, Refusal] = field(default_factory=dict)
    drafts: DraftsForPrefills = NO_DRAFTS
    paces: Paces = field(default_factory=Paces)


def review(
    view: PlannerView,
    now: float,
    model: PerfModel,
    lengths: LengthEstimator,
    cached_tokens: Callable[[Sequence], int],
    choose: Choose,
    settings: ReviewSettings,
    acceptance: AcceptanceEstimator,
    broken: Set[str],
    chosen_before: Container[str] = frozenset(),
) -> ReviewResult:
    """Decide which requests are served under a promise.

    Args:
        now: seconds on the engine's clock.
        model: the performance model.
        lengths: guesses output lengths.
        cached_tokens: function that returns how many tokens of a waiting sequence the prefix index
            holds.
        choose: function that chooses among the candidates.
        acceptance: estimates how often drafted tokens are accepted.
        broken: ids of the sequences whose SLO is broken.
        chosen_before: ids of the sequences that the round before chose.
    """
    result = ReviewResult()
    alone, parties = partition(view, broken)
    if not alone and not parties:
        return result
    round_ = _ReviewRound(
        view,
        now,
        model,
        lengths,
        cached_tokens,
        settings,
        acceptance,
        alone,
        parties,
        broken,
        chosen_before,
    )
    result.paces = round_.paces
    round_.relax_paces()
    round_.shed_overload(result)
    if not round_.candidates:
        result.drafts = round_.drafts(set())
        return result
    accepted = round_.choose(choose)
    result.drafts = round_.drafts(accepted)
    result.chosen = {seq.seq_id: None for i in sorted(accepted) for seq in round_.undecided[i].open}
    for i, party in enumerate(round_.undecided):
        if i not in accepted:
            round_.decline(i, party, accepted, result)
    return result


class _ReviewRound:
    """The requests of one round as the choice of admission sees them.

    Attributes:
        settled: sequences that decode under a promise.
        undecided: requests with outputs that do not.
        remaining: number of tokens that each sequence is likely still to have, by its id.
        paces: what deadlines of whole outputs ask for.
        candidates: a candidate for each of these requests.
    """

    def __init__(
        self,
        view: PlannerView,
        now: float,
        model: PerfModel,
        lengths: LengthEstimator,
        cached_tokens: Callable[[Sequence], int],
        settings: ReviewSettings,
        acceptance: AcceptanceEstimator,
        alone: list[Sequence],
        parties: list[Party],
        broken: Set[str],
        chosen_before: Container[str],
    ) -> None:
        self.view, self.now, self.settings = view, now, settings
        self._chosen_before = chosen_before
        self._alone, self._parties = alone, parties
        self.settled = alone + [seq for party in parties for seq in party.settled]
        self.undecided = [party for party in parties if party.open]
        open_ = [seq for party in self.undecided for seq in party.open]
        self._block_size = view.memory.block_size
        self.remaining = {s.seq_id: lengths.remaining(s) for s in (*self.settled, *open_)}
        self.paces = self._paces(model)
        self.tiers, self.index = group_tiers(
            (self.paces.at_most(seq, stage.tpot_s), seq.num_tokens)
            for seq in (*self.settled, *open_)
            for stage in seq.slo_progress.stages_left
        )
        crowded = bool(broken) or any(
            seq.progress is None for seq in (*view.running, *view.waiting)
        )
        speculation = self._speculation(acceptance, open_)
        share = 1.0 - (settings.best_effort_share if crowded else 0.0)
        # Rates last for many iterations, whose times average out: they go by what is expected.
        self.rates = self._rates(model, share, speculation)
        # What is promised already goes before the share of best effort.
        self.whole_rates = self._rates(model, 1.0, speculation)
        self._spared = spared_blocks(parties, view.memory, self.remaining)
        # Decodes keep step with each other, whatever they were promised: what counts for memory
        # is in which order they end.
        self._step_s = min((self.paces.tpot_s(s) for s in self.settled), default=math.inf)
        self.demands = {s.seq_id: self._demands(s) for s in self.settled}
        self.candidates = [self._candidate(party, cached_tokens) for party in self.undecided]

    def _paces(self, model: PerfModel) -> Paces:
        """Return what deadlines of whole outputs ask of all sequences that have one."""
        steep, guard_s = model.steepest, self.settings.guard_s
        found: dict[str, Pace] = {}
        open_ = [seq for party in self.undecided for seq in party.open]
        having = [s for s in (*self.settled, *open_) if s.slo_progress.finish_by_s < math.inf]
        if not having:
            return Paces()
        decodes_s = model.predict(decodes_alone(self.settled)) if self.settled else 0.0
        limits = PaceLimits.of(model.predict(BatchShape.of([(0, 1)])), decodes_s, guard_s)
        for seq in having:
            prefill_s = 0.0
            if not seq.is_decoding:
                prompt = BatchShape(tokens=seq.num_uncomputed_tokens, seqs=1, eager=1)
                prefill_s = model.drift * steep.seconds(prompt)
            num_left = self.remaining[seq.seq_id]
            found[seq.seq_id] = pace_of(seq, num_left, self.now, prefill_s, limits)
        return Paces(found)

    def _rates(
        self, model: PerfModel, share: float, speculation: TierSpeculation | None
    ) -> PrefillRates:
        settings = self.settings
        return PrefillRates(
            model,
            self.tiers,
            window_s=settings.window_s,
            guard_s=settings.guard_s,
            share=share,
            speculation=speculation,
        )

    def _speculation(
        self, acceptance: AcceptanceEstimator, open_: list[Sequence]
    ) -> TierSpeculation | None:
        """Return the acceptance rate of each tier, and the count vectors to compare lengths at:
        with the settled alone, and with all sequences.
        """
        if not self.settings.max_speculation or not self.tiers:
            return None
        totals, members = [0.0] * len(self.tiers), [0] * len(self.tiers)
        vectors = [tuple(members)]
        for seqs in (self.settled, open_):
            for seq in seqs:
                tier = self.index.get(self.paces.tpot_s(seq))
                if tier is not None:
                    members[tier] += 1
                    totals[tier] += acceptance.rate(seq)
            vectors.append(tuple(members))
        shared = acceptance.shared_rate
        return TierSpeculation(
            acceptance=tuple(
                acceptance.coverage * (total / num if num else shared)
                for total, num in zip(totals, members, strict=True)
            ),
            max_tokens=self.settings.max_speculation,
            near=tuple(dict.fromkeys(vectors[1:])),
        )

    def drafts(self, accepted: set[int]) -> DraftsForPrefills:
        """Return the worth of drafting while the settled and the accepted sequences decode."""
        if not self.settings.max_speculation:
            return NO_DRAFTS
        counts = [0] * len(self.tiers)
        for seq in self.settled:
            tier = self.index.get(self.paces.tpot_s(seq))
            if tier is not None:
                counts[tier] += 1
        for candidate in (self.candidates[i] for i in accepted):
            if candidate.tier is not None:
                counts[candidate.tier] += candidate.num_seqs
        by_tier = self.rates.thresholds(counts)
        return DraftsForPrefills(
            {tpot: by_tier[tier] for tpot, tier in self.index.items() if tier in by_tier},
            self.rates.need_drafts(counts),
        )

    def _blocks(self, seq: Sequence) -> int:
        """Return how many blocks a sequence holds at its end, less those counted for a sibling."""
        blocks = blocks_for(seq.num_tokens + self.remaining[seq.seq_id], self._block_size)
        return blocks - self._spared.get(seq.seq_id, 0)

    def _holding(self, seq: Sequence) -> Holding:
        end_s = self.now + self.remaining[seq.seq_id] * self._step_s
        blocks_now = blocks_for(seq.num_tokens, self._block_size) - self._spared.get(seq.seq_id, 0)
        return Holding(blocks_now, self._blocks(seq), end_s)

    def _candidate(self, party: Party, cached_tokens: Callable[[Sequence], int]) -> Candidate:
        """Return all open outputs of a request as one candidate.

        They are due when the first of them is, and at the pace of the tightest. Only outputs that
        were preempted in different stages differ.
        """
        starts = starts_of(party, self.view.memory, cached_tokens)
        if len(starts) == 1:
            return self._single(party.open[0], starts[0])
        each = [self._single(seq, start) for seq, start in zip(party.open, starts, strict=True)]
        return Candidate(
            work=sum(one.work for one in each),
            deadline_s=min(one.deadline_s for one in each),
            tier=min((one.tier for one in each if one.tier is not None), default=None),
            blocks=sum(one.blocks for one in each),
            value=each[0].value,
            forced=each[0].forced,
            decode_s=max(one.decode_s for one in each),
            num_seqs=len(each),
            was_chosen=each[0].was_chosen,
        )

    def _single(self, seq: Sequence, start: int) -> Candidate:
        """Return one output as a candidate.

        Args:
            start: number of its tokens that are computed when its prefill begins.
        """
        tpot_s = self.paces.tpot_s(seq)
        return Candidate(
            work=0.0 if seq.is_decoding else self.rates.work(start, seq.num_tokens),
            deadline_s=min(self.paces.due_s(seq) - self.settings.guard_s, self.now + FAR_S),
            tier=self.index.get(tpot_s),
            blocks=self._blocks(seq),
            value=seq.request.value,
            forced=seq.standing is Standing.ADMITTED,
            decode_s=self.remaining[seq.seq_id] * tpot_s,
            was_chosen=seq.seq_id in self._chosen_before,
        )

    def _demands(self, seq: Sequence) -> list[Demand]:
        """Return what a decoding sequence demands, by stage, if it goes no faster than promised."""
        progress, left = seq.slo_progress, self.remaining[seq.seq_id]
        stages = progress.targets.stages
        paces = self.paces
        at = paces.starts_s(seq, self.now)
        demands = []
        for number in range(progress.stage, len(stages)):
            count = (
                progress.stage_tokens_left if number == progress.stage else stages[number].tokens
            )
            tokens = left if count is None else min(left, count)
            tpot_s = paces.at_most(seq, stages[number].tpot_s)
            if tokens > 0 and math.isfinite(tpot_s):
                end = at + tokens * tpot_s
                demands.append(Demand(self.index[tpot_s], at, end))
                at, left = end, left - tokens
        return demands

    def outlook(self, horizon_s: float, accepted: SequenceOf[Candidate] = ()) -> Outlook:
        """Return the outlook of what is settled, on a time axis until the horizon.

        Args:
            accepted: candidates that count as settled too, from when their prefills are done.
        """
        holdings: list[Holding] = []
        demands: list[Demand] = []
        for seq in self.settled:
            own = self.demands[seq.seq_id]
            demands += own
            holdings.append(self._holding(seq))
        for candidate in accepted:
            end = self._done_s + candidate.decode_s
            holdings.append(Holding(candidate.blocks, candidate.blocks, end))
            if candidate.tier is not None:
                demands += [Demand(candidate.tier, self._done_s, end)] * candidate.num_seqs
        num_forced = sum(one.num_seqs for one in self.candidates if one.forced)
        return build_outlook(
            self.now,
            horizon_s,
            demands,
            holdings,
            num_tiers=len(self.tiers),
            num_blocks=self.view.memory.num_blocks,
            free_seqs=max(0, self.view.max_num_seqs - len(self.settled) - num_forced),
        )

    def relax_paces(self) -> None:
        """Slow down decodes that deadlines hurry, the tightest paces first, if settled decodes are
        too many for their paces.

        Such a deadline may still be kept, if the output is shorter than its guess or others end.
        """
        if self._settled_fit():
            return
        paced = [seq for seq in self.settled if self.paces.hurries(seq)]
        for seq in sorted(paced, key=self.paces.tpot_s):
            self.paces.relax(seq)
            self.demands[seq.seq_id] = []
            if self._settled_fit():
                return

    def shed_overload(self, result: ReviewResult) -> None:
        """Give up the requests with most still to do for their value, if settled decodes alone are
        too many.

        Otherwise all of them would fall behind together and break every promise.
        """
        if self._settled_fit():
            return
        parties = [party for party in self._parties if party.settled]
        parties += [Party(one.request, one.standing, [one], [one], []) for one in self._alone]
        for party in sorted(parties, key=self._most_left, reverse=True):
            if self._settled_fit():
                return
            result.relegate |= dict.fromkeys(seq.seq_id for seq in party.live)
            for seq in party.settled:
                self.settled.remove(seq)
                del self.demands[seq.seq_id]
            if party.open:
                del self.candidates[self.undecided.index(party)]
                self.undecided.remove(party)

    def _settled_fit(self) -> bool:
        """Return True if the settled decodes of now keep their pace."""
        counts = [0] * len(self.tiers)
        for own in self.demands.values():
            for demand in own:
                counts[demand.tier] += demand.start_s <= self.now + SOON_S
        return self.whole_rates.one(counts) >= 0

    def _most_left(self, party: Party) -> float:
        left = max(self.remaining[seq.seq_id] for seq in party.settled)
        return left / party.request.value

    def choose(self, choose: Choose) -> set[int]:
        """Return the indices of the candidates to be served."""
        candidates = self.candidates
        self._outlook = self.outlook(max((c.deadline_s for c in candidates), default=self.now))
        admission = choose(candidates, self._outlook, self.rates)
        if not admission.feasible and self.paces.by_id:
            # Those under way that have a deadline may still keep it at a tighter pace.
            late = [self._unhurried(i) if c.forced else c for i, c in enumerate(candidates)]
            admission = choose(late, self._outlook, self.rates)
        if admission.feasible:
            self._done_s = admission.done_s
            return set(admission.accepted)
        # Beside best effort not even the prefills under way fit: no new ones, and of those under
        # way as many as fit without it.
        forced = [i for i, candidate in enumerate(candidates) if candidate.forced]
        under_way = [candidates[i] for i in forced]
        admission = choose(under_way, self._outlook, self.whole_rates)
        if not admission.feasible:
            optional = [candidate._replace(forced=False) for candidate in under_way]
            more = sum(candidate.num_seqs for candidate in under_way)
            slots = replace(self._outlook, free_seqs=self._outlook.free_seqs + more)
            admission = choose(optional, slots, self.whole_rates)
        self._done_s = admission.done_s
        return {forced[i] for i in admission.accepted}

    def decline(self, i: int, party: Party, accepted: set[int], result: ReviewResult) -> None:
        """Refuse a request if it asked for that, give it up if it is hopeless, else let it wait."""
        outputs = [seq.seq_id for seq in party.live]
        if party.standing is Standing.ADMITTED:
            result.relegate |= dict.fromkeys(outputs)
        elif party.awaits_answer:
            result.reject |= dict.fromkeys(outputs, self._refusal(i, accepted))
        elif party.standing is Standing.PENDING and not self._fits_alone(
            self._unhurried(i), self.whole_rates
        ):
            result.relegate |= dict.fromkeys(outputs)

    def _unhurried(self, i: int) -> Candidate:
        """Return a candidate with the deadline that it would have on an idle device."""
        open_, guard_s = self.undecided[i].open, self.settings.guard_s
        latest_s = min(self.paces.latest_s(seq) for seq in open_) - guard_s
        one = self.candidates[i]
        return one._replace(deadline_s=max(one.deadline_s, min(latest_s, self.now + FAR_S)))

    def _fits_alone(self, candidate: Candidate, rates: PrefillRates) -> bool:
        """Return True if it would be in time, with slots and blocks for all of its outputs, if no
        other request were there.
        """
        return (
            self._alone_done_s(candidate, rates) <= candidate.deadline_s
            and candidate.num_seqs <= self.view.max_num_seqs
            and candidate.blocks <= self.view.memory.num_blocks
        )

    def _alone_done_s(self, candidate: Candidate, rates: PrefillRates) -> float:
        """Return when its prefill would be done if it had the device for itself from now on."""
        rate = rates.one([0] * len(self.tiers))
        return self.now + candidate.work / rate if rate > 0 else math.inf

    def _refusal(self, i: int, accepted: set[int]) -> Refusal:
        """Return the resource that is short, and the time until that changes by prediction.

        The same request would come anew then, with all its time before it.
        """
        candidate = self._unhurried(i)
        waited_s = self.now - self.undecided[i].request.arrival_s
        candidate = candidate._replace(deadline_s=candidate.deadline_s + waited_s)
        own = [0] * len(self.tiers)
        if candidate.tier is not None:
            own[candidate.tier] = candidate.num_seqs
        rates = self.whole_rates
        if not self._fits_alone(candidate, rates) or rates.one(own) < 0:
            return Refusal("device", math.inf)
        outlook = self.outlook(math.inf, [self.candidates[j] for j in accepted])
        paced = self.rates(outlook.counts + np.array(own, dtype=np.int64)) > 0
        room = outlook.free_blocks >= candidate.blocks
        starts = outlook.starts[paced & room]
        # Its prefill comes behind those that were chosen, and has its own slack.
        slack = candidate.deadline_s - self._alone_done_s(candidate, self.rates)
        wait = self._done_s - slack - self.now
        opens = float(starts[0] if len(starts) else outlook.starts[-1])
        wait = max(wait, opens - self.now)
        return Refusal("compute" if room[0] else "memory", max(wait, SOON_S))
