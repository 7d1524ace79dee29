"""Measures how many requests per second keep their SLOs under each of the planner's policies.

It starts one real HTTP server per policy, drives them one after another with the same traces
(`shared/slo_load.py`: coding, chat and summarization requests, each with its own SLO) and prints
attainment, goodput and capacity by the client's clock (`parts/slo_serving/report.py`). A server is idle while
another one is measured; the order of the policies rotates. The sarathi policy is tried with
several token budgets, and the best one at each rate counts. Client and server share the machine,
as they would on a laptop. Every request has a `max_tokens` equal to its length and ignores the
end of text, so that all policies do exactly the same work. With --speculator every policy runs a
second time with drafts: dp and edf choose their lengths, sarathi and fcfs draft a fixed number.

    python bench/slo_serving.py                                   # Poisson, about 20 minutes
    python bench/slo_serving.py --policies dp --speculator ngram  # what speculation adds
    python bench/slo_serving.py --quick                           # does it run? 2 minutes
    python bench/slo_serving.py --arrivals poisson,bursty --repeats 3 --plot docs/slo_serving.png

The last line is JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import product
from pathlib import Path

from tqdm import tqdm

from minserve.config import POLICIES, SPECULATORS
from minserve.planner.predict.perf_model import PerfModel
from minserve.slo.objectives import SLO
from minserve.workload.conversation import Conversation
from minserve.workload.data_files import read_prompts
from minserve.workload.report import share
from parts.slo_serving.report import (
    PolicyRun,
    disagreements,
    plot,
    print_capacity,
    print_promises,
    print_table,
    summary,
)
from shared.machine import machine
from shared.slo_load import (
    BURSTINESS,
    CLASSES,
    LONE_TOKENS,
    Prompt,
    make_workload,
    slo_fields,
    write_classes,
)
from shared.slo_servers import (
    DISTURBED_CORES,
    PROFILE_S,
    Fleet,
    PolicyVariant,
    SloServer,
    await_quiet,
)

RATES = (0.3, 0.6, 1.0, 1.4, 1.8)
SARATHI_BUDGETS = (64, 128)
# Each server gets this load at the lowest rate, before the first measurement.
WARM_UP_S = 10.0
# Hosts of virtual machines slow them down unseen. This bounds a lone request's time per token
# before or after a run, divided by the profile's.
DISTURBED_SLOWNESS = 1.3
# A disturbed run is repeated, whatever its result.
ATTEMPTS = 3


def child_profile(model: str) -> None:
    """Print the device's speed and the prompts' lengths as a JSON line; runs in its own process.

    The speed is measured, or comes from a stored profile; the servers will use the same one.
    """
    from minserve import Engine

    engine = Engine(model, prefix_caching=False)
    profile = engine.profile(PROFILE_S, progress=True)
    tokens = {
        work.name: [len(engine.tokenizer.encode(text)) for text in read_prompts(work.prompts_file)]
        for work in CLASSES
    }
    found = {
        "perf_model": engine.perf_model.to_dict(),
        "quality": asdict(profile.quality),
        "tokens": tokens,
    }
    print(json.dumps(found))


def read_profile(model: str) -> tuple[PerfModel, dict[str, list[Prompt]]]:
    """Return the device's speed, and prompts with their lengths by class."""
    command = [sys.executable, __file__, "--child", "--model", model]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit("profiling failed")
    found = json.loads(done.stdout.splitlines()[-1])
    quality = found["quality"]
    print(f"profile: R2 {quality['r2']:.2f}, 90% of errors below {quality['p90_error']:.0%}")
    prompts = {}
    for work in CLASSES:
        counted = zip(read_prompts(work.prompts_file), found["tokens"][work.name], strict=True)
        prompts[work.name] = [Prompt(text, num_tokens) for text, num_tokens in counted]
    return PerfModel.from_dict(found["perf_model"]), prompts


