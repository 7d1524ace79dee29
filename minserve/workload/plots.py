"""Pictures of load tests. They need the extra ``plot``: matplotlib, imported when drawing."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minserve.errors import WorkloadError
from minserve.slo.objectives import Targets
from minserve.workload.capacity import LEVEL, crossing
from minserve.workload.report import share
from minserve.workload.verdict import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A command for minserve's folder: the package is on no index.
GET_MATPLOTLIB = ".venv/bin/pip install -e '.[plot]'"
BLUE, GREEN, AMBER, RED, PURPLE, SLATE = (
    "#1f6feb", "#2da44e", "#bf8700", "#cf222e", "#8250df", "#7d8590",
)  # fmt: skip
COLOURS = (BLUE, GREEN, AMBER, RED, PURPLE, SLATE)
GREY = "#b6bcc4"
# Shades for things of one kind, from the one that matters most.
BLUES, GREYS = (BLUE, "#54aeff", "#b6e3ff"), (GREY, SLATE, "#424a53")
# Each policy has its colour in all pictures.
POLICY_COLOURS = {
    "dp": BLUE,
    "edf": GREEN,
    "sarathi": AMBER,
    "vllm": PURPLE,
    "fcfs": SLATE,
    "distserve": RED,
}
# Attainment over time is drawn in this many slices of the run.
SLICES = 20


def check_can_plot(file: str | Path) -> None:
    """Check that a plot can be drawn and written, before a run instead of after it.

    Raises:
        WorkloadError: if matplotlib is missing, the file cannot be written, or its suffix names
            no format.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise WorkloadError(f"a plot needs matplotlib; run in minserve's folder: {GET_MATPLOTLIB}")
    from matplotlib.backend_bases import FigureCanvasBase

    path, formats = Path(file), FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise WorkloadError(f"the plot {path} must end in one of: .{', .'.join(sorted(formats))}")
    existed = path.exists()
    try:
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise WorkloadError(f"cannot write the plot {path}: {error.strerror}") from None


def plot_attainment(
    lines: Mapping[str, Mapping[float, Sequence[float]]],
    file: str | Path,
    *,
    level: float = LEVEL,
    title: str = "",
) -> None:
    """Plot attainment against rate.

    The capacity of each line is marked where it falls below the level. A band spans the lowest
    to the highest repeat.

    Args:
        lines: by label, then by requests per second: the attainment of each repeat.

    Raises:
        WorkloadError: if it cannot be drawn or written.
    """
    check_can_plot(file)
    figure, (panel,) = attainment_figure([title], level=level)
    for (label, line), colour in zip(lines.items(), _colours(len(lines)), strict=True):
        draw_attainment(panel, label, line, level=level, color=colour)
    save(figure, file)


