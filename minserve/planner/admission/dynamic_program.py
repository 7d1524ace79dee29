"""The dynamic program of admission over prefill deadlines, tier counts, memory and budget.

After SLOs-Serve (arXiv 2504.08784). A candidate is a request with all of its outputs that are
to be decided on. The program goes through the candidates in deadline order. A state says how many
outputs of each tier are accepted, their blocks and value, and when the last of their prefills is
done. That time stands for the leftover budget: for equal counts, the earlier, the more is left. The
paper's own pruning gets this comparison wrong. Here a state is dropped for another one only where
that is sure to lose nothing, for this reason:

    The time at which a candidate is done, as a function of the time at which the one before it
    was, never falls: a candidate that starts earlier has done at least as much at any later time,
    and can always wait.

So a state with the same counts that is later, with no fewer blocks and no more value, leads
nowhere that the other does not. Accepted candidates hold their tier and blocks for good in
the program. `simulate` releases them at their predicted ends, which only takes load away, so
by the same argument it never finds an accepted set infeasible.

The program is fast because it looks for little: a set found by Moore's rule is mostly of the
highest value already, and `minserve.planner.admission.bounds` tells which states cannot lead to a
better one. Of the thousands of states a few dozen are left. Where more are left, the first pass
decides on `FIRST_WIDTH` of them behind each candidate and the second on `MAX_STATES` in all; what
that one puts off is left out. The set is then the best that was found, by the passes or by
`insert_greedily`, and `Admission.exact` is False: it is not proven that none is more valuable.
Beyond `MAX_CELLS` there is no search, and the set is that of `insert_greedily`. `bench/planner.py`
prints how often sets are proven to be the best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

from minserve.planner.admission import fluid_clock
from minserve.planner.admission.bounds import (
    ROUNDING,
    Rest,
    latest_s,
    least_blocks,
    loosened,
)
from minserve.planner.admission.cells import NEW, Cells, Row
from minserve.planner.admission.fluid_clock import NO_RATE, FluidClock
from minserve.planner.admission.outlook import Outlook
from minserve.planner.admission.prefill_rates import PrefillRates
from minserve.planner.admission.timeline import (
    Admission,
    Candidate,
    by_deadline,
    insert_greedily,
    simulate,
)

# Count vectors beyond which a decision would take too long.
MAX_CELLS = 50_000
# States decided on behind each candidate in the first pass, which nearly always finds the best set.
FIRST_WIDTH = 16
# States decided on in the second pass, which mostly proves it. More would take too long.
MAX_STATES = 2500
# Values that are no multiples of the smallest are rounded to so many units in all.
MAX_UNITS = 256


def admit(candidates: SequenceOf[Candidate], outlook: Outlook, rates: PrefillRates) -> Admission:
    """Return the most valuable set that was found of those that keep every deadline.

    Of several such sets it is the one done first, as far as the first pass finds it. Beyond
    `MAX_CELLS` it is the set of `insert_greedily`. There, and where the last pass had to leave
    states out, it is not proven to be the best, but worth as much as the set of `insert_greedily`.
    """
    program = _Program(candidates, outlook, rates)
    if program.most_seqs == sum(c.num_seqs for c in candidates):
        everyone = simulate(candidates, outlook, rates)
        if everyone.feasible:
            done_s = max(everyone.done_s, default=float(outlook.starts[0]))
            order = tuple(by_deadline(candidates))
            return Admission(order, True, sum(c.value for c in candidates), done_s)
    if program.cells.num_cells > MAX_CELLS:
        return insert_greedily(candidates, outlook, rates)
    found = program.solve() or _forced_alone(candidates, outlook, rates)
    if found.exact:
        return found
    return max(found, insert_greedily(candidates, outlook, rates), key=lambda one: one.value)


def _forced_alone(
    candidates: SequenceOf[Candidate], outlook: Outlook, rates: PrefillRates
) -> Admission:
    """Return the forced candidates if they fit once blocks are released in time.

    They do not fit for good.
    """
    forced = [i for i in by_deadline(candidates) if candidates[i].forced]
    under_way = [candidates[i] for i in forced]
    timeline = simulate(under_way, outlook, rates)
    if not timeline.feasible:
        return Admission((), False, 0.0, math.inf)
    return Admission(tuple(forced), True, sum(c.value for c in under_way), max(timeline.done_s))


class _DpState(NamedTuple):
    """A set of the first candidates that is accepted.

    Attributes:
        now: time in seconds at which the last of their prefills is done.
        segment: index of the segment that ``now`` lies in.
        cell: index of their counts; ``row`` holds the rates that these leave.
        blocks: number of blocks that they hold.
        units: their value in units, without the forced ones.
        position: position of the last one accepted, after those of ``before``.
    """

    now: float
    segment: int
    cell: int
    row: Row
    blocks: int = 0
    units: int = 0
    value: float = 0.0
    position: int = -1
    before: _DpState | None = None


class _Program:
    """One admission to decide, in deadline order; hopeless candidates are left out at once.

    Attributes:
        most_seqs: the most outputs that can be accepted.
    """

    def __init__(
        self, candidates: SequenceOf[Candidate], outlook: Outlook, rates: PrefillRates
    ) -> None:
        self._outlook, self._rates = outlook, rates
        self._starts = [*outlook.starts.tolist(), math.inf]
        self._free_from = outlook.free_from
        self._free = self._free_from[-1]
        # None accepted: no set leaves prefill more.
        self._clock = FluidClock(outlook.starts, np.maximum(rates(outlook.counts), NO_RATE))
        self._index, self.most_seqs = self._hopeful(candidates)
        self._candidates = [candidates[i] for i in self._index]
        self.cells = Cells(self._candidates, outlook, self.most_seqs)
        blocks = [c.blocks for c in self._candidates]
        self._is_tight = sum(blocks) > self._free_from[0]
        self._blocks = blocks if self._is_tight else [0] * len(blocks)

    def _hopeful(self, candidates: SequenceOf[Candidate]) -> tuple[list[int], int]:
        """Return the candidates that are in time if only the forced are accepted beside them, and
        the most outputs that can be served.

        The number of candidates is that of Moore (Management Science, 1968): in deadline order,
        drop the longest so far whenever one is late.
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
        """Return the best set that was found; ``None`` if not even the forced candidates fit."""
        last_s = max((c.deadline_s for c in self._candidates), default=0.0)
        self.cells.fill(self._rates, last_s)
        self._count_units()
        best = self._good_set()
        if best is None:
            return None
        last, is_proven = self._search(best) if any(self._units) else (best, True)
        state = last
        accepted = []
        while state.before is not None:
            accepted.append(self._index[state.position])
            state = state.before
        return Admission(tuple(accepted[::-1]), True, last.value, last.now, is_proven)

    def _count_units(self) -> None:
        """Count values as whole numbers of units: exactly, if all are multiples of the smallest."""
        values = [c.value for c in self._candidates if not c.forced]
        self._unit = min(values, default=1.0)
        most = MAX_UNITS * self._unit
        self._is_whole = sum(values) <= most and all(v % self._unit == 0 for v in values)
        if not self._is_whole:
            self._unit = sum(values) / MAX_UNITS
        self._units = [
            0 if c.forced else math.ceil(c.value / self._unit - ROUNDING) for c in self._candidates
        ]
        # What `_extend` needs of each candidate, at hand: it runs hundreds of times.
        self._items = [
            (stride, blocks, c.work, c.deadline_s, c.tier is not None, units, c.value)
            for c, stride, blocks, units in zip(
                self._candidates, self.cells.strides, self._blocks, self._units, strict=True
            )
        ]

    def _extend(self, states: SequenceOf[_DpState], k: int) -> list[_DpState]:
        """Accept the candidate at position ``k`` too, in every state in which that is feasible."""
        stride, more_blocks, work, deadline_s, is_paced, more_units, more_value = self._items[k]
        rows, starts, free_from = self.cells.rows, self._starts, self._free_from
        grown = []
        for state in states:
            end, segment, cell, row, blocks, units, value, _, _ = state
            cell += stride
            after = rows.get(cell) or self.cells.row(cell)
            if after is None:
                continue
            blocks += more_blocks
            if blocks > free_from[segment]:
                segment = next((j for j, free in enumerate(free_from) if blocks <= free), -1)
                if segment < 0:
                    continue
                end = starts[segment]
            end, segment, left = fluid_clock.run(work, end, segment, row[0], starts, deadline_s)
            if left > 0:
                continue
            if segment < after[1] and is_paced:
                segment = after[1]
                if segment == len(free_from) or starts[segment] > deadline_s:
                    continue
                end = starts[segment]
            units += more_units
            value += more_value
            new = NEW(_DpState, (end, segment, cell, after, blocks, units, value, k, state))
            grown.append(new)
        return grown

    def _extend_one(self, state: _DpState, k: int) -> _DpState | None:
        grown = self._extend((state,), k)
        return grown[0] if grown else None

    def _good_set(self) -> _DpState | None:
        """Return the best of some sets by Moore's rule and the set chosen before, as far as it
        still fits; ``None`` if the forced candidates do not fit.
        """
        work = max((c.work for c in self._candidates), default=0.0) or 1.0
        blocks = max(self._blocks, default=0) or 1
        sets = []
        for share in (0.0, 0.5, 1.0) if self._is_tight else (0.0,):
            weights = [
                ((1 - share) * c.work / work + share * c.blocks / blocks) / c.value
                for c in self._candidates
            ]
            found = self._by_moore(weights)
            if found is None:
                return None
            sets.append(found)
        known = self._nobody()
        for k, c in enumerate(self._candidates):
            if c.was_chosen or c.forced:
                after = self._extend_one(known, k)
                if after is None and c.forced:
                    break
                known = after or known
        else:
            sets.append(known)
        return max(sets, key=_merit)

    def _by_moore(self, weights: SequenceOf[float]) -> _DpState | None:
        """Accept candidates in deadline order; if one does not fit, drop the heaviest so far."""
        state = self._nobody()
        # Who is accepted, by position, each after the state before it.
        path: list[tuple[_DpState, int]] = []
        for k, candidate in enumerate(self._candidates):
            after = self._extend_one(state, k)
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
                    # Without the heaviest one they still fit.
                    (other,) = self._extend((other,), i)
                after = self._extend_one(other, k)
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
        return _DpState(self._starts[0], 0, 0, self.cells.row_at(0, 0))

    def _search(self, best: _DpState) -> tuple[_DpState, bool]:
        """Look for the best set, in passes: each goes on from the states that the one before it
        put off, as far as they may still lead to something better than what was found meanwhile.

        Args:
            best: a set to be better than: more valuable, or as valuable and done earlier.

        Returns:
            the best set that was found, and whether it is proven that none is more valuable.
        """
        todo: list[list[_DpState]] = [[] for _ in range(len(self._candidates) + 1)]
        todo[0].append(self._nobody())
        bounded: _DpState | None = None
        for width in (FIRST_WIDTH, max(FIRST_WIDTH, MAX_STATES // len(self._candidates))):
            if best is not bounded:
                # A set of the same value that is done earlier is worth a look, not a second one.
                rest = self._rest(best, or_earlier=bounded is None)
                latest = latest_s(rest, self.cells.limits)
                least = least_blocks(rest) if self._is_tight else None
                bounded = best
            best = max([best, *self._pass(todo, latest, least, width)], key=_merit)
            if not any(todo):
                return best, True
        return best, False

    def _pass(
        self,
        todo: list[list[_DpState]],
        latest: list[list[list[float]]],
        least: list[list[float]] | None,
        width: int,
    ) -> list[_DpState]:
        """Go through the candidates once, and decide on each in at most so many states.

        Args:
            todo: states in which a candidate is still to be decided on, by the candidate's
                position. They are taken out, and those that are put off are put in.

        Returns:
            states in which all candidates are decided on.
        """
        frontier: list[_DpState] = []
        for k in range(len(self._candidates)):
            if todo[k]:
                late = [of_kind[k] for of_kind in latest]
                few = None if least is None else least[k]
                frontier += self._hopeful_of(todo[k], late, few)
                todo[k] = []
            if len(frontier) > width:
                frontier.sort(key=_backlog)
                todo[k] = frontier[width:]
                del frontier[width:]
            if frontier:
                late = [of_kind[k + 1] for of_kind in latest]
                few = None if least is None else least[k + 1]
                frontier = self._next(frontier, k, late, few)
        return frontier

    def _next(
        self,
        frontier: list[_DpState],
        k: int,
        late: list[list[float]],
        few: list[float] | None,
    ) -> list[_DpState]:
        """Decide on the candidate at position ``k`` in every state.

        Args:
            late: time in seconds until which a state must be done, by kind of clock and number of
                units.
            few: number of blocks that it takes beside its own, by number of units.

        Returns:
            the states that may still reach the target, none of them dominated by another.
        """
        grown = self._extend(frontier, k)
        states = grown if self._candidates[k].forced else frontier + grown
        groups: dict[int, list[_DpState]] = {}
        for one in self._hopeful_of(states, late, few):
            group = groups.get(one[2])
            if group is None:
                groups[one[2]] = [one]
            else:
                _offer(group, one)
        return [state for group in groups.values() for state in group]

    def _hopeful_of(
        self, states: list[_DpState], late: list[list[float]], few: list[float] | None
    ) -> list[_DpState]:
        """Return those states that may still reach the target; arguments as in `_next`."""
        # By index, since names of a named tuple are looked up slowly: 0 is `now`, 3 the row, 4
        # the blocks, 5 the units.
        if few is None:
            return [one for one in states if one[0] <= late[one[3][2]][one[5]]]
        return [
            one
            for one in states
            if one[0] <= late[one[3][2]][one[5]] and one[4] + few[one[5]] <= self._free
        ]

    def _rest(self, best: _DpState, *, or_earlier: bool) -> Rest:
        """Return the target: one unit more than the best set has, or as much value as it has."""
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
            end_s=best.now if self._is_whole and or_earlier else -math.inf,
        )


def _merit(state: _DpState) -> tuple[float, float]:
    return state.value, -state.now


def _backlog(state: _DpState) -> tuple[int, float]:
    """Return a key that is least for the state to keep first: of most value, then done first."""
    return -state.units, state.now


def _offer(group: list[_DpState], one: _DpState) -> None:
    """Add a state to those of its cell unless one of these dominates it; take out those it
    dominates.
    """
    for other in group:
        if other.now <= one.now and other.blocks <= one.blocks and other.value >= one.value:
            return
    group[:] = [
        other
        for other in group
        if other.now < one.now or other.blocks < one.blocks or other.value > one.value
    ]
    group.append(one)
