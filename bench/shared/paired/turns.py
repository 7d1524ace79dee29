"""Comparison of servers on a machine whose speed changes: short turns in pairs, and their results.

All servers are up side by side, and all but one are idle. A pair is one turn of each server with
the same requests. Two pairs of a cell follow each other in palindromic order, and the next round
begins with another server, so that a steady drift affects all servers alike::

    round 0   A B B A      pairs 0 and 1 of each cell
    round 1   B A A B      pairs 2 and 3

Lone requests before and after each turn measure the machine's speed. Pairs whose turns were at
too different speeds are left out; differences are compared within pairs only.

This file defines the turns, their results, and which results may be compared. `runs.py` makes
the turns, `curves.py` computes their statistics.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minserve.workload.reference import Reference

# In a pair, the slower turn's speed may be this share below the faster one's.
SPEED_TOLERANCE = 0.15
# Other work may have taken at most so many more cores beside one turn than beside the other.
CORES_TOLERANCE = 0.15
RULE = (
    f"left out: pairs whose speeds differ by over {SPEED_TOLERANCE:.0%}, or beside whose turns "
    f"other work differs by over {CORES_TOLERANCE:g} cores"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A load under which servers are compared.

    Attributes:
        rate: requests per second.
        tight, loose: paces, as multiples of a lone request's time per token.
        busy: true if another process takes a core at the same time.
    """

    scenario: str
    rate: float
    tight: float
    loose: float
    busy: bool = False

    @property
    def group(self) -> str:
        """The name of the group of cells that differ only by their rate."""
        beside = ", beside a busy process" if self.busy else ""
        return f"{self.scenario}, paces {self.tight:g} and {self.loose:g}{beside}"

    @property
    def name(self) -> str:
        return f"{self.group}, {self.rate:g}/s"


