"""Checks whether the simulator predicts what the server does.

One workload is sent to a real `minserve serve` by the open-loop client, and then run in the
simulator with that server's own profile, policy and limits. The requests, their arrival times, the
tokens of their prompts as the server counted them, the lengths of their outputs and their targets
in seconds are the same, and they are judged in the same way. Requests of the first and the last
seconds only load the servers; they are left out on both sides.

A profile describes the forward pass on an idle device. Other delays that the client sees are
measured in the same run, and given to the simulator (`Inputs`, printed):

    slowness   device time of the run's iterations over the profile's: client, HTTP and model
               share the cores, and the machine's own speed drifts
    planning   seconds of an iteration: on a CPU the model waits for it
    gap        host work between iterations, by lone requests before the run
    request    the client's TTFT beyond the engine's, on average: HTTP and tokenization
    noise      scatter of iterations around what the planner foresees: its margin, and so what
               dp promises, follow it

None of these values is fitted to the results that are compared. The simulation is repeated with
other seeds of the scatter, and all repeats count: near capacity, one iteration more or less decides
which requests are admitted. The second table has the errors of a simulation without any of these
values.

    .venv/bin/python bench/simulated_vs_real.py                     # about 8 minutes
    .venv/bin/python bench/simulated_vs_real.py --quick             # 3 minutes
    .venv/bin/python bench/simulated_vs_real.py --plot simulated.png

Rates are shares of the capacity that the simulator finds for dp. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from minserve.devices import Device, find_device
from minserve.planner.policies.registry import POLICIES, planner_class
from minserve.progress_bar import progress_bar
from minserve.simulator.simulation import Setup, simulate
from minserve.slo.objectives import SLO
from minserve.workload.capacity import find_capacity
from minserve.workload.client import Load
from minserve.workload.conversation import Conversation, Turn
from minserve.workload.draws import draw_scenario
from minserve.workload.plots import check_can_plot
from minserve.workload.report import share
from minserve.workload.scenarios import find_scenario
from minserve.workload.texts import fill
from minserve.workload.verdict import Verdict
from parts.simulated_vs_real.real_server import (
    BEST_EFFORT_SHARE,
    KV_TOKENS,
    PolicyServer,
    thread_flags,
)
from parts.simulated_vs_real.report import (
    ATTAINMENT_GOAL,
    MEDIAN_GOAL,
    ComparedRun,
    Inputs,
    plot,
    print_table,
)
from shared.cpu_time import DISTURBED_CORES, await_quiet
from shared.machine import machine
from shared.program import names, numbers, run_program
from shared.servers import PROFILE_S

# Scenarios whose conversations have one turn each.
SCENARIOS = ("chatbot", "coding", "summarization", "mixed")
# Shares of the capacity: one with room to spare, and one near it.
SHARES = (0.5, 0.85)
# Seconds before and after the requests that count.
LEAD_S = 8.0
TAIL_S = 4.0
CAPACITY_S = 120.0
# Seeds of the scatter.
SIMULATIONS = 5
# Cores that other processes may take in one slice of a run: the run's mean would hide a stall.
DISTURBED_SLICE = 0.5


def child_profile(model: str, threads: int | None) -> None:
    """Measure the device, or find the stored profile, as servers will; runs in its own process."""
    from minserve import Engine
    from minserve.engine.profile.profile_cache import profile_path

    engine = Engine(model, threads=threads)
    profile = engine.profile(PROFILE_S, progress=True)
    print(json.dumps({"file": str(profile_path(profile.key)), "r2": profile.quality.r2}))


def read_profile(args: argparse.Namespace) -> Device:
    """Return the device as the servers know it."""
    command = [sys.executable, __file__, "--child", "--model", args.model, *thread_flags(args)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit("profiling failed")
    found = json.loads(done.stdout.splitlines()[-1])
    if not Path(found["file"]).is_file():
        sys.exit(f"R2 of the profile is {found['r2']:.2f}: try again when the machine is idle")
    print(f"profile {found['file']}, R2 {found['r2']:.2f}")
    return find_device(found["file"])


@dataclass(frozen=True, slots=True)
class WorkloadAtRate:
    """A workload without texts, with its scenario and rate."""

    scenario: str
    rate: float
    workload: Sequence[Conversation]


def draw(
    args: argparse.Namespace, scenario: str, rate: float, seconds: float
) -> list[Conversation]:
    """Return a workload scaled to this device."""
    scaled = find_scenario(scenario).scaled(args.length_scale, tight=args.tight, loose=args.loose)
    return draw_scenario(scaled, seconds=seconds)(rate, args.seed)


def points(args: argparse.Namespace, device: Device) -> list[WorkloadAtRate]:
    """Return every scenario at every rate."""
    found = []
    for scenario in args.scenarios:
        rates = args.rates
        if not rates:
            capacity = simulated_capacity(args, device, scenario)
            print(f"{scenario}: the simulator's capacity with dp is {capacity:.2f} requests/s")
            rates = [one * capacity for one in args.shares]
        span_s = LEAD_S + args.seconds + TAIL_S
        found += [WorkloadAtRate(scenario, one, draw(args, scenario, one, span_s)) for one in rates]
    return found


def simulated_capacity(args: argparse.Namespace, device: Device, scenario: str) -> float:
    """Return the capacity in requests per second that the profile alone predicts."""

    def attainment(rate: float, _: int) -> float:
        workload = draw(args, scenario, rate, CAPACITY_S)
        verdicts = simulate(workload, setup_of(args, device, "dp")).verdicts
        return share(verdict.attained for verdict in verdicts)

    capacity = find_capacity(attainment, 1.0).rate
    if capacity is None:
        sys.exit(f"{scenario} is beyond this device at any rate; raise --tight and --loose")
    return capacity


def setup_of(
    args: argparse.Namespace, device: Device, policy: str, inputs: Inputs | None = None
) -> Setup:
    """Return the setup that simulates a server of the policy."""
    inputs = inputs or Inputs()
    return Setup(
        device=device,
        policy=policy,
        token_budget=args.token_budget,
        max_num_seqs=args.max_num_seqs,
        kv_tokens=KV_TOKENS,
        best_effort_share=BEST_EFFORT_SHARE,
        lengths="told" if planner_class(policy).promises else "quantile",
        slowness=inputs.slowness,
        overhead_s=inputs.planning_s + inputs.gap_s,
        request_s=inputs.request_s,
        noise=inputs.noise,
        seed=args.seed,
    )


def as_sent(load: Load) -> list[Conversation]:
    """Return the requests of a run as the server saw them, for the simulator.

    Their SLOs are the targets in seconds by which the client judges. They belong to no class, as
    they were sent, so the server learns one distribution of output lengths from all of them.
    """
    return [
        Conversation(
            answer.due_s - load.start_s,
            (
                Turn(
                    slo=SLO(ttft=answer.targets.ttft_s, tpot=answer.targets.stages[-1].tpot_s),
                    prompt_tokens=answer.prompt_tokens or answer.turn.prompt_tokens,
                    output_tokens=answer.turn.output_tokens,
                ),
            ),
        )
        for answer in load.answers
    ]


def counted(verdicts: Sequence[Verdict], seconds: float) -> list[Verdict]:
    """Return the verdicts that are compared, in the order of arrival."""
    inside = [one for one in verdicts if LEAD_S <= one.arrival_s < LEAD_S + seconds]
    return sorted(inside, key=lambda one: one.arrival_s)


def compare(args: argparse.Namespace, device: Device, server: PolicyServer, policy: str,
            point: WorkloadAtRate) -> ComparedRun:  # fmt: skip
    """Send a workload to the server and run it in the simulator, with the inputs and without."""
    model = device.perf_model()
    workload = fill(point.workload, server.speed.count_tokens, seed=args.seed)
    for _ in range(args.attempts):
        await_quiet()
        load, inputs, slices = server.run(workload, model)
        elsewhere, worst = statistics.fmean(slices), max(slices)
        disturbed = elsewhere > DISTURBED_CORES or worst > DISTURBED_SLICE
        if not disturbed:
            break
        tqdm.write(
            f"{policy}, {point.scenario}: other work took {elsewhere:.2f} cores, {worst:.2f} at worst"
        )
    for error, count in load.errors().items():
        tqdm.write(f"{policy}: {count} requests: {error}")
    sent, setup = as_sent(load), setup_of(args, device, policy, inputs)
    simulated = [
        verdict
        for number in range(SIMULATIONS)
        for verdict in simulate(sent, replace(setup, seed=args.seed + number)).verdicts
    ]
    blind = simulate(sent, setup_of(args, device, policy)).verdicts
    real = [answer.verdict(load.start_s) for answer in load.answers]
    return ComparedRun(
        policy=policy,
        scenario=point.scenario,
        rate=point.rate,
        inputs=inputs,
        real=counted(real, args.seconds),
        simulated=counted(simulated, args.seconds),
        blind=counted(blind, args.seconds),
        cores_elsewhere=elsewhere,
        worst_elsewhere=worst,
        disturbed=disturbed,
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, help="threads of the servers' forward passes")
    parser.add_argument("--policies", type=names, default=["dp", "sarathi"])
    parser.add_argument("--scenarios", type=names, default=["chatbot", "mixed"])
    parser.add_argument("--shares", type=numbers, default=list(SHARES),
                        help="rates, as shares of the simulated capacity of dp")  # fmt: skip
    parser.add_argument("--rates", type=numbers, help="requests per second, instead of --shares")
    parser.add_argument("--seconds", type=float, default=35.0, help="time of arrivals that count")
    parser.add_argument("--length-scale", type=float, default=0.1)
    parser.add_argument("--tight", type=float, default=2.5, help="tight pace, as a slowdown")
    parser.add_argument("--loose", type=float, default=5.0, help="loose pace, as a slowdown")
    parser.add_argument("--token-budget", type=int, default=128)
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attempts", type=int, default=3,
                        help="disturbed runs are repeated, whatever their result")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="chatbot near capacity only")
    parser.add_argument("--plot", metavar="FILE.png", help="also save a picture (needs matplotlib)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for given, known in ((args.policies, POLICIES), (args.scenarios, SCENARIOS)):
        if unknown := set(given) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    if args.quick:
        args.scenarios, args.shares, args.seconds = args.scenarios[:1], args.shares[-1:], 25.0
    return args


def main() -> None:
    args = parse_args()
    if args.child:
        child_profile(args.model, args.threads)
        return
    if args.plot:
        check_can_plot(args.plot)
    started = time.perf_counter()
    device = read_profile(args)
    work = points(args, device)
    rows = []
    with progress_bar(total=len(work) * len(args.policies), unit="run", smoothing=0) as bar:
        for policy in args.policies:
            with ExitStack() as stack:
                server = PolicyServer(args, policy)
                stack.callback(server.stop)
                if server.endpoint.max_model_len is not None:
                    device = replace(device, max_model_len=server.endpoint.max_model_len)
                for point in work:
                    rows.append(compare(args, device, server, policy, point))
                    bar.update()
    report(args, rows, time.perf_counter() - started)


def report(args: argparse.Namespace, rows: Sequence[ComparedRun], seconds: float) -> None:
    """Print the tables and the JSON line, and draw the picture."""
    print_table(rows)
    met = sum(row.within_goals for row in rows)
    print(
        f"\n{seconds / 60:.0f} minutes; {sum(row.disturbed for row in rows)} of {len(rows)} runs "
        f"were disturbed by other work; goals (medians within {MEDIAN_GOAL:.0%}, attainment "
        f"within {100 * ATTAINMENT_GOAL:.0f} points) met in {met}"
    )
    if args.plot:
        plot(rows, args.plot)
    result = {
        "rows": [row.to_dict() for row in rows],
        "within_goals": all(row.within_goals for row in rows),
        "goals": {"medians": MEDIAN_GOAL, "attainment": ATTAINMENT_GOAL},
        "length_scale": args.length_scale,
        "seconds": args.seconds,
        "seed": args.seed,
        "machine": machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    run_program(main)
