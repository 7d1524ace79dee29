"""``minserve simulate``: a workload through the real planner on a virtual clock, without a device."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minserve.cli_flags import given
from minserve.cli_workload import (
    add_report_flags,
    add_workload_flags,
    check_workload,
    in_words,
    make_draw,
    say,
)
from minserve.errors import WorkloadError
from minserve.exit_codes import EXIT_INTERRUPTED
from minserve.interrupt import Interrupt

if TYPE_CHECKING:
    from minserve.simulator.offered_load import OfferedLoad
    from minserve.simulator.simulation import SimulationResult, Setup
    from minserve.simulator.sizing import Sizing
    from minserve.workload.capacity import Capacity
    from minserve.workload.conversation import Conversation
    from minserve.workload.draws import Draw
    from minserve.workload.report import Report

# Profiles for scenarios whose requests are longer than others can serve.
PROFILES = {"tools": "toolllama-7b-a100", "reasoning": "qwen2.5-7b-a100"}
PROFILE = "opt-6.7b-a100"
# Seconds of arrivals, at least, from which a number of replicas is judged.
SIZING_S = 60.0

_EXAMPLES = """\
examples:
  minserve simulate --scenario chatbot --policy dp --capacity
  minserve simulate --trace azure2023_conv --profile qwen2.5-7b-a100 --policy sarathi
  minserve simulate --scenario coding --rate 2,4,8 --policy dp --plot coding.png
  minserve simulate --scenario chatbot --replicas-for 100
  minserve simulate --scenario mixed --policy distserve --ratio 1:2 --capacity

The planner, its block pool and its router are the server's own; the device is a performance
model: a published one, or the file that 'minserve profile' keeps. Nothing is run, no GPU needed.

