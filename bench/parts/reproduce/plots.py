"""Pictures of `reproduce.py`, drawn from the results that there are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from minserve.workload.plots import (
    BLUE,
    GREY,
    POLICY_COLOURS,
    RED,
    SLATE,
    attainment_figure,
    draw_attainment,
    figure_of,
    save,
)
from parts.reproduce.plan import BASELINES, HEADLINE, OTHER_POLICIES, PROMISES, Plan
from parts.reproduce.report import GOALS, capacity_table, first_mode, name_of, ratios, scaling_of
from parts.reproduce.sections import SENSITIVE, burst_points, curve_points, slo_searches
from shared.simulated.jobs import Measured


def draw_all(plan: Plan, found: Measured, folder: Path, stem: str) -> list[Path]:
    """Draw the results that there are, and return the files."""
    files = []
    for name, drawn in (
        ("capacity", _capacity(plan, found)),
        ("scaling", _scaling(plan, found)),
        ("curves", _curves(plan, found)),
        ("bursts", _bursts(plan, found)),
        ("sensitivity", _sensitivity(plan, found)),
    ):
        if drawn is not None:
            files.append(folder / f"{stem}-{name}.png")
            save(drawn, files[-1])
    return files


def _capacity(plan: Plan, found: Measured):
    """Draw each policy relative to the best baseline, and the ratio of dp over it."""
    table = capacity_table(plan, found)
    ready = [one for one in HEADLINE if first_mode(table.get(one, {})).get("best")]
    if not ready:
        return None
    figure, (bars, ratio) = figure_of(2)
    policies = (*PROMISES, *OTHER_POLICIES, *BASELINES)
    width = 0.84 / len(policies)
    for i, policy in enumerate(policies):
        rows = [first_mode(table[one]) for one in ready]
        heights = [row.get(policy, 0.0) / row["best"] for row in rows]
        places = [place + (i - (len(policies) - 1) / 2) * width for place in range(len(ready))]
        bars.bar(places, heights, 0.93 * width, color=POLICY_COLOURS.get(policy), label=policy)
    names = [name_of(one) for one in ready]
    bars.set_xticks(range(len(ready)), names, rotation=20)
    bars.set(ylabel="capacity over the best baseline's")
    over = {one: ratios(table, [one], "best") for one in ready}
    drawn = {name: value for each in over.values() if each for name, value in each.items()}
    ratio.bar(list(drawn), list(drawn.values()), 0.6, color=BLUE)
    ratio.axhline(GOALS["over best"], linestyle="--", color=SLATE, label="goal of the mean")
    ratio.set_xticks(range(len(drawn)), list(drawn), rotation=20)
    ratio.set(ylabel="dp over the best baseline")
    return figure


def _scaling(plan: Plan, found: Measured):
    table = scaling_of(plan, found)
    if not table:
        return None
    figure, panels = figure_of(len(table))
    for panel, (scenario, lines) in zip(panels, table.items(), strict=True):
        for name, row in lines.items():
            counts = sorted(map(int, row))
            marker = "o" if len(counts) > 2 else "s"
            panel.plot(counts, [row[str(n)] for n in counts], marker=marker, label=name)
        most = max(int(n) for row in lines.values() for n in row)
        panel.plot([1, most], [1, most], "--", color=SLATE, label="linear")
        goal = {"color": RED, "label": "the paper's dp"}
        panel.plot([4], [GOALS[scenario]], "*", markersize=12, **goal)
        panel.set(xlabel="replicas", ylabel="capacity over one replica's", title=scenario)
    return figure


def _curves(plan: Plan, found: Measured):
    panels_of = {}
    for scenario, device in HEADLINE[:4]:
        points = curve_points(plan, found, scenario, device)
        lines: dict[str, dict[float, list[float]]] = {}
        for (policy, rate), job in points.items():
            result = found(job)
            if result is not None:
                lines.setdefault(policy, {})[rate] = result["each"]
        if lines:
            panels_of[scenario] = lines
    if not panels_of:
        return None
    figure, panels = attainment_figure(list(panels_of))
    for panel, lines in zip(panels, panels_of.values(), strict=True):
        for policy, line in lines.items():
            draw_attainment(panel, policy, line, color=POLICY_COLOURS[policy])
    return figure


def _bursts(plan: Plan, found: Measured):
    done = {key: found(job) for key, job in burst_points(plan, found).items()}
    loads = list(dict.fromkeys(load for (load, _), result in done.items() if result))
    if not loads:
        return None
    figure, panels = figure_of(2 * len(loads))
    for i, load in enumerate(loads):
        attained, running = panels[2 * i : 2 * i + 2]
        for (other, policy), result in done.items():
            if other != load or result is None:
                continue
            if policy == "dp":
                rates = [count / result["bin_s"] for count in result["arrivals"]]
                times = [result["bin_s"] * (j + 0.5) for j in range(len(rates))]
                running.fill_between(times, rates, alpha=0.3, color=GREY, label="arrivals/s")
            times, shares = zip(*_shares(result), strict=True)
            attained.plot(times, shares, color=POLICY_COLOURS.get(policy), label=policy)
            for part, style in (("promised", "-"), ("best_effort", ":")):
                values = result[part]
                if any(values):
                    times = [result["bin_s"] * (j + 0.5) for j in range(len(values))]
                    label = f"{policy}{', best effort' if style == ':' else ''}"
                    running.plot(times, values, style, color=POLICY_COLOURS[policy], label=label)
        attained.set(xlabel="arrival (s)", ylabel="% attaining their SLO", title=load)
        running.set(xlabel="time (s)", ylabel="running sequences", title=load)
    return figure


def _shares(result: dict) -> Iterator[tuple[float, float]]:
    for j, (arrivals, kept) in enumerate(zip(result["arrivals"], result["attained"], strict=True)):
        if arrivals:
            yield result["bin_s"] * (j + 0.5), 100 * kept / arrivals


def _sensitivity(plan: Plan, found: Measured):
    names = {"ttft_slowdown": "TTFT slowdown", "tpot_scale": "factor on TPOT"}
    # The values of the unchanged promises, on the axis of each change.
    unchanged = {"ttft_slowdown": 5.0, "tpot_scale": 1.0}
    lines: dict[tuple[str, str], dict[str, dict[float, float]]] = {}
    for scenario in SENSITIVE:
        for (policy, name, value), job in slo_searches(plan, found, scenario).items():
            result = found(job)
            if result is None:
                continue
            for axis in [name] if name else names:
                x = value if name else unchanged[axis]
                row = lines.setdefault((scenario, axis), {}).setdefault(policy, {})
                row[x] = result["capacity"] or 0.0
    if not lines:
        return None
    figure, panels = figure_of(len(lines))
    for panel, ((scenario, axis), policies) in zip(panels, sorted(lines.items()), strict=True):
        for policy, row in policies.items():
            xs = sorted(row)
            panel.plot(
                xs, [row[x] for x in xs], marker="o", color=POLICY_COLOURS.get(policy), label=policy
            )
        panel.set(xlabel=names[axis], ylabel="capacity, requests/s per GPU", title=scenario)
    return figure
