"""The fluid timeline: when each accepted prefill is done if they run in deadline order.

Prefills run one after another, earliest deadline first, at the rate that the decodes of the moment
leave (`PrefillRates`). A candidate that is done joins the decodes of its tier, until its output is
predicted to end; then its share of the time and its blocks are free again.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from minserve.planner.admission import fluid_clock
from minserve.planner.admission.fluid_clock import NO_RATE
from minserve.planner.admission.outlook import Outlook
from minserve.planner.admission.prefill_rates import PrefillRates
from minserve.slo.attainment import ROUNDING_S


class Candidate(NamedTuple):
    """A request with outputs that do not decode yet. They are accepted together or not at all.

    Attributes:
        work: work of their prefills together, in budget tokens (`PrefillRates.work`).
        deadline_s: time in seconds at which these must be done; finite.
        tier: index of the tier in which each output decodes; ``None`` if no pace is promised.
        blocks: number of KV blocks that they will hold, beyond those that the outlook counts.
        value: weight of the request, above 0.
        forced: True if it is promised already and must be in the set.
        decode_s: predicted seconds of the longest decode.
        num_seqs: number of outputs, each with a slot and a place in the tier.
        was_chosen: True if it was chosen in the round before: a hint where to look for a good set.
    """

    work: float
    deadline_s: float
    tier: int | None
    blocks: int
    value: float = 1.0
    forced: bool = False
    decode_s: float = math.inf
    num_seqs: int = 1
    was_chosen: bool = False


@dataclass(frozen=True, slots=True)
class Admission:
    """The candidates that are admitted.

    Attributes:
        accepted: indices of these candidates, in deadline order.
        feasible: False if not even the forced ones fit; then none is accepted.
        value: value of the accepted candidates together.
        done_s: time at which the last accepted prefill is done: the earlier, the more budget is
            left.
        exact: False if it is not proven that no set is more valuable.
    """

    accepted: tuple[int, ...]
    feasible: bool
    value: float
    done_s: float
    exact: bool = True


@dataclass(frozen=True, slots=True)
class Timeline:
    """A simulated set: whether all deadlines are met, and when each prefill is done.

    Attributes:
        feasible: True if all deadlines are met.
        done_s: time in seconds at which each prefill is done.
    """

    feasible: bool
    done_s: tuple[float, ...]


def simulate(accepted: SequenceOf[Candidate], outlook: Outlook, rates: PrefillRates) -> Timeline:
    """Run a set of candidates through the timeline.

    Args:
        accepted: the candidates, in any order.

    Returns:
        the times in the order given; those after the first missed deadline are inf.
    """
    rows, order = _Rows(outlook, rates), by_deadline(accepted)
    rows.expect([accepted[i] for i in order])
    walk = _Walk(rows)
    done = [math.inf] * len(accepted)
    for i in order:
        if not walk.run(accepted[i]):
            return Timeline(False, tuple(done))
        done[i] = walk.now
    return Timeline(True, tuple(done))


def insert_greedily(
    candidates: SequenceOf[Candidate], outlook: Outlook, rates: PrefillRates
) -> Admission:
    """Accept candidates in deadline order, each if the set stays feasible.

    Where values differ, the more valuable ones are accepted in this way first. If that brings less
    value in all than deadline order alone, it is deadline order alone.
    """
    plain = _insert(candidates, outlook, rates)
    values = sorted({c.value for c in candidates if not c.forced}, reverse=True)
    if not plain.feasible or len(values) < 2 or len(plain.accepted) == len(candidates):
        return plain
    by_value = plain
    taken: set[int] = set()
    for value in values:
        index = [i for i, c in enumerate(candidates) if c.forced or i in taken or c.value == value]
        # Those that were accepted before are part of the set, as the forced ones are.
        some = [candidates[i]._replace(forced=candidates[i].forced or i in taken) for i in index]
        used = sum(candidates[i].num_seqs for i in taken)
        by_value = _insert(some, replace(outlook, free_seqs=outlook.free_seqs - used), rates)
        accepted = [index[i] for i in by_value.accepted]
        taken = {i for i in accepted if not candidates[i].forced}
        by_value = replace(by_value, accepted=tuple(accepted))
    return max(by_value, plain, key=lambda one: one.value)


def _insert(candidates: SequenceOf[Candidate], outlook: Outlook, rates: PrefillRates) -> Admission:
    """Accept candidates in deadline order, each if the set stays feasible.

    Forced candidates with later deadlines are part of every check.
    """
    order = by_deadline(candidates)
    rows = _Rows(outlook, rates)
    rows.expect([candidates[i] for i in order])
    later = [candidates[i] for i in order if candidates[i].forced]
    walk = _Walk(rows)
    if not walk.copy().run_all(later):
        return Admission((), False, 0.0, math.inf)
    accepted, slots = [], outlook.free_seqs
    for i in order:
        candidate = candidates[i]
        if candidate.forced:
            # It fits, and so do the later ones behind it: each check before has included them.
            later.pop(0)
            walk.run(candidate)
            accepted.append(i)
            continue
        if slots < candidate.num_seqs:
            continue
        trial = walk.copy()
        if trial.run(candidate) and (not later or trial.copy().run_all(later)):
            walk = trial
            slots -= candidate.num_seqs
            accepted.append(i)
    value = sum(candidates[i].value for i in accepted)
    return Admission(tuple(accepted), True, value, walk.now, exact=False)


def first_steady(rates: SequenceOf[float]) -> int:
    """Return the segment from which on all decodes keep their pace.

    It is the one behind the last rate below 0.
    """
    steady = len(rates)
    while steady and rates[steady - 1] >= 0:
        steady -= 1
    return steady


def by_deadline(candidates: SequenceOf[Candidate]) -> list[int]:
    """Return the indices in deadline order, equal deadlines in the order given."""
    return sorted(range(len(candidates)), key=lambda i: candidates[i].deadline_s)


class _Rows:
    """Rates over the outlook's segments, computed once per count vector.

    Attributes:
        starts: seconds at which the segments start, and inf.
        free_from: number of blocks that are free for good from the start of each segment on.
        idle: the count vector without a decode.
    """

    def __init__(self, outlook: Outlook, rates: PrefillRates) -> None:
        self.starts = [*outlook.starts.tolist(), math.inf]
        self.free_from: list[int] = outlook.free_from
        self.idle = (0,) * outlook.counts.shape[1]
        self._counts = outlook.counts
        self._rates = rates
        self._rows: dict[tuple[int, ...], tuple[list[float], int]] = {}

    def row(self, counts: tuple[int, ...]) -> tuple[list[float], int]:
        """Return the rate of each segment with so many more decodes, and the first segment from
        which on all decodes keep their pace (the number of segments, if that never is).
        """
        row = self._rows.get(counts)
        if row is None:
            self._compute([counts])
            row = self._rows[counts]
        return row

    def expect(self, candidates: SequenceOf[Candidate]) -> None:
        """Compute what is needed if these join the decodes in this order, all at once."""
        path, counts = [self.idle], self.idle
        for candidate in candidates:
            if candidate.tier is not None:
                counts = _changed(counts, candidate.tier, candidate.num_seqs)
                path.append(counts)
        self._compute(path)

    def _compute(self, path: list[tuple[int, ...]]) -> None:
        more = np.array(path, dtype=np.int64).reshape(len(path), len(self.idle))
        values = self._rates.of_sums(self._counts, more).T
        for counts, row in zip(path, values.tolist(), strict=True):
            self._rows[counts] = [max(rate, NO_RATE) for rate in row], first_steady(row)


def _changed(counts: tuple[int, ...], tier: int, change: int) -> tuple[int, ...]:
    return (*counts[:tier], counts[tier] + change, *counts[tier + 1 :])


class _Walk:
    """One set of candidates on its way through the timeline.

    Attributes:
        now: time in seconds at which the last prefill was done.
    """

    __slots__ = ("_blocks", "_counts", "_ends", "_rates", "_rows", "_segment", "now")

    def __init__(self, rows: _Rows) -> None:
        self._rows = rows
        self.now, self._segment = rows.starts[0], 0
        # Of the accepted ones: those that decode per tier, the blocks that they hold, and
        # when they end, as (end, tier or -1, blocks, sequences), earliest first.
        self._counts, self._blocks = rows.idle, 0
        self._ends: list[tuple[float, int, int, int]] = []
        self._rates = rows.row(self._counts)[0]

    def copy(self) -> _Walk:
        other = _Walk.__new__(_Walk)
        other._rows, other._rates = self._rows, self._rates
        other.now, other._segment = self.now, self._segment
        other._counts, other._blocks = self._counts, self._blocks
        other._ends = self._ends.copy()
        return other

    def run_all(self, candidates: SequenceOf[Candidate]) -> bool:
        """Run several candidates, which are in deadline order already."""
        return all(self.run(candidate) for candidate in candidates)

    def run(self, candidate: Candidate) -> bool:
        """Prefill a candidate next; return False if it misses its deadline, which ends the walk."""
        deadline = candidate.deadline_s + ROUNDING_S
        while self._blocks + candidate.blocks > self._rows.free_from[self._segment]:
            if self._next_event_s() > deadline:
                return False
            self._advance()
        left = candidate.work
        while True:
            until = self._ends[0][0] if self._ends else math.inf
            self.now, self._segment, left = fluid_clock.run(
                left, self.now, self._segment, self._rates, self._rows.starts, min(until, deadline)
            )
            if left <= 0:
                return self.now <= deadline and self._join(candidate, deadline)
            if until > deadline:
                return False
            self._advance()

    def _join(self, candidate: Candidate, deadline: float) -> bool:
        """Let the candidate begin to decode, as soon as there is room for its pace.

        Returns:
            False if there is none before its deadline.
        """
        tier = candidate.tier
        if tier is not None:
            while True:
                counts = _changed(self._counts, tier, candidate.num_seqs)
                rates, steady = self._rows.row(counts)
                if self._segment >= steady:
                    break
                if self._next_event_s() > deadline:
                    return False
                self._advance()
            self._counts, self._rates = counts, rates
        self._blocks += candidate.blocks
        end = self.now + candidate.decode_s
        if end < math.inf:
            tier = -1 if tier is None else tier
            insort(self._ends, (end, tier, candidate.blocks, candidate.num_seqs))
        return True

    def _next_event_s(self) -> float:
        """Return when the next segment begins or the next accepted decode ends."""
        segment_end = self._rows.starts[self._segment + 1]
        return min(segment_end, self._ends[0][0]) if self._ends else segment_end

    def _advance(self) -> None:
        """Go forward to the next event."""
        self.now = self._next_event_s()
        if not self._ends or self._ends[0][0] > self.now:
            self._segment += 1
            return
        _, tier, blocks, num_seqs = self._ends.pop(0)
        self._blocks -= blocks
        if tier >= 0:
            self._counts = _changed(self._counts, tier, -num_seqs)
            self._rates = self._rows.row(self._counts)[0]
