"""``minserve simulate``: runs a workload through the real planner on a virtual clock, no device."""

from __future__ import annotations

import argparse
import math
import statistics
from functools import partial
from typing import TYPE_CHECKING

from minserve.cli.flags import given
from minserve.cli.workload import (
    add_report_flags,
    add_workload_flags,
    check_workload,
    make_draw,
    say,
)
from minserve.errors import InvalidSLOError, WorkloadError
from minserve.exit_codes import EXIT_INTERRUPTED
from minserve.interrupt import Interrupt
from minserve.planner.policies.registry import POLICIES

if TYPE_CHECKING:
    from minserve.cli.simulated_runs import SimulatedRuns
    from minserve.simulator.simulation import Setup
    from minserve.simulator.sizing import Sizing
    from minserve.workload.capacity import Capacity
    from minserve.workload.draws import Draw

# Profiles for scenarios whose requests are longer than the default profile can serve.
PROFILES = {
    "tools": "toolllama-7b-a100",
    "reasoning": "qwen2.5-7b-a100",
    "deadlines": "qwen2.5-7b-a100",
    "deadlines_fixed": "qwen2.5-7b-a100",
}
PROFILE = "opt-6.7b-a100"
# A number of replicas is judged from at least so many seconds of arrivals.
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
        help="simulate how many requests would keep their SLOs, without a device",
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
        help="leave out requests of a trace that are longer than the model can serve",
    )  # fmt: skip
    workload.add_argument(
        "--values", type=_values, default={}, metavar="NAME=X,...",
        help="values of classes, where not all requests fit: chatbot=4,coding=1",
    )  # fmt: skip
    _add_device_flags(parser.add_argument_group("device and planner"))
    _add_replica_flags(parser.add_argument_group("replicas"))
    add_report_flags(parser.add_argument_group("report"))
    parser.set_defaults(command=_simulate)


def _add_device_flags(group: argparse._ArgumentGroup) -> None:
    # A flag that is not given is absent: the defaults are those of `Setup`.
    add = partial(group.add_argument, default=argparse.SUPPRESS)
    add(
        "--profile", default=None, metavar="NAME",
        help="profile of the device: a published one, or a file of 'minserve profile' (default: "
        f"{PROFILE}; tools and reasoning: one with a longer context)",
    )  # fmt: skip
    add(
        "--policy", metavar="NAME",
        help=f"{', '.join(POLICIES)}, vllm or distserve (default: dp)",
    )  # fmt: skip
    add("--token-budget", type=int, metavar="N", help="most tokens in an iteration")
    add("--max-num-seqs", type=int, metavar="N", help="most sequences per batch (default: 256)")
    add("--kv-tokens", type=int, metavar="N", help="tokens of KV that fit in a replica")
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
        help="how the planner knows output lengths: quantile: it learns them; told: it also sees a "
        "max_tokens that equals them; oracle: it knows them (default: quantile)",
    )  # fmt: skip
    add("--length-error", type=float, metavar="X", help="an oracle's log-standard deviation")
    add("--noise", type=float, metavar="X", help="log-standard deviation of iterations' times")
    add(
        "--speed-steps", type=float, metavar="X",
        help="every 10 to 60 s a device's times get another factor, between 1/X and X (default: 1)",
    )  # fmt: skip
    add(
        "--stall-every", type=float, dest="stall_every_s", metavar="X",
        help="mean seconds after which a device stands still for 0.1 to 1 s (default: never)",
    )  # fmt: skip
    add(
        "--clairvoyant", action="store_true",
        help="tell dp or edf before each iteration the factor that noise and speed steps will have "
        "on its time: an upper bound on the gain from forecasts",
    )  # fmt: skip
    add(
        "--slowness", type=float, metavar="X",
        help="factor on the times of the device's profile, which the planner knows (default: 1)",
    )  # fmt: skip
    add(
        "--overhead-ms", type=_milliseconds, dest="overhead_s", metavar="X",
        help="milliseconds of each iteration for planning and other host work (default: 0)",
    )  # fmt: skip
    add(
        "--request-ms", type=_milliseconds, dest="request_s", metavar="X",
        help="milliseconds of each request for the network, HTTP and tokenization (default: 0)",
    )  # fmt: skip