@dataclass(frozen=True, slots=True)
class Slot:
    """A turn that is to be run."""

    cell: Cell
    pair: int
    system: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The result of one turn.

    Attributes:
        cell: the cell's name.
        attainment, attainment_mean: of all offered requests, in the deadline and in the mean form.
        lone_before_s, lone_after_s: seconds per token of a lone request, before and after.
        cores_server, cores_client: cores kept busy by the server and the client, on average.
        cores_idle: cores kept busy by the other servers, which should be idle.
        cores_elsewhere: cores kept busy by all other processes, without the cell's busy process.
        send_lag_p99_s: how late the client itself sent.
        report: all numbers of the turn.
    """

    cell: str
    pair: int
    system: str
    attainment: float
    attainment_mean: float
    lone_before_s: float
    lone_after_s: float
    cores_server: float
    cores_client: float
    cores_idle: float
    cores_elsewhere: float
    send_lag_p99_s: float
    report: Mapping[str, Any]

    @property
    def lone_s(self) -> float:
        """The machine's speed in this turn, by this server: a lone request's seconds per token."""
        return (self.lone_before_s + self.lone_after_s) / 2


def schedule(cells: Sequence[Cell], systems: Sequence[str], pairs: int) -> list[Slot]:
    """Return all turns in their order.

    Every round goes through all cells, so that an interrupted run has results of each cell.

    Args:
        pairs: number of pairs of each cell.
    """
    slots = []
    for turn in range(math.ceil(pairs / 2)):
        first = turn % len(systems)
        order = [*systems[first:], *systems[:first]]
        for cell in cells:
            for pair in range(2 * turn, min(pairs, 2 * turn + 2)):
                slots += [
                    Slot(cell, pair, one) for one in (order if pair % 2 == 0 else order[::-1])
                ]
    return slots


@dataclass(slots=True)
class TurnStore:
    """All results, kept in a file so that an interrupted benchmark can continue.

    Attributes:
        settings: values on which results depend; a file with other settings is refused.
        reference: the idle speed of which all SLOs are multiples, once it is known.
    """

    settings: Mapping[str, Any]
    file: Path | None = None
    reference: Reference | None = None
    results: list[Result] = field(default_factory=list)

    @classmethod
    def resume(cls, file: Path, settings: Mapping[str, Any], systems: Sequence[str]) -> TurnStore:
        """Return the store that a file holds, without the turns of incomplete pairs.

        The other turns of such a pair would be run at another time.

        Raises:
            SystemExit: if the file cannot be read, or has other settings.
        """
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            theirs, rows, reference = kept["settings"], kept["results"], kept["reference"]
            results = [Result(**row) for row in rows]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"cannot go on from {file}: {error!r}") from None
        # Through JSON, which has no tuples.
        ours = json.loads(json.dumps(settings))
        if theirs != ours:
            differ = [k for k in ours | theirs if ours.get(k) != theirs.get(k)]
            raise SystemExit(f"{file} was made with other settings: {', '.join(differ)}")
        found = Counter((one.cell, one.pair) for one in results)
        whole = [one for one in results if found[one.cell, one.pair] == len(systems)]
        speed = None if reference is None else Reference.from_dict(reference)
        return cls(settings, file, speed, whole)

    def save(self) -> None:
        if self.file is None:
            return
        content = {
            "settings": self.settings,
            "reference": None if self.reference is None else self.reference.to_dict(),
            "results": [asdict(one) for one in self.results],
        }
        # Written to another file and renamed: an interruption leaves the old file whole.
        beside = self.file.with_suffix(".part")
        beside.write_text(json.dumps(content), encoding="utf-8")
        beside.replace(self.file)

    def add(self, result: Result) -> None:
        self.results.append(result)
        self.save()

    def missing(self, slots: Iterable[Slot]) -> list[Slot]:
        """Return the turns without a result."""
        done = {(one.cell, one.pair, one.system) for one in self.results}
        return [one for one in slots if (one.cell.name, one.pair, one.system) not in done]


class Pairs:
    """Results by cell and pair, and the decision which pairs may be compared."""

    def __init__(self, results: Iterable[Result]) -> None:
        self._results = {(one.cell, one.pair, one.system): one for one in results}
        lone: dict[str, list[float]] = {}
        for one in self._results.values():
            lone.setdefault(one.system, []).append(one.lone_s)
        # Servers differ in their own speed: each turn's speed is relative to its server's median.
        self._usual_s = {system: statistics.median(each) for system, each in lone.items()}

    def slowness(self, result: Result) -> float:
        """Return a lone request's time around a turn, over the median on the same server."""
        return result.lone_s / self._usual_s[result.system]

    def of(self, cell: Cell, system: str) -> list[Result]:
        """Return all turns of a server in a cell, by pair."""
        own = [
            one for one in self._results.values() if (one.cell, one.system) == (cell.name, system)
        ]
        return sorted(own, key=lambda one: one.pair)

    def kept(self, cell: Cell, one: str, other: str) -> list[tuple[Result, Result]]:
        """Return the pairs of two servers that may be compared."""
        return [pair for pair in self._both(cell, one, other) if self._fault(*pair) is None]

    def left_out(self, cell: Cell, one: str, other: str) -> Counter[str]:
        """Return the number of the other pairs by their fault."""
        faults = [self._fault(*pair) for pair in self._both(cell, one, other)]
        return Counter(fault for fault in faults if fault is not None)

    def _both(self, cell: Cell, one: str, other: str) -> list[tuple[Result, Result]]:
        others = {result.pair: result for result in self.of(cell, other)}
        return [(ours, others[ours.pair]) for ours in self.of(cell, one) if ours.pair in others]

    def _fault(self, one: Result, other: Result) -> str | None:
        """Return why two turns cannot be compared; ``None`` if they can."""
        low, high = sorted((self.slowness(one), self.slowness(other)))
        if high > low * (1 + SPEED_TOLERANCE):
            return "speed changed"
        if abs(one.cores_elsewhere - other.cores_elsewhere) > CORES_TOLERANCE:
            return "other work beside one turn"
        return None
