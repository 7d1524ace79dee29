"""Compares kernels with the machine's ceilings and with torch; or compiles them without a GPU.

Every case is first compared with float32 arithmetic; a wrong kernel is never timed. Times
are medians of replays from a CUDA graph, over up to 64 sets of inputs in turn, to keep them
out of the cache. The last line is JSON.

    .venv/bin/python bench/kernel_bench.py --out rows.jsonl --plot shares.png     # on an NVIDIA GPU
    .venv/bin/python bench/kernel_bench.py --only decode --quick
    .venv/bin/python bench/kernel_bench.py --tune --quick      # other tiles for the attention kernels
    .venv/bin/python bench/kernel_bench.py --compile-only      # for sm_80 and sm_90, without a GPU
    .venv/bin/python bench/kernel_bench.py --dry               # all of it on a CPU, tiny, in the interpreter
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch

from parts.kernel_bench.report import failures, plot, summary, table
from parts.kernel_bench.rows import CUBLAS_KERNEL
from parts.kernel_bench.sweep import KERNELS, NotCapturedError, problems, sweep
from shared.interpreter import choose_interpreter
from shared.kernel_cases import KernelSetting, Make, Scale
from shared.kernel_timing import Ceilings, measure_ceilings
from shared.machine import gpu_machine

NO_LIMIT_S = 1e9
# For each flag, the flags that have no effect beside it.
NO_EFFECT = {
    "compile_only": ("dtype", "rep_ms", "seconds", "out", "plot", "dry"),
    "tune": ("out", "plot"),
    "dry": ("dtype", "quick", "rep_ms"),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer models and sizes")
    parser.add_argument("--only", action="append", choices=KERNELS, help="may be repeated")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--rep-ms", type=float, default=40.0, help="for each contestant")
    parser.add_argument(
        "--seconds", type=float, help="begin no case after so many", default=NO_LIMIT_S
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the rows, as JSON lines")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="needs matplotlib")
    parser.add_argument("--dry", action="store_true", help="tiny, on a CPU, in the interpreter")
    # What a process that goes on after a capture that failed is told.
    parser.add_argument("--begin", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--launch", action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, default=time.time(), help=argparse.SUPPRESS)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--tune", action="store_true", help="try other tiles for attention")
    mode.add_argument("--compile-only", action="store_true", help="compile for sm_80 and sm_90")
    args = parser.parse_args()
    for flag, without in NO_EFFECT.items():
        given = [name for name in without if getattr(args, name) != parser.get_default(name)]
        if getattr(args, flag) and given:
            words = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            parser.error(f"{words}: without effect beside --{flag.replace('_', '-')}")
    return args


def setting(args: argparse.Namespace) -> KernelSetting:
    """Return the device and dtype of the sweep."""
    if args.dry:
        return KernelSetting(torch.device("cpu"), torch.float32, cache_bytes=0)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return KernelSetting(torch.device("cuda"), getattr(torch, args.dtype), cache)


def earlier_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows that this call wrote before a capture failed, where it wrote them."""
    if args.out is None or not args.out.exists():
        return []
    rows = [json.loads(line) for line in args.out.read_text(encoding="utf-8").splitlines()]
    return rows[-args.begin :]


def go_on(args: argparse.Namespace, begin: int, name: str) -> NoReturn:
    """Begin this program anew at a case, with one contestant more that is not captured."""
    own = [word for word in sys.argv if not word.startswith(("--begin=", "--began="))]
    more = [f"--begin={begin}", f"--began={args.began}", f"--launch={name}"]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *own, *more])


def compiled_ahead(args: argparse.Namespace, scale: Scale) -> list[Make]:
    """Return the problems whose kernels are compiled before the sweep, on all cores.

    Where its time is limited these are the quick sweep's, which come first. A dry run has no use for
    compiled kernels: one shows that they can be compiled.
    """
    if scale is Scale.FULL and args.seconds < NO_LIMIT_S:
        scale = Scale.QUICK
    makes = [m for kernel, m in problems(args.only or KERNELS, scale) if kernel != CUBLAS_KERNEL]
    return makes[:1] if args.dry else makes


def run_sweep(args: argparse.Namespace, scale: Scale) -> int:
    """Measure the ceilings, run the sweep, and print the table and the goals."""
    machine_words, ceilings = gpu_machine(), None
    if not args.dry:
        ceilings = Ceilings(*(round(x, 1) for x in measure_ceilings(rep_ms=200.0)))
        print(
            f"{machine_words['device']}: copy {ceilings.copy_gb_s:.0f} GB/s, bfloat16 matmul "
            f"{ceilings.matmul_tflop_s:.0f} TFLOP/s",
            flush=True,
        )
    cases, place = problems(args.only or KERNELS, scale), setting(args)
    uncompiled: list[str] = []
    if not args.begin and not args.launch:
        from parts.kernel_bench.compile_only import precompile_here

        uncompiled = precompile_here(compiled_ahead(args, scale), place.dtype)
        print(f"{len(uncompiled)} problems not compiled ahead", *uncompiled, sep="\n  ", flush=True)
    rows: list[dict[str, Any]] = earlier_rows(args) if args.begin else []
    done = args.begin
    try:
        for row in sweep(cases[done:], place, ceilings, args.rep_ms, args.launch):
            done += 1
            if row:
                rows.append(row)
                if args.out is not None:
                    with args.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({**row, **machine_words}) + "\n")
            if time.time() - args.began > args.seconds:
                break
    except NotCapturedError as error:
        print(f"{error}; it is launched instead, in a new process", flush=True)
        go_on(args, done, error.name)
    finally:
        if args.dry:
            print("dry run: nothing below is a measurement")
        print(table(rows))
    if args.plot is not None:
        plot(rows, args.plot, machine_words["device"])
    for failure in failures(rows):
        print(f"FAILED {failure}")
    told = {**machine_words, **summary(rows, ceilings), "uncompiled": uncompiled, "dry": args.dry}
    print(json.dumps(told))
    return 1 if failures(rows) else 0


def main() -> int:
    args = parse()
    choose_interpreter(args.dry and not args.compile_only)
    if args.compile_only:
        from parts.kernel_bench.compile_only import run_compile

        return run_compile(args.only, quick=args.quick)
    if not args.dry and not torch.cuda.is_available():
        print("no CUDA device here; try --compile-only or --dry", file=sys.stderr)
        return 2
    scale = Scale.DRY if args.dry else Scale.QUICK if args.quick else Scale.FULL
    torch.manual_seed(0)
    if args.tune:
        from parts.kernel_bench.tune import run_tune

        return run_tune(setting(args), scale, args.only, args.rep_ms, args.seconds)
    return run_sweep(args, scale)


if __name__ == "__main__":
    sys.exit(main())
