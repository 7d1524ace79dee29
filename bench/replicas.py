"""Measures whether N replicas serve N times as much, and which router gets most out of them.

It uses real processes and sockets: an open-loop client, `minserve serve --replicas N`, and a
process for each replica with the real planner and block pool. Only the forward passes are
simulated: they take as long as a published performance model says (`--executor simulated`), so that
many replicas fit on few cores. Capacity is the most requests per second at which at least 90% of
all requests attain their SLO by the client's clock; the simulator's capacity is computed too.

It also measures how much time the controller adds to the first token at 100 requests per second,
and how long a routing decision between 64 replicas takes.

    .venv/bin/python bench/replicas.py              # about 70 minutes
    .venv/bin/python bench/replicas.py --quick      # chat on 1 and 2 replicas, 3 minutes
    .venv/bin/python bench/replicas.py --results FILE.json    # goes on where it ended

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minserve.errors import WorkloadError
from minserve.progress_bar import progress_bar
from minserve.tables import text_table
from minserve.workload.capacity import find_capacity
from minserve.workload.client import LoadProgress
from minserve.workload.endpoint import Endpoint
from minserve.workload.plots import check_can_plot, figure_of, save
from parts.replicas.overhead import added_to_ttft, routing_us
from parts.replicas.runs import (
    MODEL,
    PROFILES,
    ROUTERS,
    ReplicaCase,
    Slowed,
    drive,
    expected_capacity,
    figures,
    served,
    texts_of,
)
from shared.machine import machine
from shared.program import names, run_program
from shared.prompt_texts import Counter
from shared.servers import wait_until_up

# A search starts at the simulator's result, takes steps of this size, and ends in a bracket so
# wide.
STEP, TOLERANCE = 1.15, 0.16
SETTINGS = ("seconds", "repeats", "slow", "seed")


@dataclass(slots=True)
class Results:
    """All measurements, kept in a file from run to run.

    Attributes:
        runs: by case and rate, the figures of each repeat.
        expected: capacities according to the simulator.
    """

    path: Path | None
    settings: dict[str, Any]
    runs: dict[str, dict[str, list[dict[str, float]]]] = field(default_factory=dict)
    expected: dict[str, float] = field(default_factory=dict)
    capacity: dict[str, float | None] = field(default_factory=dict)
    costs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | None, settings: dict[str, Any]) -> Results:
        """Return the results of a file, or new ones if it does not exist.

        Raises:
            WorkloadError: if they were measured with other settings.
        """
        results = cls(path, settings)
        if path is not None and path.exists():
            kept = json.loads(path.read_text())
            if kept["settings"] != settings:
                raise WorkloadError(f"{path} was measured with {kept['settings']}; take another")
            for name in ("runs", "expected", "capacity", "costs"):
                setattr(results, name, kept[name])
        return results

    def save(self) -> None:
        """Write the results to the file."""
        if self.path is not None:
            self.path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    def to_dict(self) -> dict[str, Any]:
        names = ("settings", "capacity", "expected", "costs", "runs")
        return {"machine": machine(), **{name: getattr(self, name) for name in names}}


def measure(case: ReplicaCase, results: Results, args: argparse.Namespace, count: Counter) -> None:
    """Search for one capacity; runs that are known already are not repeated."""
    slowed = Slowed.of(case.scenario, args.slow)
    if case.name not in results.expected:
        results.expected[case.name] = expected_capacity(slowed, case, args.seconds, TOLERANCE)
        results.save()
    runs = results.runs.setdefault(case.name, {})
    with (
        served(slowed, case) as server,
        progress_bar(desc=case.name, unit="req", leave=False) as bar,
    ):
        wait_until_up(server.url, case.replicas)
        endpoint = server.endpoint

        def attainment(rate: float, repeat: int) -> float:
            known = runs.setdefault(f"{rate:.4g}", [])
            if len(known) <= repeat:
                known.append(run(endpoint, slowed, case, rate, repeat))
                results.save()
                tqdm.write(f"{case.name} at {rate:.3g}/s: {known[-1]['attainment']:.1%}")
            return known[repeat]["attainment"]

        def run(
            endpoint: Endpoint, slowed: Slowed, case: ReplicaCase, rate: float, repeat: int
        ) -> dict[str, float]:
            salt = f"{args.seed} {case.name} {rate} {repeat}"
            seed = args.seed + repeat
            workload = texts_of(slowed, count, rate, args.seconds, seed, salt)

            def show(tally: LoadProgress) -> None:
                bar.update(tally.done - bar.n)

            load = drive(endpoint, slowed, workload, show)
            for error, number in load.errors().items():
                tqdm.write(f"{case.name}: {number} times: {error}")
            bar.reset()
            return dict(figures(load, args.seconds))

        found = find_capacity(
            attainment,
            results.expected[case.name],
            repeats=args.repeats,
            tolerance=TOLERANCE,
            step=STEP,
        )
    results.capacity[case.name] = None if found.rate is None else round(found.rate, 3)
    results.save()


def cases_of(args: argparse.Namespace) -> list[ReplicaCase]:
    """Return all cases to measure; one replica needs no router."""
    return [
        ReplicaCase(scenario, replicas, router)
        for router in args.routers
        for scenario in args.scenarios
        for replicas in args.replicas
        if replicas > 1 or router == args.routers[0]
    ]


def by_scenario(values: dict[str, float | None], cases: list[ReplicaCase]) -> dict[str, Any]:
    """Return {scenario: {router: {replicas: rate}}}; one replica counts for every router."""
    found: dict[str, Any] = {}
    for case in cases:
        rate = values.get(case.name)
        for router in {c.router for c in cases} if case.replicas == 1 else {case.router}:
            own = found.setdefault(case.scenario, {}).setdefault(router, {})
            own[str(case.replicas)] = None if rate is None else round(rate, 2)
    return found


def capacity_table(results: Results, cases: list[ReplicaCase]) -> str:
    """Return the capacities as a table."""
    rows = []
    for case in cases:
        rate, expected = results.capacity.get(case.name), results.expected.get(case.name)
        if expected is None:
            continue
        measured, each = (None, None) if rate is None else (rate, rate / case.replicas)
        values = (None if one is None else f"{one:.2f}" for one in (measured, expected, each))
        rows.append((case.name, *values))
    return text_table(("", "measured", "simulated", "per replica"), rows)


def plot(results: Results, cases: list[ReplicaCase], file: Path) -> None:
    """Draw capacity by number of replicas, with a panel for each scenario."""
    found = by_scenario(results.capacity, cases)
    figure, panels = figure_of(len(found))
    for panel, (scenario, routers) in zip(panels, found.items(), strict=True):
        for router, rates in sorted(routers.items()):
            points = [(int(n), rate) for n, rate in rates.items() if rate is not None]
            panel.plot(*zip(*points, strict=True), marker="o", label=router)
        one = next(iter(routers.values())).get("1")
        if one is not None:
            most = max(case.replicas for case in cases)
            panel.plot((1, most), (one, most * one), color="0.6", ls=":", label="linear")
        panel.set(title=scenario, xlabel="replicas", ylabel="capacity, requests per second")
        panel.set_ylim(bottom=0)
        panel.legend()
    save(figure, file)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenarios", type=names, default=list(PROFILES), metavar="LIST")
    parser.add_argument("--routers", type=names, default=list(ROUTERS), metavar="LIST")
    parser.add_argument("--replicas", default=[1, 2, 4, 8], metavar="LIST",
                        type=lambda text: [int(part) for part in text.split(",")])  # fmt: skip
    parser.add_argument("--seconds", type=float, default=30.0, help="time of arrivals per run")
    parser.add_argument("--repeats", type=int, default=1, help="runs per rate, with other seeds")
    parser.add_argument("--slow", type=float, default=1.0, metavar="X",
                        help="slows devices and promises down, if cores are few")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="does it run? 3 minutes")
    parser.add_argument("--results", type=Path, metavar="FILE.json")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    args = parser.parse_args()
    if args.quick:
        args.scenarios, args.replicas, args.seconds = ["chatbot"], [1, 2], 12.0
        args.routers = ["slo"]
    if unknown := {*args.scenarios} - {*PROFILES} | {*args.routers} - {*ROUTERS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if args.plot is not None:
        check_can_plot(args.plot)
    return args


def main() -> None:
    args = parse_args()
    results = Results.open(args.results, {name: getattr(args, name) for name in SETTINGS})
    cases, count = cases_of(args), Counter(MODEL)
    if not results.costs:
        seconds, pairs = (5.0, 2) if args.quick else (20.0, 5)
        results.costs = {
            "controller": added_to_ttft(seconds, pairs, args.seed),
            "routing_us": {name: routing_us(name, args.seed) for name in ROUTERS},
        }
        results.save()
    for case in progress_bar(cases, unit="capacity"):
        if case.name not in results.capacity:
            measure(case, results, args, count)
    print(capacity_table(results, cases))
    if args.plot is not None:
        plot(results, cases, args.plot)
    print(
        json.dumps(
            {
                "capacity": by_scenario(results.capacity, cases),
                "simulated": by_scenario(results.expected, cases),
                **results.costs,
            }
        )
    )


if __name__ == "__main__":
    run_program(main)