A scenario's own rate is that of its recordings, or 1 request per second; its own number of
requests is drawn for each replica (for --replicas-for, those of a minute at least). Ctrl-C ends
the simulation and reports what it has so far.
"""


def add_simulate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "simulate",
        help="try how many requests would keep their SLOs, without a device",
        description="Run a workload through the planner on a virtual clock, with a performance "
        "model in place of the device, and report how many requests keep their SLOs.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    workload = parser.add_argument_group("workload")
    add_workload_flags(workload)
    workload.add_argument(
        "--drop-longer", action="store_true", default=False,
        help="leave requests of a trace out that are longer than the model can serve",
    )  # fmt: skip
    _add_device_flags(parser.add_argument_group("device and planner"))
    _add_replica_flags(parser.add_argument_group("replicas"))
    add_report_flags(parser.add_argument_group("report"))
    parser.set_defaults(command=_simulate)


def _add_device_flags(group: argparse._ArgumentGroup) -> None:
    # What is not given is absent: the defaults are those of `Setup`.
    add = partial(group.add_argument, default=argparse.SUPPRESS)
    add(
        "--profile", default=None, metavar="NAME",
        help="of the device: a published one, or a file of 'minserve profile' (default: "
        f"{PROFILE}; tools and reasoning: one with a longer context)",
    )  # fmt: skip
    add(
        "--policy", metavar="NAME",
        help="dp, edf, vllm, sarathi, fcfs or distserve (default: dp)",
    )  # fmt: skip
    add("--token-budget", type=int, metavar="N", help="most tokens in an iteration")
    add("--max-num-seqs", type=int, metavar="N", help="most sequences in one (default: 256)")
    add("--kv-tokens", type=int, metavar="N", help="of KV that fit in a replica")
    add(
        "--speculation", type=int, dest="max_speculation", metavar="N",
        help="most tokens drafted for a sequence (default: 0)",
    )  # fmt: skip
    add(
        "--acceptance", type=float, metavar="X",
        help="chance that a drafted token is accepted (default: 0.7)",
    )  # fmt: skip
    add(
        "--lengths", metavar="HOW",
        help="how output lengths are known: quantile learns them, told has max_tokens that equal "
        "them beside, oracle knows them (default: quantile)",
    )  # fmt: skip
    add("--length-error", type=float, metavar="X", help="of an oracle: log-standard deviation")
    add("--noise", type=float, metavar="X", help="of iterations: log-standard deviation of times")
    add(
        "--speed-steps", type=float, metavar="X",
        help="of devices: every 10 to 60 s another factor on times, between 1/X and X (default: 1)",
    )  # fmt: skip
    add(
        "--stall-every", type=float, dest="stall_every_s", metavar="X",
        help="mean seconds after which a device stands still for 0.1 to 1 s (default: never)",
    )  # fmt: skip
    add(
        "--clairvoyant", action="store_true",
        help="tell dp or edf before each iteration what factor noise and speed steps will have on "
        "its time: a bound of what forecasts could gain",
    )  # fmt: skip
    add(
        "--slowness", type=float, metavar="X",
        help="of the device over its profile, which the planner starts from (default: 1)",
    )  # fmt: skip
    add(
        "--overhead-ms", type=_milliseconds, dest="overhead_s", metavar="X",
        help="of each iteration, for planning and other work of the host (default: 0)",
    )  # fmt: skip
    add(
        "--request-ms", type=_milliseconds, dest="request_s", metavar="X",
        help="of each request, for the network, HTTP and tokenization (default: 0)",
    )  # fmt: skip


def _add_replica_flags(group: argparse._ArgumentGroup) -> None:
    add = partial(group.add_argument, default=argparse.SUPPRESS)
    add("--replicas", type=int, metavar="N", help="with distserve, groups of them (default: 1)")
    add(
        "--replicas-for", type=float, default=None, metavar="R",
        help="search for the smallest number that serves so many requests per second",
    )  # fmt: skip
    add("--router", metavar="NAME", help="slo, least-loaded or round-robin (default: slo)")
    add(
        "--hop-limit", type=int, metavar="N",
        help="replicas that a request may be moved on to (default: 2)",
    )  # fmt: skip
    add(
        "--ratio", type=_ratio, metavar="P:D",
        help="prefill to decode replicas in a group of distserve (default: 1:1)",
    )  # fmt: skip


def _milliseconds(text: str) -> float:
    try:
        return float(text) / 1e3
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be milliseconds, not {text!r}") from None


def _ratio(text: str) -> tuple[int, int]:
    try:
        prefills, decodes = map(int, text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be like 2:1, not {text!r}") from None
    return prefills, decodes


@dataclass(frozen=True, slots=True)
class _SimulationRun:
    """One simulation.

    Attributes:
        rate: that was wanted; ``None`` for a trace's own.
        seconds: over which the requests arrived.
    """

    rate: float | None
    setup: Setup
    seconds: float
    result: SimulationResult


@dataclass(slots=True)
class _Simulations:
    """Runs of one workload, kept for the report; also one that was cut short."""

    setup: Setup
    draw: Draw
    interrupt: Interrupt
    runs: list[_SimulationRun] = field(default_factory=list)

    def attainment(self, rate: float | None, repeat: int, replicas: int | None = None) -> float:
        """Run the workload at a rate.

        Args:
            repeat: counts up the seed.
            replicas: other than the setup's.
        """
        from tqdm import tqdm

        from minserve.simulator.simulation import SimulationResult, simulate
        from minserve.workload.conversation import num_turns
        from minserve.workload.report import Report

        setup = replace(self.setup, seed=self.setup.seed + repeat)
        if replicas is not None:
            setup = replace(setup, replicas=replicas)
        workload = self.draw(rate, setup.seed)
        name = "trace" if rate is None else f"{rate:.3g}/s"
        if replicas is not None:
            name += f", {replicas} replicas"
        result = SimulationResult()
        with tqdm(
            total=num_turns(workload), desc=name, unit="request", leave=False, disable=None
        ) as bar:

            def progressed(_: OfferedLoad) -> None:
                bar.update()
                self.interrupt.check()

            try:
                simulate(workload, setup, progressed, into=result)
            except KeyboardInterrupt:
                seconds = min(result.seconds, _span_s(workload, rate))
                self.runs.append(_SimulationRun(rate, setup, seconds, result))
                raise
        self.runs.append(_SimulationRun(rate, setup, _span_s(workload, rate), result))
        return Report.of(result.verdicts, self.runs[-1].seconds).attainment


def _span_s(workload: Sequence[Conversation], rate: float | None) -> float:
    """Seconds over which a workload arrives."""
    from minserve.workload.conversation import num_turns

    return workload[-1].arrival_s if rate is None else num_turns(workload) / rate


def _simulate(args: argparse.Namespace) -> int:
    """Simulate, print, draw."""
    _check(args)

    from minserve.devices import find_device
    from minserve.simulator.simulation import Setup, check_fits

    device = find_device(args.profile or PROFILES.get(args.scenario, PROFILE))
    setup = Setup(device=device, **given(args, Setup))
    if args.plot is not None:
        from minserve.workload.plots import check_can_plot

        check_can_plot(args.plot)
    longest = setup.longest if args.drop_longer else None
    _settle_number(args, setup)
    draw = make_draw(args, longest)
    check_fits(draw((args.rates or [_own_rate(args)])[0], setup.seed), setup)
    if args.profile is None:
        say(f"simulating {device.name}; --profile takes another one")
    with Interrupt() as interrupt:
        simulations = _Simulations(setup, draw, interrupt)
        capacity, sizing, interrupted = _measure(args, simulations)
    _print(args, simulations, capacity, sizing, interrupted)
    return EXIT_INTERRUPTED if interrupted else 0


def _check(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other.

    Raises:
        WorkloadError: saying what is wrong.
    """
    check_workload(args)
    apart = getattr(args, "policy", "dp") == "distserve"
    if args.drop_longer and args.trace is None:
        raise WorkloadError("--drop-longer is for traces; a scenario's lengths are known")
    if hasattr(args, "ratio") and not apart:
        raise WorkloadError("--ratio is for --policy distserve")
    if apart and (hasattr(args, "router") or hasattr(args, "hop_limit")):
        raise WorkloadError("distserve has its own dispatch: no --router and no --hop-limit")
    if hasattr(args, "acceptance") and not hasattr(args, "max_speculation"):
        raise WorkloadError("--acceptance needs --speculation")
    if args.replicas_for is None:
        return
    if not 0 < args.replicas_for < math.inf:
        raise WorkloadError(
            f"--replicas-for must be above 0 requests per second, not {args.replicas_for:g}"
        )
    if args.capacity or args.rates or hasattr(args, "replicas"):
        raise WorkloadError("--replicas-for goes without --capacity, --rate and --replicas")


