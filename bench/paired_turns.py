"""Comparing servers on a machine whose speed changes: short turns in pairs, and what they say.

All servers are up side by side, all idle but one. A pair is one turn of each with the same
requests; two pairs of a cell follow each other in palindromic order, and the next round begins
with another server, so that a steady drift weighs on all alike::

    round 0   A B B A      pairs 0 and 1 of each cell
    round 1   B A A B      pairs 2 and 3

Lone requests before and after each turn tell the machine's speed. Pairs whose turns were at
speeds too different are left out; what is compared are differences within pairs.

Here is what is to be run, what came out, and which of it may be compared. `paired_runs` makes
the turns, `paired_curves` sums them up.
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

# Of a pair, the slower turn's speed may be so much below the faster one's.
SPEED_TOLERANCE = 0.15
# And other work may have taken so many more cores beside one turn than beside the other.
CORES_TOLERANCE = 0.15
RULE = (
    f"left out: pairs whose speeds differ by over {SPEED_TOLERANCE:.0%}, or beside whose turns "
    f"other work differs by over {CORES_TOLERANCE:g} cores"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One load to be compared under.

    Attributes:
        rate: requests per second.
        tight, loose: paces, as multiples of a lone request's time per token.
        busy: another process takes a core meanwhile.
    """

    scenario: str
    rate: float
    tight: float
    loose: float
    busy: bool = False

    @property
    def group(self) -> str:
        """What cells have in common that differ by their rate alone."""
        beside = ", beside a busy process" if self.busy else ""
        return f"{self.scenario}, paces {self.tight:g} and {self.loose:g}{beside}"

    @property
    def name(self) -> str:
        return f"{self.group}, {self.rate:g}/s"


@dataclass(frozen=True, slots=True)
class Slot:
    """One turn that is to come."""

    cell: Cell
    pair: int
    system: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came out of one turn.

    Attributes:
        cell: its name.
        attainment, attainment_mean: of all offered, in the deadline and in the mean form.
        lone_before_s, lone_after_s: a lone request's time per token.
        cores_server, cores_client: kept busy by these, on average.
        cores_idle: by the other servers, which should be idle.
        cores_elsewhere: by all others but the busy process that belongs to the cell.
        send_lag_p99_s: how late the client itself was.
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
        """How fast the machine was, by this server: seconds per token."""
        return (self.lone_before_s + self.lone_after_s) / 2


def schedule(cells: Sequence[Cell], systems: Sequence[str], pairs: int) -> list[Slot]:
    """All turns in their order. Every round goes through all cells, so that an interrupted run
    knows something of each.

    Args:
        pairs: of each cell.
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
    """All that was measured, kept in a file so that an interrupted benchmark goes on.

    Attributes:
        settings: what results depend on; a file with others is not taken.
        reference: the idle speed that all SLOs are meant by, once it is known.
    """

    settings: Mapping[str, Any]
    file: Path | None = None
    reference: Reference | None = None
    results: list[Result] = field(default_factory=list)

    @classmethod
    def resume(cls, file: Path, settings: Mapping[str, Any], systems: Sequence[str]) -> TurnStore:
        """What a file has, less the turns of pairs that are not whole: their other turns would
        be made at another time.

        Raises:
            SystemExit: where it cannot be read, or was made with other settings.
        """
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            theirs, rows, reference = kept["settings"], kept["results"], kept["reference"]
            results = [Result(**row) for row in rows]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"cannot go on from {file}: {error!r}") from None
        # Through JSON, which knows no tuples.
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
        # Written beside and renamed: an interruption leaves the old file whole.
        beside = self.file.with_suffix(".part")
        beside.write_text(json.dumps(content), encoding="utf-8")
        beside.replace(self.file)

    def add(self, result: Result) -> None:
        self.results.append(result)
        self.save()

    def missing(self, slots: Iterable[Slot]) -> list[Slot]:
        """Turns without a result."""
        done = {(one.cell, one.pair, one.system) for one in self.results}
        return [one for one in slots if (one.cell.name, one.pair, one.system) not in done]


class Pairs:
    """Results by cell and pair, and which pairs may be compared."""

    def __init__(self, results: Iterable[Result]) -> None:
        self._results = {(one.cell, one.pair, one.system): one for one in results}
        lone: dict[str, list[float]] = {}
        for one in self._results.values():
            lone.setdefault(one.system, []).append(one.lone_s)
        # Servers differ in their own speed: each turn's counts relative to its server's usual.
        self._usual_s = {system: statistics.median(each) for system, each in lone.items()}

    def slowness(self, result: Result) -> float:
        """A lone request's time around a turn, over the usual one on the same server."""
        return result.lone_s / self._usual_s[result.system]

    def of(self, cell: Cell, system: str) -> list[Result]:
        """All turns of a server in a cell, by pair."""
        own = [
            one for one in self._results.values() if (one.cell, one.system) == (cell.name, system)
        ]
        return sorted(own, key=lambda one: one.pair)

    def kept(self, cell: Cell, one: str, other: str) -> list[tuple[Result, Result]]:
        """The pairs of two servers that may be compared."""
        return [pair for pair in self._both(cell, one, other) if self._fault(*pair) is None]

    def left_out(self, cell: Cell, one: str, other: str) -> Counter[str]:
        """The other pairs, by what was wrong with them."""
        faults = [self._fault(*pair) for pair in self._both(cell, one, other)]
        return Counter(fault for fault in faults if fault is not None)

    def _both(self, cell: Cell, one: str, other: str) -> list[tuple[Result, Result]]:
        others = {result.pair: result for result in self.of(cell, other)}
        return [(ours, others[ours.pair]) for ours in self.of(cell, one) if ours.pair in others]

    def _fault(self, one: Result, other: Result) -> str | None:
        """Why two turns cannot be compared, if so."""
        low, high = sorted((self.slowness(one), self.slowness(other)))
        if high > low * (1 + SPEED_TOLERANCE):
            return "speed changed"
        if abs(one.cores_elsewhere - other.cores_elsewhere) > CORES_TOLERANCE:
            return "other work beside one turn"
        return None
