"""Capacities, ratios, table and picture of `versus_vllm.py`: arithmetic on finished runs."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minserve.workload.capacity import LEVEL, Capacity, crossing, find_capacity
from minserve.workload.plots import COLOURS, GREY, check_can_plot, draw_attainment

OURS, PEER = "minserve", "vllm"
STYLES = {OURS: COLOURS[0], PEER: COLOURS[-1]}
DASHES = ("-", "--", "-.", ":")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One server's answers to one trace.

    Attributes:
        server: label of the variant.
        rate: offered, in requests per second.
        attainment, attainment_mean: of all offered, in the deadline and in the mean form.
        cores_elsewhere: kept busy by neither this server nor the client.
        cores_server, cores_client: kept busy by these.
        slowness: a lone request's time per token after the run, over this server's best.
        disturbed: whether other work or a slow moment makes the run doubtful.
        report: all numbers of the run.
    """

    server: str
    scenario: str
    rate: float
    repeat: int
    attainment: float
    attainment_mean: float
    cores_elsewhere: float
    cores_server: float
    cores_client: float
    slowness: float
    disturbed: bool
    report: Mapping[str, Any]


@dataclass(slots=True)
class Store:
    """All that was measured, kept in a file so that an interrupted benchmark goes on.

    Attributes:
        settings: what results depend on; a file with others is not taken.
        speed: the reference speed (`ZeroLoad` as a dict), once measured.
    """

    settings: Mapping[str, Any]
    file: Path | None = None
    speed: Mapping[str, float] | None = None
    runs: list[Run] = field(default_factory=list)

    @classmethod
    def open(cls, settings: Mapping[str, Any], file: Path | None) -> Store:
        """What the file has, or an empty store.

        Raises:
            SystemExit: where it was made with other settings.
        """
        if file is None or not file.exists():
            return cls(settings, file)
        kept = json.loads(file.read_text(encoding="utf-8"))
        # Through JSON, which knows no tuples.
        if kept["settings"] != json.loads(json.dumps(settings)):
            raise SystemExit(f"{file} was made with other settings; give another --results")
        return cls(settings, file, kept["speed"], [Run(**run) for run in kept["runs"]])

    def save(self) -> None:
        if self.file is None:
            return
        content = {
            "settings": self.settings,
            "speed": self.speed,
            "runs": [asdict(run) for run in self.runs],
        }
        # Written beside and renamed: an interruption leaves the old file whole.
        beside = self.file.with_suffix(".part")
        beside.write_text(json.dumps(content, indent=1), encoding="utf-8")
        beside.replace(self.file)

    def add(self, run: Run) -> None:
        self.runs.append(run)
        self.save()

    def of(self, server: str, scenario: str) -> dict[tuple[str, int], Run]:
        """Runs by rate (as `key` writes it) and repeat."""
        return {
            (key(run.rate), run.repeat): run
            for run in self.runs
            if (run.server, run.scenario) == (server, scenario)
        }


@dataclass(frozen=True, slots=True)
class Search:
    """How a capacity is looked for."""

    start: float
    repeats: int
    tolerance: float


class _NotMeasured(Exception):
    """A search asks for a run that is not there yet."""

    def __init__(self, rate: float, repeat: int) -> None:
        super().__init__(rate, repeat)
        self.wanted = (rate, repeat)


def key(rate: float) -> str:
    """A rate as it is written in names; the same for rates that rounding makes different."""
    return f"{rate:.4g}"


def search(
    runs: Mapping[tuple[str, int], Run], how: Search
) -> tuple[Capacity, tuple[float, int] | None]:
    """Replay a search on finished runs.

    Searches of several servers can so take turns, and go on after an interruption.

    Returns:
        the capacity as far as it is known, and the (rate, repeat) that it needs next; ``None``
        when it is complete.
    """

    def lookup(rate: float, repeat: int) -> float:
        if (key(rate), repeat) not in runs:
            raise _NotMeasured(rate, repeat)
        return runs[key(rate), repeat].attainment

    found = Capacity()
    try:
        find_capacity(lookup, how.start, repeats=how.repeats, tolerance=how.tolerance, into=found)
    except _NotMeasured as missing:
        return found, missing.wanted
    return found, None