def _add_replica_flags(group: argparse._ArgumentGroup) -> None:
    add = partial(group.add_argument, default=argparse.SUPPRESS)
    add("--replicas", type=int, metavar="N", help="number; with distserve, of groups (default: 1)")
    add(
        "--replicas-for", type=float, default=None, metavar="R",
        help="search for the smallest number of replicas that serves so many requests per second",
    )  # fmt: skip
    add("--router", metavar="NAME", help="slo, least-loaded or round-robin (default: slo)")
    add(
        "--hop-limit", type=int, metavar="N",
        help="how often a request may be moved on to another replica (default: 2)",
    )  # fmt: skip
    add(
        "--ratio", type=_ratio, metavar="P:D",
        help="numbers of prefill and decode replicas in a group of distserve (default: 1:1)",
    )  # fmt: skip


def _values(text: str) -> dict[str, float]:
    pairs = [part.partition("=") for part in text.split(",")]
    try:
        return {name: float(value) for name, _, value in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be like chatbot=4,coding=1, not {text!r}") from None


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


def _simulate(args: argparse.Namespace) -> int:
    """Simulate a workload, print the results and draw them."""
    _check(args)

    from minserve.cli.simulated_runs import SimulatedRuns
    from minserve.cli.simulation_report import print_results
    from minserve.devices import find_device
    from minserve.simulator.simulation import Setup, check_fits

    device = find_device(args.profile or PROFILES.get(args.scenario, PROFILE))
    setup = Setup(device=device, **given(args, Setup))
    if args.plot is not None:
        from minserve.workload.plots import check_can_plot

        check_can_plot(args.plot)
    longest = setup.longest if args.drop_longer else None
    _settle_number(args, setup)
    draw = _with_values(args, make_draw(args, longest))
    check_fits(draw((args.rates or [_own_rate(args)])[0], setup.seed), setup)
    if args.profile is None:
        say(f"simulating {device.name}; --profile takes another one")
    with Interrupt() as interrupt:
        simulations = SimulatedRuns(setup, draw, interrupt)
        capacity, sizing, interrupted = _measure(args, simulations)
    print_results(args, simulations, capacity, sizing, interrupted)
    return EXIT_INTERRUPTED if interrupted else 0


def _with_values(args: argparse.Namespace, draw: Draw) -> Draw:
    """Return a source of workloads with the values of the flags.

    Raises:
        WorkloadError: for an unknown class or a value out of range.
    """
    from minserve.workload.draws import with_values

    if not args.values:
        return draw
    draw = with_values(draw, args.values)
    try:
        draw((args.rates or [_own_rate(args)])[0], args.seed)
    except InvalidSLOError as error:
        raise WorkloadError(f"--values: {error}") from None
    return draw


def _check(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other.

    Raises:
        WorkloadError: with a text that says what is wrong.
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
    """Set the number of requests of a scenario, if the flags do not give it.

    It is the scenario's own number for each replica, or enough requests for a minute.
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
    """Return the requests per second to use if the flags give no rate.

    For a scenario it is the rate of its recordings, or 1; ``None`` keeps a trace's own times.
    """
    from minserve.workload.scenarios import find_scenario

    if args.scenario is None:
        return None
    return find_scenario(args.scenario).recorded_rate or 1.0


def _measure(
    args: argparse.Namespace, simulations: SimulatedRuns
) -> tuple[Capacity | None, Sizing | None, bool]:
    """Run all simulations.

    Returns:
        the results of the searches, if there were any, and whether Ctrl-C cut them short.
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
                start = len(workload) / max(workload[-1].arrival_s, 1e-9)
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


def _least_replicas(rate: float, simulations: SimulatedRuns) -> tuple[int, int]:
    """Return the number to start the search with, from tokens per second alone, and the largest."""
    from minserve.simulator.simulation import MOST_REPLICAS

    workload = simulations.draw(rate, simulations.setup.seed)
    turns = [turn for conversation in workload for turn in conversation.turns]
    tokens = sum(turn.prompt_tokens - turn.shared_tokens + turn.output_tokens for turn in turns)
    token_s = simulations.setup.device.perf_model().steepest.tokens
    return math.ceil(rate * tokens / len(turns) * token_s), MOST_REPLICAS
