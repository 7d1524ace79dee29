"""Measures how fast a model runs on this CPU: minserve, its peers, and the machine's limits.

Each engine runs in its own process. It is measured from cold start to the first token; in decode at
batch 1, 8 and 32 (128 tokens in, 128 out); in a prefill of 1024 tokens; and in a mixed step, an
iteration over 16 decodes and 64 tokens of a prompt. Prefix caches are off. Then one client measures
its server over HTTP: with 32 streams at once, to compare with the engine's batch of 32, and with
requests of 76 tokens in and 25 out that come at random.

minserve is measured first and last, each peer in between; figures are medians over all repeats.
vLLM reads the model exported in bfloat16 (float32 if the CPU does not multiply bfloat16 in
hardware), both with its defaults and with every core bound; ratios are to the better of the two in
each row. llama.cpp reads the GGUF file as it is. A ratio above 1 says that minserve is better.

The same run measures minserve's linears alone and the memory's rates: no forward pass takes less
time than its matmuls, or than reading weights and KV once. Each row gives the share of that limit
that it reaches.

    .venv/bin/python bench/offline.py                                    # minserve alone, 5 minutes
    .venv/bin/python bench/offline.py --peer vllm --peer llama.cpp       # beside both; 25 minutes
    .venv/bin/python bench/offline.py --quantization int8 --parts engine,limits
    .venv/bin/python bench/offline.py --peer vllm --vllm-python DIR/bin/python --plot docs/offline.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tqdm import tqdm

from minserve.exit_codes import EXIT_INTERRUPTED
from minserve.progress_bar import progress_bar
from minserve.workload.plots import check_can_plot
from parts.offline.contenders import (
    QUANTIZATIONS,
    Contender,
    llama_cpp_contender,
    minserve_contenders,
    vllm_contenders,
)
from parts.offline.limits import best, shares
from parts.offline.report import best_of, medians, plot, ratios, share_table, table
from parts.offline.servers import RandomLoad, measure_server
from shared.children import Event, run_child, say, script
from shared.machine import machine
from shared.peers import peer_dtype
from shared.program import positive, run_program
from shared.prompt_texts import Counter

PEERS = ("vllm", "llama.cpp")
PARTS = ("engine", "server", "limits")
USUAL_LOAD = RandomLoad()

Turns = dict[str, list[dict[str, Any]]]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto", help="minserve's dtype")
    parser.add_argument("--quantization", action="append", default=[], choices=QUANTIZATIONS,
                        help="quantized weights to measure too; may be given twice")  # fmt: skip
    parser.add_argument("--repeats", type=positive, default=2,
                        help="repeats of every measurement, per process")  # fmt: skip
    parser.add_argument("--peer", action="append", default=[], choices=PEERS,
                        help="measured beside minserve; may be given twice")  # fmt: skip
    parser.add_argument("--vllm-python", metavar="PATH",
                        help="interpreter of an environment with vLLM's CPU build; default: one "
                        "that is made on first use")  # fmt: skip
    parser.add_argument("--peer-dtype", choices=["bfloat16", "float32", "float16"],
                        help="vLLM's; default: bfloat16 where the CPU multiplies it in hardware, else float32")  # fmt: skip
    parser.add_argument("--parts", type=parts, default=list(PARTS), metavar="LIST",
                        help=f"parts to measure, of {','.join(PARTS)}; default: all")  # fmt: skip
    parser.add_argument("--rate", type=float, default=USUAL_LOAD.rate,
                        help="requests per second of the random load; default: %(default)g")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=USUAL_LOAD.seconds,
                        help="time of its arrivals in seconds; default: %(default)g")  # fmt: skip
    parser.add_argument("--json-only", action="store_true",
                        help="print nothing but the JSON on standard output")  # fmt: skip
    parser.add_argument("--plot", metavar="FILE.png", help="also save a picture (needs matplotlib)")
    args = parser.parse_args(argv)
    if args.rate <= 0 or args.seconds <= 0:
        parser.error("--rate and --seconds must be above 0")
    args.quantization, args.peer = unique(args.quantization), unique(args.peer)
    return args


def parts(text: str) -> list[str]:
    """Return the parts that a list names, each once.

    Raises:
        argparse.ArgumentTypeError: for unknown parts.
    """
    found = unique(text.split(","))
    if unknown := [one for one in found if one not in PARTS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is none of {', '.join(PARTS)}")
    return found


def unique(names: Sequence[str]) -> list[str]:
    """Return each name once, in order."""
    return list(dict.fromkeys(names))


def peers_of(args: argparse.Namespace) -> list[Contender]:
    """Return each peer in each of its variants."""
    found = []
    if "vllm" in args.peer:
        dtype = args.peer_dtype or peer_dtype()
        found += vllm_contenders(args.model, args.vllm_python, dtype, args.repeats)
    if "llama.cpp" in args.peer:
        found.append(llama_cpp_contender(args.model, args.repeats))
    return found


def _show(bar: tqdm, event: Event) -> None:
    bar.set_postfix_str(event["event"])


class OfflineBenchmark:
    """All turns of one run of this program.

    Attributes:
        turns: for each contender's label, the turns that `medians` takes.
        limits: for each minserve's label, the limits measured in each turn.
        versions: versions of the engines.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._load = RandomLoad(rate=args.rate, seconds=args.seconds)
        self._count = Counter(args.model)
        self.turns: Turns = {}
        self.limits: dict[str, list[dict[str, Any]]] = {}
        self.versions: dict[str, str] = {}

    def all(self, ours: Sequence[Contender], peers: Sequence[Contender]) -> None:
        """Measure minserve, then the peers, and then minserve again if there are peers."""
        order = [*ours, *peers, *(ours if peers else ())]
        with progress_bar(order, unit="engine", file=sys.stderr) as bar:
            for contender in bar:
                bar.set_description(contender.label)
                self._turn(contender, partial(_show, bar))
                if contender in ours and "limits" in self._args.parts:
                    self.limits.setdefault(contender.label, []).append(
                        self._measure_limits(contender)
                    )

    def _turn(self, contender: Contender, on_event: Callable[[Event], None]) -> None:
        turn: dict[str, Any] = {"rates": {}}
        if "engine" in self._args.parts:
            turn |= run_child(contender.label, contender.command, contender.env, on_event)
            events = turn.pop("events")
            turn["rates"] |= events["rates"]["rates"]
            self.versions[contender.label] = events["first token"]["version"]
        if "server" in self._args.parts and contender.server is not None:
            turn["rates"] |= measure_server(
                contender.server, self._load, self._args.repeats, self._count
            )
        self.turns.setdefault(contender.label, []).append(turn)
        tqdm.write(f"{contender.label}: {medians([turn])}", file=sys.stderr)

    def _measure_limits(self, contender: Contender) -> dict[str, Any]:
        flags = [] if contender.quantization is None else ["--quantization", contender.quantization]
        command = script(sys.executable, "parts/offline/limits.py", "--model", self._args.model,
                         "--dtype", self._args.dtype, *flags)  # fmt: skip
        found = run_child(f"limits of {contender.label}", command, {})
        return found["events"]["limits"]["limits"]