class SloBenchmark:
    """All runs of one call of this program.

    Attributes:
        runs: finished runs, in order.
        num_disagreements: answers for which the server promised other times than the client used.
    """

    def __init__(self, args: argparse.Namespace, fleet: Fleet, model: PerfModel,
                 prompts: Mapping[str, Sequence[Prompt]], slos: Mapping[str, SLO]) -> None:  # fmt: skip
        self._args, self._fleet, self._model = args, fleet, model
        self._prompts, self._slos = prompts, slos
        self._fields = slo_fields(slos, args.slo_form)
        self.runs: list[PolicyRun] = []
        self.num_disagreements = 0

    def workload(self, process: str, rate: float, seconds: float, seed: int) -> list[Conversation]:
        return make_workload(process, rate, seconds, seed, prompts=self._prompts,
                             slos=self._slos, weights=self._args.weights)  # fmt: skip

    def server(self, variant: PolicyVariant) -> SloServer:
        """Return the variant's server, warmed up."""
        server, fresh = self._fleet.server(variant)
        if fresh:
            rate, seed = min(self._args.rates), self._args.seed - 1
            workload = self.workload("poisson", rate, WARM_UP_S, seed)
            server.measure(workload, self._model, self._fields)
        return server

    def measure(self, variants: Sequence[PolicyVariant]) -> None:
        """Measure every variant on every workload."""
        args = self._args
        points = [
            (process, rate, repeat)
            for process in args.arrivals
            for repeat in range(args.repeats)
            for rate in args.rates
        ]
        with tqdm(total=len(points) * len(variants), unit="run", smoothing=0) as bar:
            for number, (process, rate, repeat) in enumerate(points):
                workload = self.workload(process, rate, args.seconds, args.seed + repeat)
                first = number % len(variants)
                for variant in (*variants[first:], *variants[:first]):
                    run = self._run(variant, workload, process, rate, repeat)
                    reached = share(verdict.attained for verdict in run.verdicts)
                    bar.set_postfix_str(f"{variant} at {rate:g}/s: {reached:.0%}")
                    bar.update()

    def _run(self, variant: PolicyVariant, workload: Sequence[Conversation], process: str, rate: float,
             repeat: int) -> PolicyRun:  # fmt: skip
        server = self.server(variant)
        for _ in range(ATTEMPTS):
            await_quiet()
            load, lone_tpot_s, elsewhere = server.measure(workload, self._model, self._fields)
            slowness = lone_tpot_s / self._model.zero_load_decode_s(LONE_TOKENS)
            disturbed = elsewhere > DISTURBED_CORES or slowness > DISTURBED_SLOWNESS
            if not disturbed:
                break
            tqdm.write(
                f"{variant} at {rate:g}/s: other work took {elsewhere:.2f} cores, "
                f"a lone request {slowness:.2f} of its profiled time"
            )
        self.num_disagreements += disagreements(load.answers)
        for error, count in load.errors().items():
            tqdm.write(f"{variant}: {count} requests: {error}")
        run = PolicyRun(
            process=process,
            rate=rate,
            repeat=repeat,
            policy=variant.label,
            variant=str(variant),
            seconds=self._args.seconds,
            cores_elsewhere=elsewhere,
            slowness=slowness,
            disturbed=disturbed,
            verdicts=load.verdicts(),
        )
        self.runs.append(run)
        return run


