"""Capacities, ratios, table and picture of `versus_vllm.py`, computed from paired turns."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from minserve.tables import text_table
from minserve.workload.plots import COLOURS, attainment_figure, draw_attainment, save
from shared.paired.curves import (
    Capacities,
    Difference,
    by_group,
    curve_of,
    in_percent,
    left_out_words,
    mean,
    percent,
    rounded,
)
from shared.paired.turns import RULE, Cell, Pairs

OURS_COLOUR = COLOURS[0]
HEADINGS = ("scenario", "req/s", "ours", "theirs", "difference (95%)", "pairs", "left out")


def summary(pairs: Pairs, cells: Sequence[Cell], ours: str, peers: Sequence[str]) -> dict[str, Any]:
    """Return by peer and scenario the capacities with their ratio, and the results at each rate.

    Args:
        ours, peers: labels of servers; minserve's is compared with each peer's.
    """
    return {
        "rule": RULE,
        "peers": {peer: _beside(pairs, cells, ours, peer) for peer in peers},
    }


def _beside(pairs: Pairs, cells: Sequence[Cell], ours: str, peer: str) -> dict[str, Any]:
    scenarios, ratios = {}, []
    for group, own in by_group(cells).items():
        found = Capacities.of(curve_of(pairs, own, ours, peer))
        exact = found is not None and found.ratio is not None and not found.ratio.bound
        if exact:
            ratios.append(found.ratio.value)
        scenarios[group] = {
            "capacity": None if found is None else found.to_dict(),
            "rates": {f"{cell.rate:g}": _rate(pairs, cell, ours, peer) for cell in own},
        }
    whole = len(ratios) == len(scenarios)
    ratio = rounded(statistics.geometric_mean(ratios)) if ratios and whole else None
    return {"ratio": ratio, "scenarios": scenarios}


def _rate(pairs: Pairs, cell: Cell, ours: str, peer: str) -> dict[str, Any]:
    kept = pairs.kept(cell, ours, peer)
    shares = [(a.attainment, b.attainment) for a, b in kept]
    means = [(a.attainment_mean, b.attainment_mean) for a, b in kept]
    left_out = pairs.left_out(cell, ours, peer)
    return {
        "ours": mean(one for one, _ in shares),
        "theirs": mean(one for _, one in shares),
        "ours_mean_form": mean(one for one, _ in means),
        "theirs_mean_form": mean(one for _, one in means),
        "difference": Difference.of(shares).to_dict(),
        "left_out": dict(left_out),
    }


def table(result: Mapping[str, Any]) -> str:
    """Return lines for the terminal: the rates of each scenario, then its capacities."""
    lines = []
    for peer, found in result["peers"].items():
        lines.append(f"beside {peer}: % of offered requests that kept their SLO")
        rows = [
            (group, *_cells(rate, row))
            for group, one in found["scenarios"].items()
            for rate, row in one["rates"].items()
        ]
        lines.append(text_table(HEADINGS, rows))
        for group, one in found["scenarios"].items():
            lines.append(f"{group}: {_capacity(one['capacity'])}")
        if found["ratio"] is not None:
            lines.append(f"geometric mean of the ratios: {found['ratio']:.2f}")
        measured = [row for one in found["scenarios"].values() for row in one["rates"].values()]
        lines.append(left_out_words(row["left_out"] for row in measured))
    return "\n".join(lines)


def _cells(rate: str, row: Mapping[str, Any]) -> tuple[object, ...]:
    return (
        rate,
        percent(row["ours"]),
        percent(row["theirs"]),
        in_percent(row["difference"]),
        row["difference"]["pairs"],
        sum(row["left_out"].values()),
    )


def _capacity(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "no pairs that may be compared"
    return "capacity: " + ", ".join(
        f"{name} {_point(found[name])}" for name in ("ours", "theirs", "ratio")
    )


def _point(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return "unknown"
    low, high = one["interval"]
    return f"{one['bound']} {one['value']:.2f} ({low:.2f} to {high:.2f})".strip()


def plot(pairs: Pairs, cells: Sequence[Cell], ours: str, peers: Sequence[str], file: str) -> None:
    """Save attainment against rate, a panel per scenario; the band is the spread of the turns.

    Raises:
        WorkloadError: if it cannot be drawn or written.
    """
    groups = by_group(cells)
    figure, panels = attainment_figure(list(groups))
    for panel, own in zip(panels, groups.values(), strict=True):
        for number, peer in enumerate(peers):
            curve = curve_of(pairs, own, ours, peer)
            sides = [(peer, 1, COLOURS[-1 - number])]
            if number == 0:
                sides.insert(0, (ours, 0, OURS_COLOUR))
            for label, side, colour in sides:
                line = {rate: [pair[side] for pair in each] for rate, each in curve.items()}
                draw_attainment(panel, label, line, color=colour)
    save(figure, file)
