"""``minserve bench``: measures how many requests of a workload keep their SLOs on a server."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minserve.cli.workload import (
    add_report_flags,
    add_workload_flags,
    check_workload,
    in_words,
    make_draw,
    say,
)
from minserve.errors import WorkloadError
from minserve.exit_codes import EXIT_ERROR, EXIT_INTERRUPTED
from minserve.planner.policies.registry import POLICIES

if TYPE_CHECKING:
    from minserve.workload.capacity import Capacity
    from minserve.workload.client import LoadProgress
    from minserve.workload.draws import Draw
    from minserve.workload.endpoint import Endpoint
    from minserve.workload.experiment import Experiment, ExperimentRun
    from minserve.workload.report import Report
    from minserve.workload.zero_load import ZeroLoad

# If the client itself sends later than this (p99), its numbers are not to be trusted.
LATE_CLIENT_S = 0.05
NUM_ERRORS = 3

_EXAMPLES = """\
examples:
  minserve bench --scenario chatbot --rate 0.5,1,2 --length-scale 0.1 --tight 2.5 --loose 5
  minserve bench --url http://localhost:8000 --scenario coding --capacity --repeats 3
  minserve bench --url http://localhost:8000 --trace my.csv --class coding --plot run.png
  minserve bench --policy fcfs ... --save-zero-load idle.json
  minserve bench --policy dp ... --zero-load idle.json

Without --url a server is started for the time of the test. SLOs that are slowdowns are
multiples of the time that lone requests take on the idle server. It is measured first, and
nothing else may use the server then. Servers that are to be compared need the same SLOs: measure
one of them in a quiet moment with --save-zero-load, and give that file to all tests with
--zero-load. A key is read from MINSERVE_API_KEY or OPENAI_API_KEY. Ctrl-C ends the test and
reports what was measured so far.
"""


def add_bench(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure how many requests keep their SLOs on a server",
        description="Send a workload to any OpenAI-compatible server, in open loop, and report "
        "how many requests keep their SLOs.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_server_flags(parser.add_argument_group("server"))
    _add_speed_flags(parser.add_argument_group("speed of the idle server"))
    add_workload_flags(parser.add_argument_group("workload"))
    report = parser.add_argument_group("report")
    add_report_flags(report)
    report.add_argument(
        "--verdicts", type=Path, metavar="FILE.jsonl",
        help="also write what became of every request to this new file, a JSON object a line",
    )  # fmt: skip
    parser.set_defaults(command=_bench)


def _add_server_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--url", help="URL of a running server; default: start a minserve")
    group.add_argument(
        "--model", metavar="NAME",
        help="model in requests (default: the server's first); without --url, the model to serve",
    )  # fmt: skip
    group.add_argument(
        "--policy", choices=POLICIES, help="policy of the started server (default: its own)"
    )
    group.add_argument(
        "--serve-args", default="", metavar="FLAGS",
        help="further flags of 'minserve serve', in one string",
    )  # fmt: skip
    group.add_argument(
        "--endpoint", choices=("completions", "chat"), default="completions",
        help="which endpoint of OpenAI's API to use (default: completions)",
    )  # fmt: skip


def _add_speed_flags(group: argparse._ArgumentGroup) -> None:
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--zero-load", type=Path, metavar="FILE.json",
        help="read it from this file instead of measuring it, for the same SLOs on every server",
    )  # fmt: skip
    either.add_argument(
        "--save-zero-load", type=Path, metavar="FILE.json",
        help="write the measured speed to this new file, for --zero-load",
    )  # fmt: skip


def _bench(args: argparse.Namespace) -> int:
    """Start a server if no URL is given, run the load tests, and print the results."""
    _check(args)

    from minserve.workload.plots import check_can_plot

    if args.plot is not None:
        check_can_plot(args.plot)
    draw = make_draw(args)
    with _served(args) as url:
        experiment = _prepare(args, url, draw)
        capacity, interrupted = _measure(args, experiment)
    _print(args, experiment, capacity, interrupted)
    if interrupted:
        return EXIT_INTERRUPTED
    answered = any(v.ttft_s is not None for run in experiment.runs for v in run.load.verdicts())
    return 0 if answered else EXIT_ERROR


def _check(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, before anything slow begins.

    Raises:
        WorkloadError: with a text that says what is wrong.
    """
    check_workload(args)
    if args.scenario is not None and not (args.rates or args.capacity):
        raise WorkloadError("a scenario needs a --rate, or --capacity to search for one")
    if args.url is not None and (args.policy is not None or args.serve_args):
        raise WorkloadError("--policy and --serve-args are for a server that is started: no --url")

    from minserve.workload.reference import Reference, check_can_save

    if args.zero_load is not None:
        Reference.load(args.zero_load)
    if args.save_zero_load is not None:
        check_can_save(args.save_zero_load)
    if args.verdicts is not None:
        if args.verdicts.exists():
            raise WorkloadError(f"{args.verdicts} exists already; name another file")
        if not os.access(args.verdicts.parent, os.W_OK):
            raise WorkloadError(f"cannot write {args.verdicts}: no folder that can be written")


