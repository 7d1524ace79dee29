"""The picture of `noise.py`: regret over the grid, and capacity by noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minserve.workload.plots import COLOURS, figure_of, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Regret that has the darkest colour.
MOST_REGRET = 0.5
INCHES = (15.0, 9.0)


def draw(results: Mapping[str, Any], file: Path) -> None:
    """Draw the results that there are.

    Args:
        results: as in the file of JSON.

    Raises:
        WorkloadError: if the file cannot be written.
    """
    rows = [row for row in results["rows"] if "regret" in row]
    capacities = results.get("capacity_at_noise")
    drawn = [*([1.8] if rows else []), *([1.0] if capacities else [])]
    if not drawn:
        return
    figure, panels = figure_of(len(drawn), width_ratios=drawn)
    if rows:
        _heat_map(panels[0], rows)
    if capacities:
        told = results.get("clairvoyant_capacity_at_noise", {})
        _capacities(panels[-1], capacities, told)
    figure.set_size_inches(*INCHES)
    save(figure, file)


def _heat_map(panel: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the largest regret over all loads, by setting and weather."""
    worst: dict[tuple[str, str], float] = {}
    for row in rows:
        key = (_setting(row), f"{row['kind']} {row['noise']:g}")
        worst[key] = max(worst.get(key, -math.inf), row["regret"])
    settings = list(dict.fromkeys(setting for setting, _ in worst))
    weathers = _weathers(rows)
    values = [[worst.get((s, w), math.nan) for w in weathers] for s in settings]
    panel.imshow(values, cmap="RdBu_r", vmin=-MOST_REGRET, vmax=MOST_REGRET, aspect="auto")
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            if not math.isnan(value):
                colour = "white" if abs(value) > 0.7 * MOST_REGRET else "black"
                text = f"{100 * value:+.0f}"
                panel.text(j, i, text, ha="center", va="center", color=colour, fontsize=7)
    panel.set_xticks(range(len(weathers)), weathers, rotation=40, ha="right", fontsize=8)
    panel.set_yticks(range(len(settings)), settings, fontsize=8)
    panel.set_title("best of the others less dp, in points of attainment: worst over loads")


def _setting(row: Mapping[str, Any]) -> str:
    tight = f" {row['tight']:g}" if row["tight"] else ""
    return f"{row['device']}{tight} {row['scenario']}"


def _weathers(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the weathers, by kind, then by noise."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    found = {(kinds.index(row["kind"]), row["noise"]) for row in rows}
    return [f"{kinds[kind]} {noise:g}" for kind, noise in sorted(found)]


def _capacities(
    panel: Axes,
    capacities: Mapping[str, Mapping[str, float | None]],
    told: Mapping[str, Mapping[str, float | None]],
) -> None:
    for (scenario, line), colour in zip(capacities.items(), COLOURS, strict=False):
        for each, style, label in ((line, "-", scenario), (told.get(scenario, {}), ":", None)):
            points = {float(noise): rate for noise, rate in each.items() if rate is not None}
            panel.plot(list(points), list(points.values()), style, marker="o", color=colour, label=label)  # fmt: skip
    if told:
        panel.plot([], [], ":", color="black", label="told in advance")
    panel.set(xlabel="noise (log-sd of iterations' times)", ylabel="capacity of dp, requests/s")
    panel.set_ylim(bottom=0)
