"""Code for ``bench`` and ``simulate``: the flags of a workload, and the result in words."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from minserve.errors import InvalidSLOError, WorkloadError
from minserve.workload.capacity import LEVEL

if TYPE_CHECKING:
    from minserve.workload.capacity import Capacity
    from minserve.workload.draws import Draw
    from minserve.workload.task_terms import TaskTerms

DEFAULT_CLASS = "chatbot"


def add_workload_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--scenario", metavar="NAME", help="chatbot, coding, summarization, mixed, "
                       "tools or reasoning")  # fmt: skip
    group.add_argument(
        "--trace", metavar="FILE.csv", help="CSV file with columns arrival_s, prompt_tokens, "
        "output_tokens, class; or a shipped trace: azure2023_conv, azure2023_code",
    )  # fmt: skip
    group.add_argument(
        "--class", dest="default_class", default=DEFAULT_CLASS, metavar="NAME",
        help=f"class of a trace's rows that name none (default: {DEFAULT_CLASS})",
    )  # fmt: skip
    group.add_argument(
        "--rate", type=_numbers, action="extend", metavar="R", dest="rates",
        help="requests per second; several rates as one list or several flags; a trace has its own",
    )  # fmt: skip
    group.add_argument(
        "--capacity", "--find-capacity", action="store_true",
        help="search for the highest rate at which enough SLOs are kept, beginning at --rate",
    )  # fmt: skip
    group.add_argument("--seconds", type=float, metavar="X", help="time of arrivals")
    group.add_argument("--num-requests", type=int, metavar="N", help="instead of --seconds")
    group.add_argument(
        "--length-scale", type=float, default=1.0, metavar="X", help="factor on all lengths"
    )
    group.add_argument(
        "--tight", type=float, metavar="X",
        help="the tighter TPOT as a multiple of a lone request's TPOT (default: 50 ms)",
    )  # fmt: skip
    group.add_argument("--loose", type=float, metavar="X", help="the looser TPOT (default: 100 ms)")
    group.add_argument(
        "--burstiness", type=float, metavar="X",
        help="burstiness of a scenario's arrivals: 1 is Poisson, less is burstier",
    )  # fmt: skip
    group.add_argument(
        "--tasks", metavar="WAY", nargs="?", const="whole",
        help="make a task of each conversation of a scenario, with a deadline for all of its calls "
        "together; the server is told: whole (the default): which task a call belongs to; "
        "per-call: an equal share of the time for each call; classes: each call's class as without "
        "tasks",
    )  # fmt: skip
    group.add_argument(
        "--task-slowdown", type=float, metavar="X",
        help="deadline of a task as a multiple of its time alone on the idle device (default: 3)",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of all random draws")
    group.add_argument(
        "--repeats", type=int, default=1, metavar="N", help="runs per rate, each with its own seed"
    )


def add_report_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--level", type=float, default=LEVEL, metavar="X",
        help=f"share of requests that must attain their SLO (default: {LEVEL:g})",
    )  # fmt: skip
    group.add_argument("--json", action="store_true", help="print one JSON object, no tables")
    group.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw a picture")


def check_workload(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, before anything slow begins.

    Raises:
        WorkloadError: with a text that says what is wrong.
    """
    if (args.scenario is None) == (args.trace is None):
        raise WorkloadError("give a --scenario or a --trace, one of them")
    if args.trace is not None and args.burstiness is not None:
        raise WorkloadError("--burstiness is for scenarios; a trace has its own arrivals")
    for rate in args.rates or ():
        if not 0 < rate < math.inf:
            raise WorkloadError(f"a rate must be above 0 requests per second, not {rate:g}")
    if args.capacity and len(args.rates or ()) > 1:
        raise WorkloadError("--capacity begins at one --rate, not at several")
    if args.tasks is not None and args.scenario is None:
        raise WorkloadError("--tasks is for scenarios; a trace has no conversations")
    if args.task_slowdown is not None and args.tasks is None:
        raise WorkloadError("--task-slowdown needs --tasks")
    make_terms(args)
    if args.repeats < 1:
        raise WorkloadError(f"--repeats must be at least 1, not {args.repeats}")
    if not 0 < args.level <= 1:
        raise WorkloadError(f"--level must be above 0 and at most 1, not {args.level:g}")
    if args.seconds is not None and args.num_requests is not None:
        raise WorkloadError("give --seconds or --num-requests, not both")


def make_terms(args: argparse.Namespace) -> TaskTerms | None:
    """Return the deadlines of tasks that the flags ask for.

    Raises:
        WorkloadError: for a value out of range.
    """
    from minserve.workload.task_terms import SLOWDOWN, TaskTerms

    if args.tasks is None:
        return None
    slowdown = SLOWDOWN if args.task_slowdown is None else args.task_slowdown
    return TaskTerms(way=args.tasks, slowdown=slowdown)


def make_draw(args: argparse.Namespace, longest: int | None = None) -> Draw:
    """Return the source of workloads that the flags name, after drawing from it once.

    Args:
        longest: rows of a trace with more tokens of prompt and output together are dropped.

    Raises:
        WorkloadError: if the workload cannot be drawn.
    """
    from minserve.workload import draws
    from minserve.workload.scenarios import find_scenario
    from minserve.workload.traces import read_trace

    try:
        if args.scenario is None:
            rows = read_trace(args.trace)
            if longest is not None:
                rows, num_rows = draws.not_longer(rows, longest, args.length_scale), len(rows)
                say(f"dropped {num_rows - len(rows)} of {num_rows} requests, longer than {longest}")
            draw = draws.draw_trace(
                rows,
                draws.classes(tight=args.tight, loose=args.loose),
                args.default_class,
                length_scale=args.length_scale,
                seconds=args.seconds,
                num_requests=args.num_requests,
            )
            draw(None, args.seed)
            return draw
        scenario = find_scenario(args.scenario)
        scenario = scenario.scaled(args.length_scale, tight=args.tight, loose=args.loose)
        if args.burstiness is not None:
            scenario = scenario.with_arrivals(args.burstiness)
        draw = draws.draw_scenario(
            scenario,
            seconds=args.seconds,
            num_requests=args.num_requests,
            terms=make_terms(args),
        )
        draw((args.rates or [1.0])[0], args.seed)
    except InvalidSLOError as error:  # of --tight or --loose
        raise WorkloadError(str(error)) from None
    return draw


def in_words(capacity: Capacity) -> str:
    """Return one line with the result of a search for a capacity."""
    if not capacity.attainment:
        return "capacity: the search was cut short before any rate was measured"
    low, high = capacity.interval()
    if capacity.rate is None:
        return f"capacity: no rate was found at which {capacity.level:.0%} attain their SLO"
    most = max(capacity.attainment)
    least = "at least " if capacity.rate == most else ""
    bounds = f"{'below all' if low is None else f'{low:.3g}'} to {high or 0:.3g}"
    cut = "" if capacity.complete else "; the search was cut short"
    return (
        f"capacity: {least}{capacity.rate:.3g} requests/s with {capacity.level:.0%} attained "
        f"(95% interval over repeats: {bounds}){cut}"
    )


def say(text: str) -> None:
    """Print a message for people on stderr; stdout is for results."""
    print(text, file=sys.stderr)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers like 1,2.5, not {text!r}") from None
