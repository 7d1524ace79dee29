"""Compares the planner's policies on the real engine: where does dp keep more SLOs than others?

One minserve server runs per policy; all are up at once and idle but one. An open-loop client sends
them the same requests in short alternating turns (`shared/paired`), at paces from easy to tight and
rates from idle to overload, alone on the machine and beside a process that takes a core. The idle
speed of which SLOs are multiples is the same for all: the best of the servers', or --zero-load.
Lone requests before and after each turn, without the busy process, measure the machine's own speed;
pairs whose turns were at different speeds are left out. Client and servers share the machine. Turns
beside the busy process come after all other turns of their round, so that what a planner learned
there affects few of the others.

dp is compared with the best simple policy of each cell: the policy over which it has the smallest
lead, chosen with hindsight. A cell counts as below (or above) if the 95% interval of the difference
over pairs, by Student's t, does not contain 0: this holds for 5% of the cells by chance alone.

    .venv/bin/python bench/policies.py --json                       # all cells: about 10 hours
    .venv/bin/python bench/policies.py --tight 1.7 --json           # a third of them: 3.2 hours
    .venv/bin/python bench/policies.py --scenarios mixed --tight 1.7 --beside nothing --json  # 50 minutes
    .venv/bin/python bench/policies.py --quick                      # does it run? 5 minutes
    .venv/bin/python bench/policies.py ... --resume FILE.json       # goes on where it ended
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from minserve.planner.policies.registry import POLICIES
from minserve.workload.scenarios import SCENARIOS
from minserve.workload.server_process import ServerCommand
from parts.policies.report import summary, table
from shared.paired.comparison import add_flags, finish, measure, open_store
from shared.paired.turns import Cell, Pairs
from shared.program import names, numbers, run_program
from shared.servers import profiled_minserve

RATES, QUICK_RATES = (0.8, 1.5, 3.0, 6.0), (1.5, 6.0)
SCENARIO_NAMES = ("mixed", "coding")
TIGHT, QUICK_TIGHT = (1.4, 1.7, 2.0), 1.7
# The loose pace divided by the tight pace.
LOOSE_FACTOR = 2.0
BESIDE = ("nothing", "busy")
KV_GIB = 2
START_S = 20.0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser, "policies")
    parser.add_argument("--policies", type=names, default=list(POLICIES), help="dp among them")
    parser.add_argument("--scenarios", type=names, default=list(SCENARIO_NAMES))
    parser.add_argument("--tight", type=numbers, default=list(TIGHT), metavar="LIST",
                        help="the tight pace, over a lone request's time per token; the loose "
                        "one is twice as long")  # fmt: skip
    parser.add_argument("--rates", type=numbers, default=list(RATES), metavar="LIST",
                        help="requests per second")  # fmt: skip
    parser.add_argument("--beside", type=names, default=list(BESIDE), metavar="LIST",
                        help=f"what runs beside: {','.join(BESIDE)}")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="two cells, two short pairs of each")
    args = parser.parse_args(argv)
    for given, known in (
        (args.policies, POLICIES), (args.scenarios, tuple(SCENARIOS)), (args.beside, BESIDE)
    ):  # fmt: skip
        if unknown := set(given) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    if "dp" not in args.policies or len(set(args.policies)) < 2:
        parser.error("--policies needs dp and at least another")
    if min(args.rates) <= 0 or min(args.tight) < 1:
        parser.error("rates must be above 0 requests per second, paces at least 1")
    if args.quick:
        args.scenarios, args.beside = args.scenarios[:1], args.beside[:1]
        args.tight, args.rates = [QUICK_TIGHT], list(QUICK_RATES)
        args.seconds, args.pairs = min(args.seconds, 8.0), min(args.pairs, 2)
    return args


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """Return the cells; those beside the busy process come last."""
    return [
        Cell(scenario=scenario, rate=rate, tight=tight, loose=LOOSE_FACTOR * tight,
             busy=beside == "busy")
        for beside in sorted(args.beside, key=BESIDE.index)
        for scenario in args.scenarios
        for tight in args.tight
        for rate in args.rates
    ]  # fmt: skip


def make_variants(args: argparse.Namespace, served_name: str) -> list[ServerCommand]:
    """Return a server for each policy, without drafts, whose lengths are another policy."""
    return [
        profiled_minserve(
            policy, "--model", args.model, "--served-model-name", served_name, "--policy", policy,
            "--speculator", "off", "--kv-cache-gib", str(KV_GIB),
        )
        for policy in dict.fromkeys(args.policies)
    ]  # fmt: skip


def main() -> None:
    args = parse_args()
    cells, name = cells_of(args), Path(args.model).name
    variants = make_variants(args, name)
    policies = [variant.label for variant in variants]
    store = open_store(args, "policies", {}, policies, name)
    done = measure(args, cells, variants, store, START_S * len(policies))
    result = summary(Pairs(store.results), cells, policies)
    print(table(result))
    finish(args, result, done, store)


if __name__ == "__main__":
    run_program(main)