def mean_form_capacity(runs: Mapping[tuple[str, int], Run]) -> float | None:
    """Capacity by the mean form, from the rates that the other form's search has tried."""
    shares: dict[float, list[float]] = {}
    for run in runs.values():
        shares.setdefault(run.rate, []).append(run.attainment_mean)
    return crossing({rate: statistics.fmean(each) for rate, each in shares.items()})


def summary(
    store: Store, systems: Mapping[str, str], searches: Mapping[str, Search]
) -> dict[str, Any]:
    """Capacities by scenario and server, and the ratios.

    Args:
        systems: by label of a server, in order; the first is the one whose ratio is asked for.
        searches: by scenario.
    """
    scenarios: dict[str, Any] = {}
    first = next(iter(systems))
    ratios: dict[str, list[float]] = {}
    for scenario, how in searches.items():
        found: dict[str, Any] = {}
        for label in systems:
            runs = store.of(label, scenario)
            capacity, _ = search(runs, how)
            mean = mean_form_capacity(runs)
            found[label] = capacity.to_dict() | {
                "capacity_mean_form": None if mean is None else round(mean, 4),
                "disturbed": sum(run.disturbed for run in runs.values()),
            }
        peer = best(found[label]["capacity"] for label, one in systems.items() if one == PEER)
        for label, one in systems.items():
            if one == OURS and (ratio := _ratio(found[label]["capacity"], peer)) is not None:
                found[label]["ratio"] = ratio
                ratios.setdefault(label, []).append(ratio)
        scenarios[scenario] = found
    means = {
        label: round(statistics.geometric_mean(each), 2)
        for label, each in ratios.items()
        if len(each) == len(searches)
    }
    return {"ratio": means.get(first), "ratios": means, "scenarios": scenarios}


def best(capacities: Any) -> float | None:
    """The largest of capacities that are known."""
    return max((one for one in capacities if one is not None), default=None)


def _ratio(ours: float | None, peer: float | None) -> float | None:
    return round(ours / peer, 2) if ours is not None and peer else None


def table(result: Mapping[str, Any]) -> str:
    """Lines for the terminal: a scenario and server each."""
    lines = [
        f"{'scenario':16}{'server':24}{'capacity (req/s)':>18}{'interval':>16}"
        f"{'mean form':>11}{'ratio':>8}"
    ]
    for scenario, servers in result["scenarios"].items():
        for label, one in servers.items():
            low, high = one["interval"]
            lines.append(
                f"{scenario:16}{label:24}{_readable(one['capacity']):>18}"
                f"{f'{_readable(low)} - {_readable(high)}':>16}"
                f"{_readable(one['capacity_mean_form']):>11}{_readable(one.get('ratio')):>8}"
            )
    lines += [
        f"geometric mean of the ratios, {label}: {ratio:.2f}"
        for label, ratio in result["ratios"].items()
    ]
    return "\n".join(lines)


def _readable(number: float | None) -> str:
    return "-" if number is None else f"{number:.2f}"


def plot(
    store: Store, systems: Mapping[str, str], searches: Mapping[str, Search],
    result: Mapping[str, Any], file: str,
) -> None:  # fmt: skip
    """Save attainment against rate, a panel per scenario."""
    check_can_plot(file)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(2, len(searches))
    rows = math.ceil(len(searches) / columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(5.4 * columns, 3.6 * rows), squeeze=False
    )
    for panel, (scenario, how) in zip(grid.flat, searches.items(), strict=False):
        used: dict[str, int] = {}
        for label, system in systems.items():
            line, _ = search(store.of(label, scenario), how)
            dashes = DASHES[used.get(system, 0) % len(DASHES)]
            used[system] = used.get(system, 0) + 1
            draw_attainment(panel, label, line.attainment, color=STYLES[system], linestyle=dashes)
        _finish(panel, scenario, result["scenarios"][scenario])
    for panel in list(grid.flat)[len(searches) :]:
        panel.set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _finish(panel: Any, scenario: str, found: Mapping[str, Any]) -> None:
    ratios = [one["ratio"] for one in found.values() if "ratio" in one]
    title = scenario + (f": {ratios[0]:.2f}x" if ratios else "")
    panel.axhline(100 * LEVEL, color=GREY, linestyle="--", linewidth=1)
    panel.set(xlabel="requests per second offered", ylabel="% attaining their SLO", title=title)
    panel.set_ylim(0, 102)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
