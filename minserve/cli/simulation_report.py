"""What ``minserve simulate`` tells of its runs: tables, JSON and a picture."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minserve.cli.simulated_runs import SimulatedRun, SimulatedRuns
from minserve.cli.workload import in_words
from minserve.simulator.sizing import Sizing
from minserve.workload.capacity import Capacity
from minserve.workload.plots import plot_attainment, plot_run
from minserve.workload.report import Report


def print_results(
    args: argparse.Namespace,
    simulations: SimulatedRuns,
    capacity: Capacity | None,
    sizing: Sizing | None,
    interrupted: bool,
) -> None:
    """Print a table or JSON, and draw the picture."""
    pooled = _pooled(simulations.runs)
    if args.json:
        print(json.dumps(_as_json(args, simulations, pooled, capacity, sizing, interrupted)))
    else:
        for run, report in pooled:
            print(f"\n{_title(run, sizing is not None)}\n{report.table()}")
        if capacity is not None:
            print(f"\n{in_words(capacity)}")
            if capacity.rate is not None:
                gpus = simulations.setup.num_gpus
                print(f"per GPU, of {gpus}: {capacity.rate / gpus:.3g} requests/s")
        if sizing is not None:
            print(f"\n{_sizing_in_words(args.replicas_for, sizing)}")
    if args.plot is not None and simulations.runs:
        _plot(args, simulations, pooled)


def _title(run: SimulatedRun, sizing: bool) -> str:
    title = "the trace as it is" if run.rate is None else f"{run.rate:.4g} requests/s"
    return f"{title}, {run.setup.replicas} replicas" if sizing else title


def _pooled(runs: Sequence[SimulatedRun]) -> list[tuple[SimulatedRun, Report]]:
    """Return a report for each rate and number of replicas, with one of the runs that it covers.

    The reports cover all repeats and are in ascending order.
    """
    by_key: dict[tuple[float, int], list[SimulatedRun]] = {}
    for run in runs:
        by_key.setdefault((run.rate or 0.0, run.setup.replicas), []).append(run)
    pooled = []
    for _, own in sorted(by_key.items()):
        verdicts = [verdict for run in own for verdict in run.result.verdicts]
        tasks = [verdict for run in own for verdict in run.result.task_verdicts]
        pooled.append((own[-1], Report.of(verdicts, sum(run.seconds for run in own), tasks)))
    return pooled


def _sizing_in_words(rate: float, sizing: Sizing) -> str:
    number = sizing.replicas
    if number is None:
        return f"no number of replicas was found with which {sizing.level:.0%} attain their SLO"
    fewer = sizing.attainment.get(number - 1)
    less = "" if fewer is None else f"; with one fewer {fewer:.1%}"
    cut = "" if sizing.complete else "; the search was cut short"
    return (
        f"{number} replicas serve {rate:.4g} requests/s with "
        f"{sizing.attainment[number]:.1%} attained{less}{cut}"
    )


def _as_json(
    args: argparse.Namespace,
    simulations: SimulatedRuns,
    pooled: Sequence[tuple[SimulatedRun, Report]],
    capacity: Capacity | None,
    sizing: Sizing | None,
    interrupted: bool,
) -> dict[str, Any]:
    setup = simulations.setup
    return {
        "workload": args.scenario or str(args.trace),
        "tasks": args.tasks,
        "profile": setup.device.name,
        "policy": setup.policy,
        "replicas": setup.replicas,
        "num_gpus": setup.num_gpus,
        "seed": args.seed,
        "repeats": args.repeats,
        "runs": [
            {
                "target_rate": run.rate,
                "replicas": run.setup.replicas,
                **report.to_dict(),
                "busy_share": round(run.result.busy_share, 4),
                "preemptions": run.result.num_preemptions,
            }
            for run, report in pooled
        ],
        "capacity": None if capacity is None else _per_gpu(capacity, setup.num_gpus),
        "replicas_for": None if sizing is None else {"rate": args.replicas_for, **sizing.to_dict()},
        "interrupted": interrupted,
    }


def _per_gpu(capacity: Capacity, num_gpus: int) -> dict[str, Any]:
    values = capacity.to_dict()
    rates = [values["capacity"], *values["interval"]]
    each, *interval = [None if rate is None else round(rate / num_gpus, 4) for rate in rates]
    return {**values, "per_gpu": each, "interval_per_gpu": interval}


def _plot(
    args: argparse.Namespace,
    simulations: SimulatedRuns,
    pooled: Sequence[tuple[SimulatedRun, Report]],
) -> None:
    """Draw attainment against rate; with a single rate, draw the last run."""
    setup = simulations.setup
    title = f"{args.scenario or Path(args.trace).name}, {setup.device.name}"
    if len({run.rate for run, _ in pooled}) > 1:
        line: dict[float, list[float]] = {}
        for run in simulations.runs:
            judged = run.result.task_verdicts or run.result.verdicts
            if judged:
                kept = statistics.fmean(verdict.attained for verdict in judged)
                line.setdefault(run.rate or 0.0, []).append(kept)
        plot_attainment({setup.policy: line}, args.plot, level=args.level, title=title)
    else:
        last = simulations.runs[-1]
        plot_run(last.result.verdicts, last.seconds, args.plot, title=f"{setup.policy}, {title}")