def parse_args() -> argparse.Namespace:
    def numbers(text: str) -> list[float]:
        return sorted({float(part) for part in text.split(",")})

    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--policies", type=names, default=list(POLICIES))
    parser.add_argument("--sarathi-budgets", type=numbers, default=list(SARATHI_BUDGETS),
                        help="token budgets; the best one at each rate counts")  # fmt: skip
    parser.add_argument("--speculator", choices=SPECULATORS[1:], default="off",
                        help="serve with drafts of this speculator too")  # fmt: skip
    parser.add_argument("--rates", type=numbers, help="requests per second")
    parser.add_argument("--seconds", type=float, default=40.0, help="time of arrivals per run")
    parser.add_argument("--arrivals", type=names, default=["poisson"], help="poisson,bursty")
    parser.add_argument("--weights", type=lambda text: [float(x) for x in text.split(",")],
                        default=[1.0] * len(CLASSES),
                        help="shares of coding, chat and summarization: 1,1,1")  # fmt: skip
    parser.add_argument("--tight", type=float, default=2.5,
                        help="coding's time per token, over that of a lone request")  # fmt: skip
    parser.add_argument("--loose", type=float, default=5.0, help="the same for the other classes")
    parser.add_argument("--slo-form", choices=["class", "object"], default="class",
                        help="send SLOs as names of classes, or as objects")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=1, help="of the sweep, each with its seed")
    parser.add_argument("--quick", action="store_true", help="one rate, short runs")
    parser.add_argument("--plot", metavar="FILE.png", help="also save a picture (needs matplotlib)")
    parser.add_argument("--results", metavar="FILE.json", help="also save every request's result")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for given, known in ((args.policies, POLICIES), (args.arrivals, BURSTINESS)):
        if unknown := set(given) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    if len(args.weights) != len(CLASSES):
        parser.error(f"--weights needs {len(CLASSES)} numbers")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib")
    if args.rates is None:
        args.rates = [RATES[len(RATES) // 2]] if args.quick else list(RATES)
    if args.quick:
        args.seconds, args.repeats = 15.0, 1
        args.sarathi_budgets = args.sarathi_budgets[:1]
    return args


def main() -> None:
    args = parse_args()
    if args.child:
        child_profile(args.model)
        return
    # So that SIGTERM stops the servers too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    started = time.perf_counter()
    slos = {work.name: work.slo(args.tight, args.loose) for work in CLASSES}
    variants = []
    for policy in args.policies:
        budgets = map(int, args.sarathi_budgets) if policy == "sarathi" else [None]
        speculators = dict.fromkeys(("off", args.speculator))
        variants += [PolicyVariant(policy, *both) for both in product(budgets, speculators)]
    model, prompts = read_profile(args.model)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_classes(slos, folder / "classes.toml")
        fleet = Fleet(args.model, folder / "classes.toml")
        stack.callback(fleet.stop)
        bench = SloBenchmark(args, fleet, model, prompts, slos)
        print_promises(bench.workload("poisson", 10.0, 100.0, args.seed), model)
        for variant in variants:
            bench.server(variant)
        bench.measure(variants)
    report(args, bench, time.perf_counter() - started)


def report(args: argparse.Namespace, bench: SloBenchmark, seconds: float) -> None:
    """Print the tables and the JSON line, and write the picture and the files."""
    for process in args.arrivals:
        print_table(bench.runs, process, [work.name for work in CLASSES])
    result = summary(bench.runs)
    print_capacity(result, min(args.rates))
    disturbed = sum(run.disturbed for run in bench.runs)
    slowness = [run.slowness for run in bench.runs]
    lag = max(verdict.send_lag_s for run in bench.runs for verdict in run.verdicts)
    print(
        f"\n{seconds / 60:.0f} minutes; {disturbed} of {len(bench.runs)} runs were disturbed by "
        f"other work; a lone request took {min(slowness):.2f} to {max(slowness):.2f} of its "
        f"profiled time; the client sent at most {1e3 * lag:.0f} ms late; "
        f"{bench.num_disagreements} answers promised other times than the client's"
    )
    if args.results:
        rows = json.dumps(
            [asdict(run) for run in bench.runs], indent=1, default=lambda cause: cause.value
        )
        Path(args.results).write_text(rows, encoding="utf-8")
    if args.plot:
        plot(bench.runs, args.plot)
    print(json.dumps({**result, "machine": machine()}))


if __name__ == "__main__":
    main()