def summary(
    run: OfflineBenchmark, ours: Sequence[Contender], peers: Sequence[Contender]
) -> dict[str, Any]:
    """Return everything that was measured, as JSON values.

    ``ratios``: of each minserve to each peer, and to ``vLLM``, the better of its variants.
    """
    values = {label: medians(turns) for label, turns in run.turns.items()}
    beside = {one.label: values[one.label] for one in peers}
    if variants := [found for label, found in beside.items() if label.startswith("vLLM")]:
        beside = {"vLLM": best_of(variants), **beside}
    limits = {label: best(measured) for label, measured in run.limits.items()}
    return {
        "columns": values,
        "versions": run.versions,
        "weights": {one.label: one.weights for one in (*ours, *peers)},
        "skipped": {one.label: dict(one.skipped) for one in peers if one.skipped},
        "ratios": {
            one.label: {peer: ratios(values[one.label], theirs) for peer, theirs in beside.items()}
            for one in ours
        },
        "limits": {label: one.to_dict() for label, one in limits.items()},
        "shares": {label: shares(values[label], one) for label, one in limits.items()},
    }


def show(result: dict[str, Any], labels: Sequence[str]) -> None:
    """Print the tables."""
    print(table({label: result["columns"][label] for label in labels}))
    for label, words in result["weights"].items():
        print(f"{label}: {words}")
    for label, reasons in result["skipped"].items():
        for row, reason in reasons.items():
            print(f"{label} has no {row}: {reason}")
    for label, peers in result["ratios"].items():
        if peers:
            print(f"\nhow many times better {label} is than")
            print(table(peers, units=False))
    for label, found in result["shares"].items():
        limits = result["limits"][label]
        print(
            f"\n{label} beside what is possible: memory is copied at {limits['copy_gb_s']} and read at "
            f"{limits['read_gb_s']} GB/s"
        )
        print(share_table(limits, found))


def main() -> None:
    args = parse_args()
    if args.plot:
        check_can_plot(args.plot)
    ours = minserve_contenders(args.model, args.dtype, args.quantization, args.repeats)
    peers = peers_of(args)
    say(json.dumps(machine()))
    run = OfflineBenchmark(args)
    try:
        run.all(ours, peers)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    settings = {
        name: getattr(args, name) for name in ("model", "dtype", "repeats", "rate", "seconds")
    }
    result = {"machine": machine(), **settings, **summary(run, ours, peers)}
    labels = [one.label for one in (*ours, *peers)]
    if not args.json_only:
        show(result, labels)
    if args.plot:
        plot({label: result["columns"][label] for label in labels}, args.plot)
    print(json.dumps(result))


if __name__ == "__main__":
    run_program(main)
