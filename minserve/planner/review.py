"""One round of admission: from sequences to the dynamic program and back.

Sequences that decode under a promise are settled: what they need is the outlook. All others
that have an unbroken SLO are candidates; of these, prefills under way are forced in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

import numpy as np

from minserve.planner.acceptance import AcceptanceEstimator
from minserve.planner.admission import Admission
from minserve.planner.budget import PrefillRates, TierSpeculation
from minserve.planner.lengths import LengthEstimator
from minserve.planner.outlook import (
    Demand,
    Holding,
    Outlook,
    build_outlook,
    group_tiers,
)
from minserve.planner.perf_model import PerfModel
from minserve.planner.plan import PlannerView, Refusal
from minserve.planner.speculation import NO_DRAFTS, DraftsForPrefills
from minserve.planner.timeline import Candidate
from minserve.request import Sequence, SequenceState
from minserve.slo import Standing

# Stands for "no deadline"; finite, so that what never gets done is never accepted.
FAR_S = 1e7
# An answer for requests that would not fit the idle device either.
NEVER_S = 3600.0
SOON_S = 0.1

Choose = Callable[[SequenceOf[Candidate], Outlook, PrefillRates], Admission]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewSettings:
    """What a round goes by.

    Attributes:
        window_s: length of an iteration in which no decode is due.
        guard_s: how long before its deadline a token must be ready.
        best_effort_share: of the device's time, kept free while best effort waits.
        max_speculation: most tokens drafted for a sequence; 0 where nobody drafts.
    """

    window_s: float
    guard_s: float
    best_effort_share: float
    max_speculation: int = 0


@dataclass(slots=True)
class Verdict:
    """What a round decided, by sequence id; who is in none of them waits.

    Attributes:
        drafts: what drafting is worth while prefills wait.
    """

    chosen: dict[str, None] = field(default_factory=dict)
    relegate: dict[str, None] = field(default_factory=dict)
    reject: dict[str, Refusal] = field(default_factory=dict)
    drafts: DraftsForPrefills = NO_DRAFTS


def review(
    view: PlannerView,
    now: float,
    model: PerfModel,
    lengths: LengthEstimator,
    cached_tokens: Callable[[Sequence], int],
    choose: Choose,
    settings: ReviewSettings,
    acceptance: AcceptanceEstimator,
) -> Verdict:
    """Decide who is served.

    Args:
        cached_tokens: of a waiting sequence, tokens in the prefix index.
        choose: the admission program.
        acceptance: of drafted tokens.
    """
    verdict = Verdict()
    settled, open_ = _partition(view, now)
    if not settled and not open_:
        return verdict
    round_ = _Round(view, now, model, lengths, cached_tokens, settings, acceptance, settled, open_)
    round_.shed_overload(verdict)
    if not open_:
        verdict.drafts = round_.drafts(set())
        return verdict
    accepted = round_.choose(choose)
    verdict.drafts = round_.drafts(accepted)
    verdict.chosen = {open_[i].seq_id: None for i in sorted(accepted)}
    for i, seq in enumerate(open_):
        if i not in accepted:
            round_.decline(i, seq, accepted, verdict)
    return verdict


def _partition(view: PlannerView, now: float) -> tuple[list[Sequence], list[Sequence]]:
    """Sequences that decode under a promise, and those to decide on.

    Whose SLO is broken is neither, unless it has yet to hear that it is refused.
    """
    settled, open_ = [], []
    for seq in (*view.running, *view.waiting):
        if seq.progress is None:
            continue
        if seq.progress.is_broken(now) and not awaits_answer(seq):
            continue
        promised = seq.standing is Standing.ADMITTED and seq.is_decoding
        (settled if promised else open_).append(seq)
    return settled, open_


def awaits_answer(seq: Sequence) -> bool:
    """True where a request that would rather be refused than late has not begun."""
    return (
        seq.standing is Standing.PENDING
        and seq.request.slo.refuses_delay
        and seq.state is SequenceState.WAITING
        and seq.num_output_tokens == 0
    )


class _Round:
    """The sequences of one round as the admission program sees them."""

    def __init__(
        self,
        view: PlannerView,
        now: float,
        model: PerfModel,
        lengths: LengthEstimator,
        cached_tokens: Callable[[Sequence], int],
        settings: ReviewSettings,
        acceptance: AcceptanceEstimator,
        settled: list[Sequence],
        open_: list[Sequence],
    ) -> None:
        self.view, self.now, self.settings = view, now, settings
        self.settled = settled
        self._block_size = view.memory.block_size
        self.tiers, self.index = group_tiers(
            (stage.tpot_s, seq.num_tokens)
            for seq in (*settled, *open_)
            for stage in seq.progress.targets.stages[seq.progress.stage :]
        )
        crowded = any(
            s.progress is None or s.standing is Standing.BEST_EFFORT
            for s in (*view.running, *view.waiting)
        )
        speculation = self._speculation(acceptance, open_)
        share = 1.0 - (settings.best_effort_share if crowded else 0.0)
        self.rates = self._rates(model, share, speculation)
        # For what is promised already, the likely time counts and not the cautious one:
        # a promise is given up when it will be broken, not when it might be.
        self.likely_rates = self._rates(model, 1.0, speculation)
        self.remaining = {s.seq_id: lengths.remaining(s) for s in (*settled, *open_)}
        # Decodes keep step with each other, whatever they were promised: what counts for memory
        # is in which order they end.
        self._step_s = min((s.progress.tpot_s for s in settled), default=math.inf)
        self.demands = {s.seq_id: self._demands(s) for s in settled}
        self.candidates = [self._candidate(s, cached_tokens) for s in open_]

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
        """Acceptance per tier, and the count vectors between those of now and of everybody."""
        if not self.settings.max_speculation or not self.tiers:
            return None
        totals, members = [0.0] * len(self.tiers), [0] * len(self.tiers)
        vectors = [tuple(members)]
        for seqs in (self.settled, open_):
            for seq in seqs:
                tier = self.index.get(seq.progress.tpot_s)
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
        """What drafting is worth while the settled and the accepted decode."""
        if not self.settings.max_speculation:
            return NO_DRAFTS
        counts = [0] * len(self.tiers)
        for seq in self.settled:
            tier = self.index.get(seq.progress.tpot_s)
            if tier is not None:
                counts[tier] += 1
        for i in accepted:
            if self.candidates[i].tier is not None:
                counts[self.candidates[i].tier] += 1
        by_tier = self.rates.thresholds(counts)
        return DraftsForPrefills(
            {tpot: by_tier[tier] for tpot, tier in self.index.items() if tier in by_tier},
            self.rates.need_drafts(counts),
        )

    def _blocks(self, seq: Sequence) -> int:
        return -(-(seq.num_tokens + self.remaining[seq.seq_id]) // self._block_size)

    def _holding(self, seq: Sequence) -> Holding:
        end_s = self.now + self.remaining[seq.seq_id] * self._step_s
        return Holding(-(-seq.num_tokens // self._block_size), self._blocks(seq), end_s)

    def _candidate(self, seq: Sequence, cached_tokens: Callable[[Sequence], int]) -> Candidate:
        progress = seq.progress
        if seq.state is SequenceState.RUNNING:
            start = seq.num_computed_tokens
        else:
            start = cached_tokens(seq)
        return Candidate(
            work=0.0 if seq.is_decoding else self.rates.work(start, seq.num_tokens),
            deadline_s=min(progress.next_deadline_s - self.settings.guard_s, self.now + FAR_S),
            tier=self.index.get(progress.tpot_s),
            blocks=self._blocks(seq),
            value=seq.request.slo.value,
            forced=seq.standing is Standing.ADMITTED,
            decode_s=self.remaining[seq.seq_id] * progress.tpot_s,
        )

    def _demands(self, seq: Sequence) -> list[Demand]:
        """What a decoding sequence needs if it goes no faster than promised, by stage."""
        progress, left = seq.progress, self.remaining[seq.seq_id]
        stages = progress.targets.stages
        at = max(self.now, progress.next_deadline_s - progress.tpot_s)
        demands = []
        for number in range(progress.stage, len(stages)):
            count = (
                progress.stage_tokens_left if number == progress.stage else stages[number].tokens
            )
            tokens = left if count is None else min(left, count)
            if tokens > 0 and math.isfinite(stages[number].tpot_s):
                end = at + tokens * stages[number].tpot_s
                demands.append(Demand(self.index[stages[number].tpot_s], at, end))
                at, left = end, left - tokens
        return demands

    def outlook(self, horizon_s: float, accepted: SequenceOf[Candidate] = ()) -> Outlook:
        """What is settled, on a time axis until the horizon.

        Args:
            accepted: count these as settled too, from when their prefills are done.
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
                demands.append(Demand(candidate.tier, self._done_s, end))
        num_forced = sum(candidate.forced for candidate in self.candidates)
        return build_outlook(
            self.now,
            horizon_s,
            demands,
            holdings,
            num_tiers=len(self.tiers),
            num_blocks=self.view.memory.num_blocks,
            free_seqs=max(0, self.view.max_num_seqs - len(self.settled) - num_forced),
        )

    def shed_overload(self, verdict: Verdict) -> None:
        """Where settled decodes alone are too many, give up those with most still to do.

        Otherwise all of them would fall behind together and break every promise.
        """
        order = sorted(self.settled, key=lambda s: self.remaining[s.seq_id], reverse=True)
        for seq in order:
            counts = [0] * len(self.tiers)
            for own in self.demands.values():
                for demand in own:
                    counts[demand.tier] += demand.start_s <= self.now + SOON_S
            if self.likely_rates.one(counts) >= 0:
                return
            verdict.relegate[seq.seq_id] = None
            self.settled.remove(seq)
            del self.demands[seq.seq_id]

    def choose(self, choose: Choose) -> set[int]:
        """Indices of the candidates to be served."""
        candidates = self.candidates
        self._outlook = self.outlook(max((c.deadline_s for c in candidates), default=self.now))
        admission = choose(candidates, self._outlook, self.rates)
        if admission.feasible:
            self._done_s = admission.done_s
            return set(admission.accepted)
        # By cautious rates not even the prefills under way fit: nobody new, and of those
        # under way as many as likely fit.
        forced = [i for i, candidate in enumerate(candidates) if candidate.forced]
        under_way = [candidates[i] for i in forced]
        admission = choose(under_way, self._outlook, self.likely_rates)
        if not admission.feasible:
            optional = [replace(candidate, forced=False) for candidate in under_way]
            slots = replace(self._outlook, free_seqs=self._outlook.free_seqs + len(forced))
            admission = choose(optional, slots, self.likely_rates)
        self._done_s = admission.done_s
        return {forced[i] for i in admission.accepted}

    def decline(self, i: int, seq: Sequence, accepted: set[int], verdict: Verdict) -> None:
        """Refuse it if it asked for that, give it up if it is hopeless, else let it wait."""
        if seq.standing is Standing.ADMITTED:
            verdict.relegate[seq.seq_id] = None
            return
        if seq.standing is not Standing.PENDING:
            return
        if awaits_answer(seq):
            verdict.reject[seq.seq_id] = self._refusal(i, accepted)
        elif (
            self._alone_done_s(self.candidates[i], self.likely_rates)
            > self.candidates[i].deadline_s
        ):
            verdict.relegate[seq.seq_id] = None

    def _alone_done_s(self, candidate: Candidate, rates: PrefillRates) -> float:
        """When its prefill would be done if it had the device for itself from now on."""
        rate = rates.one([0] * len(self.tiers))
        return self.now + candidate.work / rate if rate > 0 else math.inf

    def _refusal(self, i: int, accepted: set[int]) -> Refusal:
        """What there is too little of, and when that changes by prediction."""
        candidate = self.candidates[i]
        own = [0] * len(self.tiers)
        if candidate.tier is not None:
            own[candidate.tier] = 1
        fits_alone = self._alone_done_s(candidate, self.rates) <= candidate.deadline_s
        if not fits_alone or self.rates.one(own) < 0:
            return Refusal("device", NEVER_S)
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