@contextmanager
def _served(args: argparse.Namespace) -> Iterator[str]:
    """Yield the given URL, or the URL of a new server that is stopped afterwards."""
    if args.url is not None:
        yield args.url
        return

    from minserve.workload.server_process import ServerProcess, minserve_command

    flags = shlex.split(args.serve_args)
    for name, value in (("--model", args.model), ("--policy", args.policy)):
        if value is not None:
            flags += [name, value]
    # So that the server is stopped by this signal too.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    say("starting minserve serve; at its first start here it measures the device for some seconds")
    try:
        with ServerProcess(minserve_command(*flags, label="the server")) as server:
            yield server.url
    finally:
        signal.signal(signal.SIGTERM, before)


def _prepare(args: argparse.Namespace, url: str, draw: Draw) -> Experiment:
    """Find the server, and measure or load the speed of which slowdowns are multiples.

    Raises:
        WorkloadError: if no such server answers, or if the file is of another model.
    """
    import asyncio

    from minserve.machine import machine_words
    from minserve.workload.endpoint import find_endpoint
    from minserve.workload.experiment import Experiment
    from minserve.workload.reference import Reference

    name = None if args.url is None else args.model
    endpoint = asyncio.run(find_endpoint(url, name, chat=args.endpoint == "chat"))
    if args.zero_load is None:
        reference = Reference.now(_measure_speed(endpoint), endpoint.model, _server_words(args))
        if args.save_zero_load is not None:
            reference.save(args.save_zero_load)
    else:
        reference = Reference.load(args.zero_load, endpoint.model)
        say(f"the zero load of {reference}")
        if reference.machine != machine_words():
            say(f"warning: that is another machine; this one is {machine_words()}")
    speed = reference.speed
    say(
        f"{endpoint.model} at {endpoint.url}: a lone request takes {1e3 * speed.base_s:.1f} ms and "
        f"{1e3 * speed.per_token_s:.3f} ms per prompt token, then {1e3 * speed.decode_s:.1f} ms "
        f"per output token"
    )
    return Experiment(endpoint, reference, draw)


