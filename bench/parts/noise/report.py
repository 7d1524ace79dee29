"""Tables and figures of `noise.py`: regret over the grid, and capacity by noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any

from minserve.simulator.simulation import promises
from minserve.tables import text_table
from minserve.workload.report import percentile
from parts.noise.grid import Grid, NoiseCell
from shared.simulated.jobs import Measured

# The policy whose regret is measured.
JUDGED = "dp"
# Number of cells that tables and the last line name.
MOST_NAMED = 10


def rows_of(grid: Grid, found: Measured) -> list[dict[str, Any]]:
    """Return a row for each cell that was measured: attainment by policy, and the regret.

    ``regret`` is the attainment of the best other policy minus that of `JUDGED`. ``spread`` is
    the standard error of that difference: the larger of the seeds' own and that of independent
    requests. ``simple_regret`` leaves out the other policies that promise SLOs, which have
    most of their planning in common with `JUDGED`.
    """
    rows = []
    for cell in grid.cells():
        runs = grid.runs(cell, found)
        each = {p: [found(run) for run in own] for p, own in runs.items()}
        if not each or any(one is None for own in each.values() for one in own):
            continue
        shares = {p: [one["attainment"] for one in own] for p, own in each.items()}
        offered = sum(one["offered"] for one in next(iter(each.values())))
        rows.append(_row(grid, cell, shares, offered, found))
    return rows


def _row(
    grid: Grid, cell: NoiseCell, shares: dict[str, list[float]], offered: int, found: Measured
) -> dict[str, Any]:
    means = {policy: statistics.fmean(each) for policy, each in shares.items()}
    row: dict[str, Any] = {
        "cell": cell.name,
        **{name: value for name, value in cell.values.items() if name != "part"},
        "rate": round(cell.load * grid.capacity_of(cell.setting, found), 4),
        "requests": offered,
        "attainment": {policy: round(mean, 4) for policy, mean in means.items()},
        "seeds": {policy: [round(one, 4) for one in each] for policy, each in shares.items()},
    }
    others = {policy: mean for policy, mean in means.items() if policy != JUDGED}
    if JUDGED in means and others:
        best = max(others, key=lambda policy: others[policy])
        row["best_other"] = best
        row["regret"] = round(others[best] - means[JUDGED], 4)
        row["spread"] = round(spread(shares[best], shares[JUDGED], offered), 4)
        simple = [mean for policy, mean in others.items() if not promises(policy)]
        if simple:
            row["simple_regret"] = round(max(simple) - means[JUDGED], 4)
    return row


def spread(one: Sequence[float], other: Sequence[float], offered: int) -> float:
    """Return the standard error of the difference of two mean attainments.

    Args:
        one, other: attainments by seed, with the same seeds in both.
        offered: number of requests over all seeds.
    """
    variances = (mean * (1 - mean) for mean in (statistics.fmean(one), statistics.fmean(other)))
    binomial = math.sqrt(sum(variances) / offered)
    differences = [a - b for a, b in zip(one, other, strict=True)]
    if len(differences) < 2:
        return binomial
    return max(binomial, statistics.stdev(differences) / math.sqrt(len(differences)))


def summary(grid: Grid, found: Measured, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of the last line."""
    judged = [row for row in rows if "regret" in row]
    figures: dict[str, Any] = {"cells": len(rows)}
    if judged:
        named = sorted(judged, key=lambda row: -row["regret"])[:MOST_NAMED]
        regrets = [row["regret"] for row in judged]
        figures["worst_regret"] = _named(named[0])
        figures["worst_cells"] = [_named(row) for row in named]
        figures["mean_regret"] = _mean(judged)
        figures["mean_positive_regret"] = round(statistics.fmean(max(0, r) for r in regrets), 4)
        simple = [row["simple_regret"] for row in judged if "simple_regret" in row]
        figures["mean_simple_regret"] = round(statistics.fmean(simple), 4) if simple else None
        figures["p90_regret"] = round(percentile(regrets, 0.9), 4)
        # Cells in which the regret exceeds two standard errors.
        figures["behind"] = sum(row["regret"] > 2 * row["spread"] for row in judged)
        figures["mean_regret_by"] = {
            axis: _means_by(sorted(judged, key=itemgetter(axis)), axis)
            for axis in ("device", "tight", "scenario", "kind", "noise", "load")
        }
        figures["mean_attainment"] = {
            policy: round(statistics.fmean(row["attainment"][policy] for row in rows), 4)
            for policy in grid.policies
        }
    return figures | _capacities(grid, found)


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _named(row: dict[str, Any]) -> dict[str, Any]:
    names = ("cell", "regret", "spread", "best_other", "attainment")
    return {name: row[name] for name in names}


def _means_by(rows: Iterable[dict[str, Any]], axis: str) -> dict[str, float]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_text(row[axis]), []).append(row)
    return {name: _mean(own) for name, own in groups.items()}


def _mean(rows: Sequence[dict[str, Any]]) -> float:
    return round(statistics.fmean(row["regret"] for row in rows), 4)


def _capacities(grid: Grid, found: Measured) -> dict[str, Any]:
    """Return capacities by scenario and noise, and as shares of the noise-free capacity."""
    figures: dict[str, dict[str, dict[str, float | None]]] = {}
    for scenario, noise, told, job in grid.capacities():
        result = found(job)
        if result is not None:
            name = "clairvoyant_capacity_at_noise" if told else "capacity_at_noise"
            line = figures.setdefault(name, {}).setdefault(scenario, {})
            line[f"{noise:g}"] = result["capacity"]
    quiet = {s: line.get("0") for s, line in figures.get("capacity_at_noise", {}).items()}
    for name, lines in list(figures.items()):
        figures[name.replace("capacity", "capacity_ratio")] = {
            scenario: {noise: round(rate / quiet[scenario], 3) for noise, rate in line.items() if rate}
            for scenario, line in lines.items()
            if quiet.get(scenario)
        }  # fmt: skip
    return figures


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def _shares(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {100 * one:.0f}%" for name, one in row["attainment"].items())


def table(figures: dict[str, Any]) -> str:
    """Return the figures as lines of text."""
    lines = []
    if "worst_regret" in figures:
        worst = [
            (row["cell"], _shares(row), f"{row['regret']:+.3f}", f"{row['spread']:.3f}")
            for row in figures["worst_cells"]
        ]
        lines += [
            f"{figures['cells']} cells; regret of {JUDGED} against the best of the others: mean "
            f"{figures['mean_regret']:+.3f} (counted from 0: {figures['mean_positive_regret']:.3f})"
            f", p90 {figures['p90_regret']:+.3f}; clearly behind in {figures['behind']}",
            f"against the best of those that promise nothing: {_signed(figures['mean_simple_regret'])}",
            "",
            text_table(("worst cells", "attainment", "regret", "+-"), worst, left=2),
            "",
        ]
        for axis, means in figures["mean_regret_by"].items():
            lines.append(f"by {axis:<10}" + ", ".join(f"{k} {v:+.3f}" for k, v in means.items()))
        lines.append("")
    for name in ("capacity_at_noise", "clairvoyant_capacity_at_noise"):
        for scenario, line in figures.get(name, {}).items():
            ratios = figures[name.replace("capacity", "capacity_ratio")].get(scenario, {})
            cells = (
                f"{noise}: {rate} ({ratios.get(noise, 0):.2f})" for noise, rate in line.items()
            )
            lines.append(f"{name.replace('_', ' ')}, {scenario:<14} {'  '.join(cells)}")
    return "\n".join(lines)