def _settle_number(args: argparse.Namespace, setup: Setup) -> None:
    """How many requests are drawn where the flags do not say: a scenario's own number for each
    replica, or enough for a minute.
    """
    from minserve.workload.scenarios import find_scenario

    if args.scenario is None or args.num_requests is not None or args.seconds is not None:
        return
    number = find_scenario(args.scenario).num_requests
    if args.replicas_for is None:
        args.num_requests = number * setup.num_gpus // setup.device.num_gpus
    else:
        args.num_requests = max(number, math.ceil(SIZING_S * args.replicas_for))


def _own_rate(args: argparse.Namespace) -> float | None:
    """Requests per second where the flags name none: those of a scenario's recordings, or 1;
    ``None`` keeps a trace's own times.
    """
    from minserve.workload.scenarios import find_scenario

    if args.scenario is None:
        return None
    return find_scenario(args.scenario).recorded_rate or 1.0


def _measure(
    args: argparse.Namespace, simulations: _Simulations
) -> tuple[Capacity | None, Sizing | None, bool]:
    """All runs.

    Returns:
        what the searches found, where there was one, and whether Ctrl-C cut in.
    """
    from minserve.simulator.sizing import Sizing, find_replicas
    from minserve.workload.capacity import Capacity, find_capacity

    setup, level = simulations.setup, args.level
    capacity = Capacity(level=level) if args.capacity else None
    sizing = Sizing(level=level) if args.replicas_for is not None else None

    def mean(replicas: int) -> float:
        rate = args.replicas_for
        each = (simulations.attainment(rate, i, replicas) for i in range(args.repeats))
        return statistics.fmean(each)

    try:
        if capacity is not None:
            start = (args.rates or [_own_rate(args)])[0]
            if start is None:
                workload = simulations.draw(None, args.seed)
                start = len(workload) / max(_span_s(workload, None), 1e-9)
            if not args.rates:
                start *= setup.replicas
            find_capacity(
                simulations.attainment, start, repeats=args.repeats, level=level, into=capacity
            )
        elif sizing is not None:
            start, most = _least_replicas(args.replicas_for, simulations)
            find_replicas(mean, start, most, level=level, into=sizing)
        else:
            for rate in args.rates or [_own_rate(args)]:
                for repeat in range(args.repeats):
                    simulations.attainment(rate, repeat)
    except KeyboardInterrupt:
        return capacity, sizing, True
    return capacity, sizing, False


