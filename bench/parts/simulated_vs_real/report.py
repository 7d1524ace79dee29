"""The comparison of `simulated_vs_real.py`, and its report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from minserve.tables import text_table
from minserve.workload.plots import POLICY_COLOURS, grid_of, save
from minserve.workload.report import Part, Percentiles
from minserve.workload.verdict import Verdict

# Medians of the simulation must be within this share of the real ones, attainments within
# so many points.
MEDIAN_GOAL = 0.10
ATTAINMENT_GOAL = 0.05
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The values that a simulation is given of the real run, beside its profile.

    Attributes:
        slowness: device time of the run's iterations divided by that of the profile.
        planning_s: seconds of planning in an iteration.
        gap_s: seconds between two iterations, from lone requests just before the run.
        request_s: seconds of a request that the client waited beyond the engine's own TTFT.
        noise: log-standard deviation of iterations' times.
    """

    slowness: float = 1.0
    planning_s: float = 0.0
    gap_s: float = 0.0
    request_s: float = 0.0
    noise: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedRun:
    """A workload on a server, real and simulated.

    Attributes:
        real, simulated, blind: verdicts on the same requests, simulated once for each seed of the
            scatter; blind is the simulation that is given only the profile.
        cores_elsewhere: cores that other processes took during the real run.
        worst_elsewhere: cores that they took in the run's worst moment.
        disturbed: true if they took too much.
    """

    policy: str
    scenario: str
    rate: float
    inputs: Inputs
    real: Sequence[Verdict]
    simulated: Sequence[Verdict]
    blind: Sequence[Verdict]
    cores_elsewhere: float
    worst_elsewhere: float
    disturbed: bool

    @property
    def errors(self) -> dict[str, float]:
        """Errors of the simulation: of percentiles relative, of attainment absolute."""
        return errors(self.real, self.simulated)

    @property
    def blind_errors(self) -> dict[str, float]:
        """Errors of the simulation that is given only the profile."""
        return errors(self.real, self.blind)

    @property
    def within_goals(self) -> bool:
        found = self.errors
        goals = {
            "ttft_p50": MEDIAN_GOAL,
            "tpot_p50": MEDIAN_GOAL,
            "attainment": ATTAINMENT_GOAL,
        }
        return all(abs(found[name]) <= goal + ROUNDING for name, goal in goals.items())

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        sides = {"real": self.real, "simulated": self.simulated, "from_profile_alone": self.blind}
        return {
            "policy": self.policy,
            "scenario": self.scenario,
            "rate": round(self.rate, 4),
            "inputs": {name: round(value, 6) for name, value in asdict(self.inputs).items()},
            **{name: _summary(verdicts) for name, verdicts in sides.items()},
            "errors": _rounded(self.errors),
            "errors_from_profile_alone": _rounded(self.blind_errors),
            "within_goals": self.within_goals,
            "cores_elsewhere": round(self.cores_elsewhere, 3),
            "worst_elsewhere": round(self.worst_elsewhere, 3),
            "disturbed": self.disturbed,
        }


def errors(real: Sequence[Verdict], simulated: Sequence[Verdict]) -> dict[str, float]:
    """Return a simulation's errors: of percentiles relative to the real ones, of attainment
    absolute.

    An error is infinite if the percentile of one side is.
    """
    ours, theirs = Part.of(simulated), Part.of(real)
    found = {}
    for name, mine, true in (
        ("ttft", ours.ttft_s, theirs.ttft_s),
        ("tpot", ours.tpot_s, theirs.tpot_s),
    ):
        found[f"{name}_p50"] = _relative(mine.p50, true.p50)
        found[f"{name}_p90"] = _relative(mine.p90, true.p90)
    return {**found, "attainment": ours.attainment - theirs.attainment}


def print_table(rows: Sequence[ComparedRun]) -> None:
    """Print a line per row: the real values, the simulated ones, and the errors."""
    print("\nreal / simulated (error)")
    headings = ("policy", "scenario", "req/s", "n", "TTFT p50 ms", "p90", "TPOT p50 ms", "p90",
                "attained %", "goals")  # fmt: skip
    print(text_table(headings, map(_compared_cells, rows), left=2))
    print("\nwhat the simulation was told beside the profile, and its errors without that")
    headings = ("policy", "scenario", "req/s", "slowness", "planning", "gap", "request", "noise",
                "TTFT p50", "TPOT p50", "attained", "cores, worst")  # fmt: skip
    print(text_table(headings, map(_told_cells, rows), left=2))


