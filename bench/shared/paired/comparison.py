"""A comparison as a program: its flags, the file of its turns, and what it says at the end."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from minserve.errors import WorkloadError
from minserve.exit_codes import EXIT_INTERRUPTED
from minserve.workload.reference import Reference
from minserve.workload.server_process import ServerCommand
from shared.machine import machine
from shared.paired.runs import REFERENCE_S, TURN_EXTRA_S, WARM_UP_S, Effort, PairedBenchmark
from shared.paired.turns import Cell, TurnStore, schedule
from shared.peers import CACHE
from shared.prompt_texts import Counter
from shared.servers import started


def estimate_s(num_turns: int, effort: Effort, num_servers: int, start_s: float) -> float:
    """Return about how many seconds it will take.

    Args:
        start_s: seconds that all servers take to start.
    """
    once = start_s + num_servers * (effort.rounds * REFERENCE_S + WARM_UP_S + TURN_EXTRA_S)
    return once + num_turns * (effort.seconds + TURN_EXTRA_S)


def say_estimate(
    cells: Sequence[Cell], effort: Effort, systems: Sequence[str], start_s: float, store: TurnStore
) -> None:
    """Print how much is still to be measured, and where results are kept."""
    slots = store.missing(schedule(cells, systems, effort.pairs))
    minutes = estimate_s(len(slots), effort, len(systems), start_s) / 60
    print(
        f"{len(cells)} cells x {effort.pairs} pairs x {len(systems)} servers: {len(slots)} turns of "
        f"{effort.seconds:g} s to go, about {minutes:.0f} minutes in all\n"
        f"results after every turn in {store.file}; --resume goes on from there",
        file=sys.stderr,
        flush=True,
    )


def add_flags(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the flags that the comparisons have in common.

    Args:
        name: name of the files of results.
    """
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--lengths", type=float, default=0.1, help="factor on all lengths")
    parser.add_argument("--seconds", type=float, default=20.0, help="time of arrivals per turn")
    parser.add_argument("--pairs", type=int, default=6, help="per cell, each with its own seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--zero-load", type=Path, metavar="FILE.json",
                        help="the idle speed that SLOs are multiples of, as written by minserve "
                        "bench --save-zero-load; default: measured first, the best of all "
                        "servers")  # fmt: skip
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--results", type=Path, metavar="FILE.json",
                      help=f"keep every turn in this new file (default: {name}-TIME.json in "
                      f"{CACHE.parent / 'bench'})")  # fmt: skip
    kept.add_argument("--resume", type=Path, metavar="FILE.json",
                      help="continue an interrupted run; incomplete pairs come again")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def open_store(
    args: argparse.Namespace, name: str, settings: Mapping[str, Any], systems: Sequence[str],
    model: str,
) -> TurnStore:  # fmt: skip
    """Return the store that the flags ask for.

    Args:
        settings: values on which results depend, beside the flags that all comparisons have.
        model: the model's name on the servers.

    Raises:
        SystemExit: if it cannot be written, or cannot be continued.
    """
    common = ("model", "lengths", "seconds", "seed")
    settings = {k: v for k, v in vars(args).items() if k in common} | settings
    settings |= {"systems": list(systems), "machine": machine()}
    if args.resume is not None:
        return TurnStore.resume(args.resume, settings, systems)
    file = args.results
    if file is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        file = CACHE.parent / "bench" / f"{name}-{stamp}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        raise SystemExit(f"{file} exists already; --resume {file} goes on with it")
    store = TurnStore(settings, file)
    try:
        if args.zero_load is not None:
            store.reference = Reference.load(args.zero_load, model)
        store.save()
    except (WorkloadError, OSError) as error:
        raise SystemExit(str(error)) from None
    return store


def caveats(store: TurnStore) -> str:
    """Return one line about the machine's state that a reader should know."""
    if not store.results:
        return "nothing was measured"
    lone = [1e3 * one.lone_s for one in store.results]
    idle = max(one.cores_idle for one in store.results)
    elsewhere = max(one.cores_elsewhere for one in store.results)
    lag = max(one.send_lag_p99_s for one in store.results)
    return (
        f"{len(store.results)} turns; a lone request took {min(lone):.1f} to {max(lone):.1f} ms per "
        f"token; beside the turns idle servers took at most {idle:.2f} cores and other work "
        f"{elsewhere:.2f}; the client sent at most {1e3 * lag:.0f} ms late (p99)"
    )


def measure(
    args: argparse.Namespace,
    cells: Sequence[Cell],
    variants: Sequence[ServerCommand],
    store: TurnStore,
    start_s: float,
) -> bool:
    """Start the servers, and measure the cells as the flags say.

    Args:
        args: of `add_flags`, and ``quick``.
        start_s: seconds that all servers take to start.

    Returns:
        whether all turns were measured.
    """
    effort = Effort(seconds=args.seconds, pairs=args.pairs, lengths=args.lengths, seed=args.seed,
                    rounds=1 if args.quick else 2)  # fmt: skip
    say_estimate(cells, effort, [variant.label for variant in variants], start_s, store)
    with started(variants) as servers:
        return PairedBenchmark(effort, store, servers, Counter(args.model)).run(cells)


def finish(
    args: argparse.Namespace, result: Mapping[str, Any], done: bool, store: TurnStore
) -> NoReturn:
    """Print the caveats, and with ``--json`` the result; then end the program."""
    print(caveats(store))
    if args.json:
        reference = None if store.reference is None else store.reference.to_dict()
        print(json.dumps({**result, "complete": done, "reference": reference, **store.settings}))
    sys.exit(0 if done else EXIT_INTERRUPTED)