def _measure_speed(endpoint: Endpoint) -> ZeroLoad:
    """Measure the speed of the server while it is idle."""
    import asyncio

    from minserve.progress_bar import progress_bar
    from minserve.workload.zero_load import measure_speed

    with progress_bar(desc="speed of the idle server", unit="request", leave=False) as bar:

        def tell(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return asyncio.run(measure_speed(endpoint, on_progress=tell))


def _server_words(args: argparse.Namespace) -> str:
    """Return words that say which server it is, for people."""
    if args.url is not None:
        return args.url
    policy = [] if args.policy is None else ["--policy", args.policy]
    return shlex.join(["minserve", "serve", *policy, *shlex.split(args.serve_args)])


def _measure(args: argparse.Namespace, experiment: Experiment) -> tuple[Capacity | None, bool]:
    """Run all load tests.

    Returns:
        the result of the search, if there was one, and whether Ctrl-C cut it short.
    """
    from minserve.workload.capacity import Capacity, find_capacity

    def attainment(rate: float | None, repeat: int) -> float:
        run = _run(experiment, rate, args.seed + repeat)
        if not run.load.complete:
            raise KeyboardInterrupt
        return run.report.kept

    capacity = Capacity(level=args.level) if args.capacity else None
    try:
        if capacity is None:
            for rate in args.rates or [None]:
                for repeat in range(args.repeats):
                    attainment(rate, repeat)
        else:
            start = (args.rates or [None])[0]
            if start is None:
                start = experiment.guess_capacity(experiment.draw(1.0, args.seed))
            find_capacity(attainment, start, repeats=args.repeats, level=args.level, into=capacity)
    except KeyboardInterrupt:
        return capacity, True
    return capacity, False


def _run(experiment: Experiment, rate: float | None, seed: int) -> ExperimentRun:
    """ExperimentRun one load test, with a progress bar, and warnings of what went wrong in it."""
    from minserve.progress_bar import progress_bar
    from minserve.workload.conversation import num_turns

    workload = experiment.workload(rate, seed)
    name = "trace" if rate is None else f"{rate:.3g}/s"
    with progress_bar(total=num_turns(workload), desc=name, unit="request") as bar:

        def tell(tally: LoadProgress) -> None:
            kept = f"{tally.attained / tally.done:.0%}" if tally.done else "-"
            bar.set_postfix_str(
                f"sent {tally.due}, open {tally.open}, attained {kept}", refresh=False
            )
            bar.update(tally.done - bar.n)

        run = experiment.run(workload, rate, seed, tell)
    _warn(run)
    return run


def _warn(run: ExperimentRun) -> None:
    for error, count in list(run.load.errors().items())[:NUM_ERRORS]:
        say(f"{count} requests: {' '.join(error.split())}")
    if late := run.load.num_short:
        say(f"warning: the server ended {late} outputs before their length: it had less to do")
    if run.load.num_undecided:
        say(f"{run.load.num_undecided} requests were under way and in time; they are left out")
    lag_s = run.report.send_lag_s.p99
    if lag_s > LATE_CLIENT_S:
        say(
            f"warning: this client sent late (p99 {1e3 * lag_s:.0f} ms): it, not the server, may "
            f"be the bottleneck, and these numbers are not to be trusted"
        )


def _print(
    args: argparse.Namespace,
    experiment: Experiment,
    capacity: Capacity | None,
    interrupted: bool,
) -> None:
    """Print a table or JSON, and draw the picture."""
    pooled = _pooled(experiment.runs)
    if args.json:
        print(json.dumps(_as_json(args, experiment, pooled, capacity, interrupted)))
    else:
        for rate, report in pooled:
            print(f"\n{'the trace as it is' if rate is None else f'{rate:.4g} requests/s'}")
            print(report.table())
        if capacity is not None:
            print(f"\n{in_words(capacity)}")
    if args.verdicts is not None:
        _write_verdicts(args.verdicts, experiment.runs)
    if args.plot is not None and experiment.runs:
        _plot(args, experiment, pooled)


def _pooled(runs: Sequence[ExperimentRun]) -> list[tuple[float | None, Report]]:
    """Return a report for each rate over all its repeats, in ascending order of rates."""
    from minserve.workload.report import Report

    rates = sorted({run.rate for run in runs}, key=lambda rate: rate or 0.0)
    pooled = []
    for rate in rates:
        own = [run for run in runs if run.rate == rate]
        verdicts = [verdict for run in own for verdict in run.load.verdicts()]
        tasks = [verdict for run in own for verdict in run.load.task_verdicts()]
        pooled.append((rate, Report.of(verdicts, sum(run.seconds for run in own), tasks)))
    return pooled


def _as_json(
    args: argparse.Namespace,
    experiment: Experiment,
    pooled: Sequence[tuple[float | None, Report]],
    capacity: Capacity | None,
    interrupted: bool,
) -> dict[str, Any]:
    endpoint, reference = experiment.endpoint, experiment.reference
    return {
        "url": endpoint.url,
        "model": endpoint.model,
        "workload": args.scenario or str(args.trace),
        "tasks": args.tasks,
        "seed": args.seed,
        "repeats": args.repeats,
        "zero_load": reference.speed.to_dict(),
        "zero_load_of": f"{reference.server}, {reference.measured_at}",
        "runs": [{"target_rate": rate, **report.to_dict()} for rate, report in pooled],
        "capacity": None if capacity is None else capacity.to_dict(),
        "interrupted": interrupted,
    }


def _write_verdicts(file: Path, runs: Sequence[ExperimentRun]) -> None:
    """Write a line for every request: the rate and seed of its run, then its verdict."""
    lines = [
        json.dumps({"target_rate": run.rate, "seed": run.seed, **verdict.to_dict()})
        for run in runs
        for verdict in run.load.verdicts()
    ]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _plot(
    args: argparse.Namespace,
    experiment: Experiment,
    pooled: Sequence[tuple[float | None, Report]],
) -> None:
    """Draw attainment against rate; with a single rate, draw that run."""
    from minserve.workload.plots import plot_attainment, plot_run

    label = args.scenario or Path(args.trace).name
    if len(pooled) > 1:
        line: dict[float, list[float]] = {}
        for run in experiment.runs:
            line.setdefault(run.rate or 0.0, []).append(run.report.kept)
        plot_attainment({label: line}, args.plot, level=args.level, title=label)
    else:
        last = experiment.runs[-1]
        plot_run(last.load.verdicts(), last.seconds, args.plot, targets=last.targets, title=label)
