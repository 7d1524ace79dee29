"""`Cells`: the rates that accepted requests leave, for each number of them in each tier.

A cell is a count vector, written as one number: how many outputs of each tier are accepted.
Candidates without a pace have a dimension of their own, which demands nothing. Of the cells only
those are looked at whose counts are sums of some candidates' outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import numpy as np

from minserve.planner.admission.bounds import Floats, slowdown
from minserve.planner.admission.fluid_clock import NO_RATE, FluidClock
from minserve.planner.admission.outlook import Outlook
from minserve.planner.admission.prefill_rates import PrefillRates
from minserve.planner.admission.timeline import Candidate, first_steady

# Share of the time until the last deadline.
WORTH_A_CLOCK = 0.1
# Named tuples have a slow constructor, and there may be a thousand of them.
NEW = tuple.__new__


class Row(NamedTuple):
    """The rates that a cell leaves.

    Attributes:
        rates: prefill rate of each segment.
        steady: the first segment from which on all decodes keep their pace.
        kind: number of the kind of clock that bounds the cell.
    """

    rates: list[float]
    steady: int
    kind: int


class Cells:
    """The cells of one admission. `fill` computes their rates, which takes most of the time.

    Args:
        candidates: those that may be accepted, in deadline order.
        outlook: what the others take.
        most_seqs: the most outputs that can be accepted.

    Attributes:
        num_cells: how many cells there are.
        strides: for each candidate, what its acceptance adds to the number of a cell.
        rows: the rates that were looked up so far, by cell.
        limits: for each kind of set, the clock of its fastest cell and its `slowdown`.
    """

    def __init__(self, candidates: SequenceOf[Candidate], outlook: Outlook, most_seqs: int) -> None:
        self._outlook, self._most_seqs = outlook, most_seqs
        self.rows: dict[int, Row] = {}
        self.limits: list[tuple[FluidClock, Floats]] = []
        num_tiers = outlook.counts.shape[1]
        sizes: list[list[int]] = [[] for _ in range(num_tiers + 1)]
        for c in candidates:
            sizes[num_tiers if c.tier is None else c.tier].append(c.num_seqs)
        # Without requests of several outputs a cell's number is also its place in the grid.
        self._is_plain = all(c.num_seqs == 1 for c in candidates)
        self._totals = [
            list(range(len(own) + 1)) if self._is_plain else _sums(own, most_seqs) for own in sizes
        ]
        self.num_cells = math.prod(len(own) for own in self._totals)
        # Of a cell's number, per dimension: one more output is so much.
        self._units_of = [
            math.prod(sum(own) + 1 for own in sizes[d + 1 :]) for d in range(num_tiers + 1)
        ]
        self.strides = [
            c.num_seqs * self._units_of[num_tiers if c.tier is None else c.tier] for c in candidates
        ]

    def fill(self, rates: PrefillRates, last_s: float) -> None:
        """Compute the rates of every cell that can be reached, and a clock for each kind of set.

        The tightest TPOT present sets how often the constant cost of a batch is paid. Sets with one
        of a tier that is tighter than all that run for long have a clock of their own.

        Args:
            last_s: the last deadline of the candidates.
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
        kept = (size <= self._most_seqs).nonzero()[0]
        self._counts, size = counts.take(kept, axis=1), size.take(kept)
        column = np.full(self.num_cells, -1)
        column[kept] = np.arange(len(kept))
        self._column = column.tolist()
        self._table = rates.of_sums(self._outlook.counts, self._counts[:-1].T)
        self._rates_of = np.ascontiguousarray(self._table.T)
        # Seconds, until the last deadline, in which no sequence of a tier or a tighter one decodes.
        spans = np.diff(np.minimum([*self._outlook.starts.tolist(), math.inf], last_s))
        absent = spans @ (np.cumsum(self._outlook.counts, axis=1) == 0)
        kinds = [
            tier
            for tier, count in enumerate(self._counts[:-1])
            if count.any() and absent[tier] > WORTH_A_CLOCK * spans.sum()
        ]
        for tier in (None, *kinds):
            columns = slice(None) if tier is None else self._counts[tier].nonzero()[0]
            own = np.maximum(self._table[:, columns], NO_RATE)
            fastest = own.max(axis=1)
            clock = FluidClock(self._outlook.starts, fastest)
            self.limits.append((clock, slowdown(own, fastest, size[columns])))
        # Looked up for hundreds of cells, hence found for all of them at once.
        self._is_slow = (self._table.min(axis=0) < NO_RATE).tolist()
        kind = np.zeros(len(kept), dtype=np.int64)
        for number, tier in reversed(list(enumerate(kinds, 1))):
            kind[self._counts[tier] > 0] = number
        self._kind = kind.tolist()

    def row(self, cell: int) -> Row | None:
        """Return the row of a cell; ``None`` for a cell with more outputs than can be accepted."""
        column = self._column[cell] if self._is_plain else self._column_of(cell)
        return None if column < 0 else self.row_at(cell, column)

    def row_at(self, cell: int, column: int) -> Row:
        """Return the row of a cell that has this column of the table, and keep it."""
        rates, steady = self._rates_of[column].tolist(), 0
        if self._is_slow[column]:
            steady = first_steady(rates)
            rates = [max(rate, NO_RATE) for rate in rates]
        self.rows[cell] = row = NEW(Row, (rates, steady, self._kind[column]))
        return row

    def _column_of(self, cell: int) -> int:
        """Return a cell's column of the table; below 0 for a cell that is not in it."""
        place = 0
        for unit, places in zip(self._units_of, self._places, strict=True):
            count, cell = divmod(cell, unit)
            if count not in places:
                return -1
            place = place * len(places) + places[count]
        return self._column[place]


def _sums(sizes: SequenceOf[int], most: int) -> list[int]:
    """Return the sums of some of the sizes, from 0 for none of them to at most ``most``."""
    # Bit s of the number is set where s is such a sum.
    found, mask = 1, (1 << (most + 1)) - 1
    for size in sizes:
        found |= (found << size) & mask
    return [total for total in range(found.bit_length()) if found >> total & 1]
