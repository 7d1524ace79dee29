"""Measures in the simulator how `dp` does when iterations' times scatter and devices drift.

A cell of the grid is a scenario on a device, a way in which its times scatter, and a rate, given as
a multiple of what `dp` serves there without noise. In a cell all policies meet the same requests on
the same device. The regret of `dp` is the attainment (the share of all offered requests that keep
their SLO) of the best other policy minus that of `dp`.

Devices are OPT-6.7B on an A100 with the evaluation's paces (for tools and reasoning: the models
that `reproduce.py` has for them), and SmolLM2 on 2 cores of a Xeon. There lengths are a tenth, the
tight pace is one of several multiples of a lone request's time per token, and the loose pace is
twice the tight one. Reasoning is cut to a twentieth of its lengths, on the Xeon to a fiftieth.
Output lengths are learned (`quantile`). Times scatter by log-standard deviations of 0 to 0.4, on
steady devices, on drifting ones (every 10 to 60 s another speed, between half and double; stalls of
0.1 to 1 s every 30 s), and on devices that are 30% slower or faster than their profile.

Then it measures capacities of `dp` by noise, and with ``--bound`` those of a planner that is told
each iteration's noise in advance. All draws have seeds: two runs of the same code agree.

The noise-free capacities are those of the last full run, so that another version of the planner
meets the same requests; ``--search`` finds them anew.

    .venv/bin/python bench/noise.py                          # under 10 minutes on 2 cores
    .venv/bin/python bench/noise.py --quick                  # a minute
    .venv/bin/python bench/noise.py --only scenario=coding,noise=0.2,tight=1.7 --policies dp,sarathi
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minserve.errors import WorkloadError
from minserve.machine import Machine
from minserve.workload.plots import check_can_plot
from parts.noise.grid import FILTERS, POLICIES, Grid
from parts.noise.report import rows_of, summary, table
from shared.simulated.jobs import fingerprint
from shared.simulated.run import Done, ResultStore, run_all

RESULTS = Path(__file__).resolve().parent / "results" / "noise.json"


def measure(grid: Grid, num_workers: int) -> tuple[Done, dict[str, Any]]:
    """Run everything; return how that ended, and the results as JSON values."""
    store, began = ResultStore(None), time.monotonic()
    done = run_all(lambda: grid.jobs(store), store, num_workers)
    rows = rows_of(grid, store)
    settings = dict.fromkeys(cell.setting for cell in grid.cells())
    results = {
        **summary(grid, store, rows),
        "noise_free_capacity": {one.name: grid.capacity_of(one, store) for one in settings},
        "lengths": "quantile",
        "source": fingerprint(),
        "seconds": round(time.monotonic() - began, 1),
        "core_seconds": round(store.seconds_of(done.jobs), 1),
        "complete": not (done.interrupted or done.errors),
        "rows": rows,
    }
    return done, results


def _filters(text: str) -> dict[str, list[str]]:
    """Parse ``name=value,name=value``; for a name that is given twice, either value may hold."""
    found: dict[str, list[str]] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in FILTERS or not value:
            raise argparse.ArgumentTypeError(
                f"{part!r} is not like noise=0.2; there are {', '.join(FILTERS)}"
            )
        found.setdefault(name, []).append(value)
    return found


def _policies(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    unknown = [name for name in names if name not in POLICIES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no policy {unknown[0]!r}: {', '.join(POLICIES)}")
    return names


def _rates(file: Path) -> Mapping[str, float]:
    """Return noise-free capacities by the name of a setting.

    Raises:
        ValueError: if the file holds none.
    """
    try:
        rates = json.loads(file.read_text(encoding="utf-8"))["noise_free_capacity"]
        return {name: float(rate) for name, rate in rates.items() if rate is not None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no result of this: {error}") from None


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer settings, loads and noises, one seed")
    add("--only", type=_filters, default={}, metavar="NAME=VALUE[,NAME=VALUE]",
        help=f"names are {', '.join(FILTERS)}; a name given twice means either value; kinds "
        "are steady, drifting, slower, faster; parts are grid, capacity")  # fmt: skip
    add("--policies", type=_policies, default=POLICIES, metavar="NAME[,NAME]",
        help=f"some of {', '.join(POLICIES)}")  # fmt: skip
    add("--bound", action="store_true", help="also capacities of a clairvoyant planner")
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument("--rates-of", type=Path, metavar="FILE.json",
        help="take noise-free capacities, and so all rates, from another run's results (default: "
        f"{RESULTS} if it exists; rates that it lacks are searched for)")  # fmt: skip
    rates.add_argument("--search", action="store_true", help="search for all noise-free capacities")
    add("--jobs", type=int, default=Machine.look().num_processes, help="worker processes")
    add("--out", type=Path, metavar="FILE.json",
        help=f"results with all cells (default: {RESULTS} where all is measured)")  # fmt: skip
    add("--plot", type=Path, metavar="FILE.png", help="regret and capacities as a picture")
    add("--json", action="store_true", help="print the last line alone")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    if args.plot is not None:
        try:
            check_can_plot(args.plot)
        except WorkloadError as error:
            parser.error(str(error))
    if args.rates_of is None and RESULTS.exists() and not args.search:
        args.rates_of = RESULTS
    try:
        args.rates = {} if args.rates_of is None else _rates(args.rates_of)
    except ValueError as error:
        parser.error(str(error))
    whole = not (args.quick or args.only or args.policies != POLICIES)
    if args.out is None and whole:
        args.out = RESULTS
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    grid = Grid(
        quick=args.quick,
        policies=args.policies,
        only=args.only,
        rates=args.rates,
        bound=args.bound,
    )
    num_cells, num_capacities = len(list(grid.cells())), len(list(grid.capacities()))
    if not num_cells + num_capacities:
        print("no cell and no capacity is like that", file=sys.stderr)
        return 2
    minutes = grid.core_seconds() / args.jobs / 60
    print(
        f"{num_cells} cells with {num_cells * len(grid.policies) * len(grid.seeds)} runs, and "
        f"{num_capacities} capacities: about {minutes:.1f} minutes on {args.jobs} free cores",
        file=sys.stderr,
    )
    # Simulations are pure Python: more threads would only disturb each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    done, results = measure(grid, args.jobs)
    # A run that was cut short must not replace the rates that later runs use.
    if args.out is not None and (results["complete"] or args.out != RESULTS):
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(_compact(results), encoding="utf-8")
    figures = {name: value for name, value in results.items() if name != "rows"}
    if not args.json:
        print(table(figures))
    if args.plot is not None:
        from parts.noise.plots import draw

        draw(results, args.plot)
    for job, error in done.errors.items():
        print(f"failed: {error}\n  {job}", file=sys.stderr)
    print(json.dumps(figures))
    return 130 if done.interrupted else 1 if done.errors else 0


def _compact(results: Mapping[str, Any]) -> str:
    """Return JSON with a line for each value at the top, and for each row."""
    lines = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in results.items() if k != "rows"]
    rows = ",\n  ".join(json.dumps(row) for row in results["rows"])
    return "{\n" + ",\n".join([*lines, f' "rows": [\n  {rows}\n ]']) + "\n}\n"


if __name__ == "__main__":
    raise SystemExit(main())