def _compared_cells(row: ComparedRun) -> list[object]:
    real, ours, found = Part.of(row.real), Part.of(row.simulated), row.errors
    return [
        row.policy,
        row.scenario,
        f"{row.rate:.2f}",
        real.offered,
        *_pairs(real.ttft_s, ours.ttft_s, found, "ttft"),
        *_pairs(real.tpot_s, ours.tpot_s, found, "tpot"),
        f"{100 * real.attainment:.1f} / {100 * ours.attainment:.1f} "
        f"({100 * found['attainment']:+.1f})",
        f"{'met' if row.within_goals else 'missed'}{', disturbed' * row.disturbed}",
    ]


def _told_cells(row: ComparedRun) -> list[object]:
    told, found = row.inputs, row.blind_errors
    return [
        row.policy,
        row.scenario,
        f"{row.rate:.2f}",
        f"{told.slowness:.2f}",
        f"{1e3 * told.planning_s:.2f} ms",
        f"{1e3 * told.gap_s:.2f} ms",
        f"{1e3 * told.request_s:.1f} ms",
        f"{told.noise:.3f}",
        f"{100 * found['ttft_p50']:+.0f}%",
        f"{100 * found['tpot_p50']:+.0f}%",
        f"{100 * found['attainment']:+.1f}",
        f"{row.cores_elsewhere:.2f}, {row.worst_elsewhere:.2f}",
    ]


def plot(rows: Sequence[ComparedRun], file: str) -> None:
    """Save the distributions of TTFT and TPOT.

    There is a column for each scenario and rate, and a colour for each policy. Real distributions
    are solid lines, simulated ones are dashed.
    """
    columns = list(dict.fromkeys((row.scenario, row.rate) for row in rows))
    figure, panels = grid_of(2, len(columns), panel_inches=(3.6, 3.0), sharey=True)
    for row in rows:
        column = columns.index((row.scenario, row.rate))
        for verdicts, style, side in ((row.real, "-", "real"), (row.simulated, "--", "simulated")):
            for panel, times in zip(
                panels[:, column],
                ([v.ttft_s for v in verdicts], [v.tpot_s for v in verdicts]),
                strict=True,
            ):
                came = sorted(1e3 * one for one in times if one is not None)
                # Requests without a token keep the curve below the top.
                shares = [100 * (i + 1) / len(times) for i in range(len(came))]
                panel.step(came, shares, style, where="post", color=POLICY_COLOURS[row.policy],
                           label=f"{row.policy}, {side}")  # fmt: skip
    for (scenario, rate), column in zip(columns, panels.T, strict=True):
        column[0].set_title(f"{scenario}, {rate:.2g} requests/s", fontsize=10)
        for panel, name in zip(column, ("TTFT", "TPOT"), strict=True):
            panel.set_xlabel(f"{name} (ms)")
            panel.set_xlim(left=0)
            panel.grid(alpha=0.3)
    for panel in panels[:, 0]:
        panel.set_ylabel("% of requests")
    panels[0, 0].legend(fontsize=8)
    save(figure, file)


def _pairs(
    real: Percentiles, ours: Percentiles, found: dict[str, float], name: str
) -> Iterator[str]:
    """Yield the cells of the median and of the 90% quantile."""
    for q in ("p50", "p90"):
        pair = f"{1e3 * getattr(real, q):.1f} / {1e3 * getattr(ours, q):.1f}"
        yield f"{pair} ({100 * found[f'{name}_{q}']:+.0f}%)"


def _relative(ours: float, real: float) -> float:
    if math.isinf(ours) and math.isinf(real):
        return 0.0
    return ours / real - 1 if real > 0 and math.isfinite(real) else math.inf


def _summary(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    part = Part.of(verdicts)
    return {
        "requests": part.offered,
        "attainment": round(part.attainment, 4),
        "ttft_ms": part.ttft_s.to_dict(),
        "tpot_ms": part.tpot_s.to_dict(),
        "without_token": sum(verdict.ttft_s is None for verdict in verdicts),
    }


def _rounded(values: dict[str, float]) -> dict[str, float | None]:
    return {k: round(v, 4) if math.isfinite(v) else None for k, v in values.items()}