def attainment_figure(
    titles: Sequence[str], *, level: float = LEVEL
) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure with a panel for `draw_attainment` per title, with the level marked."""
    figure, panels = figure_of(len(titles), sharey=True)
    for panel, title in zip(panels, titles, strict=True):
        panel.axhline(100 * level, color=GREY, linestyle="--", linewidth=1)
        panel.set(xlabel="requests per second offered", title=title, ylim=(0, 102))
    panels[0].set_ylabel("% attaining their SLO")
    return figure, panels


def draw_attainment(
    panel: Axes,
    label: str,
    line: Mapping[float, Sequence[float]],
    *,
    level: float = LEVEL,
    **style: Any,
) -> None:
    """Draw one line of `plot_attainment`.

    Args:
        line: by requests per second, the attainment of each repeat.
        style: properties of the line, as matplotlib calls them.
    """
    line = {rate: each for rate, each in sorted(line.items()) if each}
    if not line:
        return
    means = {rate: sum(each) / len(each) for rate, each in line.items()}
    capacity = crossing(means, level)
    if capacity is not None:
        sign = "\u2265 " if capacity == max(means) else ""
        label = f"{label}: {sign}{capacity:.3g}/s"
    panel.plot(
        list(means), [100 * one for one in means.values()], marker="o", markersize=4,
        label=label, **style,
    )  # fmt: skip
    colour = panel.lines[-1].get_color()
    lows, highs = ([100 * of(each) for each in line.values()] for of in (min, max))
    panel.fill_between(list(line), lows, highs, alpha=0.15, color=colour)
    if capacity is not None:
        panel.plot([capacity, capacity], [0, 100 * level], ":", linewidth=1, color=colour)


def plot_run(
    verdicts: Sequence[Verdict],
    seconds: float,
    file: str | Path,
    *,
    targets: Mapping[str, Targets] | None = None,
    title: str = "",
) -> None:
    """Plot one run: the distributions of TTFT, TPOT and time to the end, and attainment over time.

    Args:
        seconds: time over which the requests arrived.
        targets: typical targets by class, drawn as dashed lines.

    Raises:
        WorkloadError: if it cannot be drawn or written.
    """
    check_can_plot(file)
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, (ttft, tpot, end, time) = figure_of(4)
    names = sorted({verdict.name for verdict in verdicts})
    for name, colour in zip(names, _colours(len(names)), strict=True):
        own = [verdict for verdict in verdicts if verdict.name == name]
        promised = (targets or {}).get(name, Targets())
        waits = [math.inf if v.ttft_s is None else v.ttft_s for v in own]
        _draw_distribution(ttft, waits, name, colour, promised.ttft_s)
        paces = [v.tpot_s for v in own if v.tpot_s is not None]
        _draw_distribution(tpot, paces, None, colour, promised.stages[-1].tpot_s)
        ends = [math.inf if v.finish_s is None else v.finish_s for v in own]
        _draw_distribution(end, ends, None, colour, promised.finish_s)
        _draw_over_time(time, own, seconds, colour)
    for panel, word in ((ttft, "TTFT"), (tpot, "TPOT"), (end, "time to the end")):
        panel.set(xlabel=f"{word} (ms), its SLO dashed", ylabel="% of requests within")
        if panel.lines:
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter(NullFormatter())
    time.set(xlabel="arrival (s)", ylabel="% attaining their SLO", xlim=(0, max(seconds, 1e-3)))
    for panel in (ttft, tpot, end, time):
        panel.set_ylim(0, 102)
    figure.suptitle(title or f"{100 * share(v.attained for v in verdicts):.1f}% attained")
    save(figure, file)


def _draw_distribution(
    panel: Axes, values: Sequence[float], label: str | None, colour: str, promised_s: float
) -> None:
    """Draw the share of requests within each time; the curve ends below 100% if some never came."""
    finite = sorted(1e3 * max(one, 1e-6) for one in values if math.isfinite(one))
    heights = [100 * (i + 1) / len(values) for i in range(len(finite))]
    panel.step(finite, heights, where="post", color=colour, label=label)
    if math.isfinite(promised_s):
        panel.axvline(1e3 * promised_s, color=colour, linestyle="--", linewidth=1)


def _draw_over_time(panel: Axes, verdicts: Sequence[Verdict], seconds: float, colour: str) -> None:
    slices: dict[int, list[bool]] = {}
    for verdict in verdicts:
        place = int(SLICES * verdict.arrival_s / seconds) if seconds > 0 else 0
        slices.setdefault(place, []).append(verdict.attained)
    middles = [(place + 0.5) * seconds / SLICES for place in sorted(slices)]
    shares = [100 * share(slices[place]) for place in sorted(slices)]
    panel.plot(middles, shares, marker="o", markersize=3, color=colour)


def figure_of(num_panels: int, **options: Any) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure with panels side by side."""
    figure, panels = grid_of(1, num_panels, **options)
    return figure, panels[0]


def grid_of(
    num_rows: int,
    num_columns: int,
    *,
    panel_inches: tuple[float, float] = (5.0, 3.6),
    **options: Any,
) -> tuple[Figure, Any]:
    """Return a figure with rows of panels, and the panels as an array of two dimensions.

    Args:
        panel_inches: width and height of a panel.
        options: of matplotlib's ``subplots``.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    width, height = panel_inches
    figure, panels = pyplot.subplots(
        num_rows,
        num_columns,
        figsize=(width * num_columns, height * num_rows),
        squeeze=False,
        **options,
    )
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def save(figure: Figure, file: str | Path) -> None:
    """Write a figure and close it, with a legend in each panel that has labels.

    Raises:
        WorkloadError: if it cannot be written.
    """
    from matplotlib import pyplot

    try:
        for panel in figure.axes:
            if panel.get_legend_handles_labels()[0]:
                panel.legend(frameon=False)
        figure.tight_layout()
        figure.savefig(file, dpi=110)
    except OSError as error:
        raise WorkloadError(f"cannot write the plot {file}: {error.strerror}") from None
    finally:
        pyplot.close(figure)


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]