def _least_replicas(rate: float, simulations: _Simulations) -> tuple[int, int]:
    """Where to begin: with as many as the tokens alone would take; and the most there may be."""
    from minserve.simulator.simulation import MOST_REPLICAS

    workload = simulations.draw(rate, simulations.setup.seed)
    turns = [turn for conversation in workload for turn in conversation.turns]
    tokens = sum(turn.prompt_tokens - turn.shared_tokens + turn.output_tokens for turn in turns)
    token_s = simulations.setup.device.perf_model().steepest.tokens
    return math.ceil(rate * tokens / len(turns) * token_s), MOST_REPLICAS


def _print(
    args: argparse.Namespace,
    simulations: _Simulations,
    capacity: Capacity | None,
    sizing: Sizing | None,
    interrupted: bool,
) -> None:
    """Table or JSON, and the picture."""
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


def _title(run: _SimulationRun, sizing: bool) -> str:
    title = "the trace as it is" if run.rate is None else f"{run.rate:.4g} requests/s"
    return f"{title}, {run.setup.replicas} replicas" if sizing else title


def _pooled(runs: Sequence[_SimulationRun]) -> list[tuple[_SimulationRun, Report]]:
    """A report per rate and number of replicas, ascending, of all its repeats; with one of these."""
    from minserve.workload.report import Report

    by_key: dict[tuple[float, int], list[_SimulationRun]] = {}
    for run in runs:
        by_key.setdefault((run.rate or 0.0, run.setup.replicas), []).append(run)
    pooled = []
    for _, own in sorted(by_key.items()):
        verdicts = [verdict for run in own for verdict in run.result.verdicts]
        pooled.append((own[-1], Report.of(verdicts, sum(run.seconds for run in own))))
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
    simulations: _Simulations,
    pooled: Sequence[tuple[_SimulationRun, Report]],
    capacity: Capacity | None,
    sizing: Sizing | None,
    interrupted: bool,
) -> dict[str, Any]:
    setup = simulations.setup
    return {
        "workload": args.scenario or str(args.trace),
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
    simulations: _Simulations,
    pooled: Sequence[tuple[_SimulationRun, Report]],
) -> None:
    """Attainment against rate, or where there is one rate, that run."""
    from minserve.workload.plots import plot_attainment, plot_run

    setup = simulations.setup
    title = f"{args.scenario or Path(args.trace).name}, {setup.device.name}"
    if len({run.rate for run, _ in pooled}) > 1:
        line: dict[float, list[float]] = {}
        for run in simulations.runs:
            attained = [verdict.attained for verdict in run.result.verdicts]
            if attained:
                line.setdefault(run.rate or 0.0, []).append(statistics.fmean(attained))
        plot_attainment({setup.policy: line}, args.plot, level=args.level, title=title)
    else:
        last = simulations.runs[-1]
        plot_run(last.result.verdicts, last.seconds, args.plot, title=f"{setup.policy}, {title}")
