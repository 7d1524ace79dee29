"""Who is served: the dynamic program over prefill deadlines, tier counts, memory and budget.

After SLOs-Serve (arXiv 2504.08784). A candidate is a request with all of its outputs that are
to be decided on. Candidates in deadline order; a state is how many outputs of each tier are
accepted, their blocks and value, and when the last of their prefills is done. That time stands for the leftover budget: for equal counts, the earlier, the more is left. The
paper's own pruning gets this comparison wrong; here the frontier is exact, for this reason:

    When a candidate is done, as a function of when the one before it was, never falls: who
    starts earlier has done at least as much at any later time, and can always wait.

So a state with the same counts that is later, with no fewer blocks and no more value, leads
nowhere that the other does not. Accepted candidates hold their tier and blocks for good in
the program. `simulate` releases them at their predicted ends, which only takes load away, so
by the same argument it never finds an accepted set infeasible.

The program is fast because it looks for little: a set found by Moore's rule is mostly of the
highest value already, and `minserve.planner.admission.bounds` tells which states cannot lead to a better
one. Of the thousands of states a few dozen are left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

from minserve.planner.admission.bounds import (
    ROUNDING,
    Clock,
    Rest,
    latest_s,
    least_blocks,
    loosened,
    slowdown,
)
from minserve.planner.admission.outlook import Outlook
from minserve.planner.admission.prefill_rates import PrefillRates
from minserve.planner.admission.timeline import (
    Admission,
    Candidate,
    by_deadline,
    first_steady,
    insert_greedily,
    simulate,
)

# Count vectors, and states visited, beyond which a decision would take too long.
MAX_CELLS = 50_000
MAX_STATES = 2500
# Values that are no multiples of the smallest are rounded to so many units in all.
MAX_UNITS = 256
# Tokens per second where there is no budget: nothing gets done, yet no division by 0.
NO_RATE = 1e-9
# Share of the time until the last deadline.
WORTH_A_CLOCK = 0.1


def admit(candidates: SequenceOf[Candidate], outlook: Outlook, rates: PrefillRates) -> Admission:
    """The most valuable set that keeps every deadline, of these the one that is done first.

    Beyond `MAX_CELLS` it is that of `insert_greedily`, beyond `MAX_STATES` the best one found.
    """
    program = _Program(candidates, outlook, rates)
    if program.most_seqs == sum(c.num_seqs for c in candidates):
        everyone = simulate(candidates, outlook, rates)
        if everyone.feasible:
            done_s = max(everyone.done_s, default=float(outlook.starts[0]))
            order = tuple(by_deadline(candidates))
            return Admission(order, True, sum(c.value for c in candidates), done_s)
    if program.num_cells > MAX_CELLS:
        return insert_greedily(candidates, outlook, rates)
    return program.solve() or _forced_alone(candidates, outlook, rates)


def _forced_alone(
    candidates: SequenceOf[Candidate], outlook: Outlook, rates: PrefillRates
) -> Admission:
    """The forced ones do not fit for good; they may if they are released in time."""
    forced = [i for i in by_deadline(candidates) if candidates[i].forced]
    under_way = [candidates[i] for i in forced]
    timeline = simulate(under_way, outlook, rates)
    if not timeline.feasible:
        return Admission((), False, 0.0, math.inf)
    return Admission(tuple(forced), True, sum(c.value for c in under_way), max(timeline.done_s))


class _Row(NamedTuple):
    """What a cell leaves.

    Attributes:
        rates: of prefill, per segment.
        steady: the first segment from which on all decodes keep their pace.
        kind: of clock that bounds it.
    """

    rates: list[float]
    steady: int
    kind: int


class _DpState(NamedTuple):
    """Some of the first candidates accepted.

    Attributes:
        now: when the last of them is done.
        segment: of the outlook that ``now`` lies in.
        cell: index of their counts; ``row`` is what that leaves.
        blocks: that they hold.
        units: of value, of those that are not forced.
        position: of the last one accepted, after those of ``before``.
    """

    now: float
    segment: int
    cell: int
    row: _Row
    blocks: int = 0
    units: int = 0
    value: float = 0.0
    position: int = -1
    before: _DpState | None = None


class _Program:
    """One admission to decide, in deadline order; hopeless candidates are left out at once.

    A cell is a count vector, written as one number. Candidates without a pace have a dimension
    of their own, which demands nothing. Of the cells only those are looked at whose counts are
    sums of some candidates' outputs.

    Attributes:
        num_cells: of these.
        most_seqs: outputs that can be accepted at most.
    """

    def __init__(
        self, candidates: SequenceOf[Candidate], outlook: Outlook, rates: PrefillRates
    ) -> None:
        self._outlook, self._rates = outlook, rates
        self._starts = [*outlook.starts.tolist(), math.inf]
        self._free_from = outlook.free_from
        # Nobody accepted: no set leaves prefill more.
        self._clock = Clock(outlook.starts, np.maximum(rates(outlook.counts), NO_RATE))
        self._index, self.most_seqs = self._hopeful(candidates)
        self._candidates = [candidates[i] for i in self._index]
        num_tiers = outlook.counts.shape[1]
        sizes: list[list[int]] = [[] for _ in range(num_tiers + 1)]
        for c in self._candidates:
            sizes[num_tiers if c.tier is None else c.tier].append(c.num_seqs)
        # Without requests of several outputs a cell's number is also its place in the grid.
        self._is_plain = all(c.num_seqs == 1 for c in self._candidates)
        self._totals = [
            list(range(len(own) + 1)) if self._is_plain else _sums(own, self.most_seqs)
            for own in sizes
        ]
        self.num_cells = math.prod(len(own) for own in self._totals)
        # Of a cell's number, per dimension: one more output is so much.
        self._units_of = [
            math.prod(sum(own) + 1 for own in sizes[d + 1 :]) for d in range(num_tiers + 1)
        ]
        self._strides = [
            c.num_seqs * self._units_of[num_tiers if c.tier is None else c.tier]
            for c in self._candidates
        ]
        blocks = [c.blocks for c in self._candidates]
        self._is_tight = sum(blocks) > self._free_from[0]
        self._blocks = blocks if self._is_tight else [0] * len(blocks)
        self._rows: dict[int, _Row] = {}

    def _hopeful(self, candidates: SequenceOf[Candidate]) -> tuple[list[int], int]:
        """Those not late behind nobody but the forced, and how many outputs can be served at most.

        The number of candidates is that of Moore (Management Science, 1968): in deadline order, drop the
        longest so far whenever one is late.
        """
        order = by_deadline(candidates)
        deadlines = np.array([candidates[i].deadline_s for i in order])
        due = loosened(self._clock.tokens(deadlines)).tolist()
        index: list[int] = []
        longest: list[float] = []
        under_way = total = 0.0
        for i, most in zip(order, due, strict=True):
            candidate = candidates[i]
            if candidate.forced:
                under_way += candidate.work
            elif under_way + candidate.work > most or candidate.blocks > self._free_from[-1]:
                continue
            index.append(i)
            total += candidate.work
            heappush(longest, -candidate.work)
            if total > most:
                total += heappop(longest)
        forced = sum(c.num_seqs for c in candidates if c.forced)
        seqs = sorted((candidates[i].num_seqs for i in index), reverse=True)[: len(longest)]
        return index, min(sum(seqs), max(0, self._outlook.free_seqs) + forced)

    def solve(self) -> Admission | None:
        """``None`` where not even the forced ones fit."""
        self._fill()
        self._count_units()
        best = self._good_set()
        if best is None:
            return None
        found = self._search(best) if any(self._units) else best
        state = last = found or best
        accepted = []
        while state.before is not None:
            accepted.append(self._index[state.position])
            state = state.before
        return Admission(tuple(accepted[::-1]), True, last.value, last.now, found is not None)

    def _fill(self) -> None:
        """Rates of every cell that can be reached, and a clock for each kind of set.

        The tightest TPOT present sets how often the constant cost of a batch is paid. Sets
        with one of a tier that is tighter than all who run for long have a clock of their own.
        """
        shape = [len(own) for own in self._totals]
        places = np.indices(shape).reshape(len(shape), self.num_cells)
        counts = places
        if not self._is_plain:
            counts = np.stack(
                [np.array(own)[at] for own, at in zip(self._totals, places, strict=True)]
            )
            self._places = [{total: at for at, total in enumerate(own)} for own in self._totals]
        size = counts.sum(axis=0)
        kept = (size <= self.most_seqs).nonzero()[0]
        self._counts, size = counts.take(kept, axis=1), size.take(kept)
        self._column = np.full(self.num_cells, -1)
        self._column[kept] = np.arange(len(kept))
        self._table = self._rates.of_sums(self._outlook.counts, self._counts[:-1].T)
        # Seconds, until the last deadline, in which nobody of a tier or a tighter one decodes.
        last_s = max((c.deadline_s for c in self._candidates), default=0.0)
        spans = np.diff(np.minimum(self._starts, last_s))
        absent = spans @ (np.cumsum(self._outlook.counts, axis=1) == 0)
        self._kinds = [
            tier
            for tier, count in enumerate(self._counts[:-1])
            if count.any() and absent[tier] > WORTH_A_CLOCK * spans.sum()
        ]
        self._clocks, self._left = [], []
        for tier in (None, *self._kinds):
            columns = slice(None) if tier is None else self._counts[tier].nonzero()[0]
            rates = np.maximum(self._table[:, columns], NO_RATE)
            fastest = rates.max(axis=1)
            self._clocks.append(Clock(self._outlook.starts, fastest))
            self._left.append(slowdown(rates, fastest, size[columns]))
        # Looked up for hundreds of cells, hence found for all of them at once.
        self._is_slow = self._table.min(axis=0) < NO_RATE
        self._kind = np.zeros(len(kept), dtype=np.int64)
        for number, tier in reversed(list(enumerate(self._kinds, 1))):
            self._kind[self._counts[tier] > 0] = number

    def _row(self, cell: int) -> _Row | None:
        """``None`` for a cell of more than can be accepted."""
        column = int(self._column[cell]) if self._is_plain else self._column_of(cell)
        if column < 0:
            return None
        rates = self._table[:, column].tolist()
        steady = 0
        if self._is_slow[column]:
            steady = first_steady(rates)
            rates = [max(rate, NO_RATE) for rate in rates]
        self._rows[cell] = row = _Row(rates, steady, int(self._kind[column]))
        return row

    def _column_of(self, cell: int) -> int:
        """Of the table; below 0 for a cell that is not in it."""
        place = 0
        for unit, places in zip(self._units_of, self._places, strict=True):
            count, cell = divmod(cell, unit)
            if count not in places:
                return -1
            place = place * len(places) + places[count]
        return int(self._column[place])

    def _count_units(self) -> None:
        """Values as whole numbers: exactly, where all are multiples of the smallest."""
        values = [c.value for c in self._candidates if not c.forced]
        self._unit = min(values, default=1.0)
        most = MAX_UNITS * self._unit
        self._is_whole = sum(values) <= most and all(v % self._unit == 0 for v in values)
        if not self._is_whole:
            self._unit = sum(values) / MAX_UNITS
        self._units = [
            0 if c.forced else math.ceil(c.value / self._unit - ROUNDING) for c in self._candidates
        ]

    def _extend(self, state: _DpState, k: int) -> _DpState | None:
        """Accept the candidate at position ``k`` too; ``None`` where that is infeasible."""
        candidate = self._candidates[k]
        end, segment, cell, row, blocks, units, value, _, _ = state
        cell += self._strides[k]
        after = self._rows.get(cell) or self._row(cell)
        if after is None:
            return None
        blocks += self._blocks[k]
        while blocks > self._free_from[segment]:
            segment += 1
            if segment == len(self._free_from):
                return None
            end = self._starts[segment]
        left = candidate.work
        while True:
            begin, until, rate = end, self._starts[segment + 1], row.rates[segment]
            end += left / rate
            if end <= until:
                break
            left -= rate * (until - begin)
            end = until
            segment += 1
        if segment < after.steady and candidate.tier is not None:
            if after.steady == len(self._free_from):
                return None
            segment, end = after.steady, self._starts[after.steady]
        if end > candidate.deadline_s:
            return None
        units += self._units[k]
        value += candidate.value
        return _DpState(end, segment, cell, after, blocks, units, value, k, state)

    def _good_set(self) -> _DpState | None:
        """The best of some sets by Moore's rule; ``None`` where the forced ones do not fit."""
        work = max((c.work for c in self._candidates), default=0.0) or 1.0
        blocks = max(self._blocks, default=0) or 1
        sets = []
        for share in (0.0, 0.5, 1.0) if self._is_tight else (0.0,):
            weights = [
                ((1 - share) * c.work / work + share * c.blocks / blocks) / c.value
                for c in self._candidates
            ]
            sets.append(self._by_moore(weights))
        return None if sets[0] is None else max(sets, key=_merit)

    def _by_moore(self, weights: SequenceOf[float]) -> _DpState | None:
        """In deadline order; whenever one does not fit, the heaviest so far is dropped."""
        state = self._nobody()
        # Who is accepted, by position, each after the state before it.
        path: list[tuple[_DpState, int]] = []
        for k, candidate in enumerate(self._candidates):
            after = self._extend(state, k)
            while after is None:
                heaviest = max(
                    (at for at, (_, i) in enumerate(path) if not self._candidates[i].forced),
                    key=lambda at: weights[path[at][1]],
                    default=None,
                )
                if heaviest is None:
                    break
                if not candidate.forced and weights[path[heaviest][1]] <= weights[k]:
                    break
                other, rest = path[heaviest][0], []
                for _, i in path[heaviest + 1 :]:
                    rest.append((other, i))
                    other = self._extend(other, i)
                after = self._extend(other, k)
                if after is None and not candidate.forced:
                    break
                state, path = other, path[:heaviest] + rest
            if after is not None:
                path.append((state, k))
                state = after
            elif candidate.forced:
                return None
        return state

    def _nobody(self) -> _DpState:
        return _DpState(self._starts[0], 0, 0, self._row(0))

    def _search(self, best: _DpState) -> _DpState | None:
        """The program.

        Args:
            best: a set to be better than: more valuable, or as valuable and done earlier.

        Returns:
            the best set; ``None`` beyond `MAX_STATES`.
        """
        rest = self._rest(best)
        latest = [latest_s(rest, *one) for one in zip(self._clocks, self._left, strict=True)]
        free, target = self._free_from[-1], rest.target
        least = least_blocks(rest) if self._is_tight else None
        frontier, num_states = [self._nobody()], 0
        for k, candidate in enumerate(self._candidates):
            num_states += len(frontier)
            if num_states > MAX_STATES:
                return None
            late = [of_kind[k + 1] for of_kind in latest]
            few = least[k + 1] if least else None
            groups: dict[int, list[_DpState]] = {}
            for state in frontier:
                grown = self._extend(state, k)
                for one in (grown,) if candidate.forced else (state, grown):
                    if one is None:
                        continue
                    units = one.units if one.units < target else target
                    if one.now > late[one.row.kind][units]:
                        continue
                    if few and one.blocks + few[units] > free:
                        continue
                    group = groups.get(one.cell)
                    if group is None:
                        groups[one.cell] = [one]
                    else:
                        _offer(group, one)
            frontier = [state for group in groups.values() for state in group]
        return max([best, *frontier], key=_merit)

    def _rest(self, best: _DpState) -> Rest:
        """The target: one unit more than the best set has, or as much value as it has."""
        target = best.units + 1
        if not self._is_whole:
            forced = sum(c.value for c in self._candidates if c.forced)
            target = max(1, math.ceil((best.value - forced) / self._unit - ROUNDING))
        return Rest(
            works=np.array([c.work for c in self._candidates]),
            deadlines=np.array([c.deadline_s for c in self._candidates]),
            blocks=self._blocks,
            units=self._units,
            seqs=[c.num_seqs for c in self._candidates],
            forced=[c.forced for c in self._candidates],
            target=target,
            end_s=best.now if self._is_whole else -math.inf,
        )


def _sums(sizes: SequenceOf[int], most: int) -> list[int]:
    """What some of the sizes add up to, from 0 for none of them to at most ``most``."""
    # Bit s of the number is set where s is such a sum.
    found, mask = 1, (1 << (most + 1)) - 1
    for size in sizes:
        found |= (found << size) & mask
    return [total for total in range(found.bit_length()) if found >> total & 1]


def _merit(state: _DpState) -> tuple[float, float]:
    return state.value, -state.now


def _offer(group: list[_DpState], one: _DpState) -> None:
    """Add it to the states of a cell unless one dominates it; take out whom it dominates."""
    for other in group:
        if other.now <= one.now and other.blocks <= one.blocks and other.value >= one.value:
            return
    group[:] = [
        other
        for other in group
        if other.now < one.now or other.blocks < one.blocks or other.value > one.value
    ]
    group.append(one)
