"""Measures how many seconds of one core a simulated hour takes, and compares two checkouts.

The hour is the trace azure2023_conv, 19,366 requests, as `minserve simulate` runs it. Each run is a
process of its own, and its seconds are those that the process had a core, start and reading of the
trace included: another program on the machine slows them much less than the wall clock's. With
`--against` the two checkouts take turns, and the ratio is the median over the pairs: own seconds
over the other's. Whether both simulate the same is compared too. The last line is JSON.

    .venv/bin/python bench/simulator_speed.py
    .venv/bin/python bench/simulator_speed.py --against ../other-checkout --pairs 5
    .venv/bin/python bench/simulator_speed.py --against ../other-checkout -- --speculation 4 \\
        --profile opt-6.7b-a100 --drop-longer

Flags behind `--` go to `minserve simulate`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from minserve.cpu_name import cpu_name
from shared.checkouts import OWN, importable

TRACE = ("--trace", "azure2023_conv")
PROFILE = ("--profile", "qwen2.5-7b-a100")


def measure(folder: Path, flags: list[str]) -> tuple[float, dict[str, Any]]:
    """Return the seconds that a simulation had a core, and what it reports."""
    env = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "minserve", "simulate", "--json", *flags]
    with subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        assert child.stdout is not None
        text = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed with the package in {folder}")
    return usage.ru_utime + usage.ru_stime, json.loads(text.splitlines()[-1])


def compare(against: Path, pairs: int, flags: list[str]) -> dict[str, Any]:
    """Let two checkouts take turns, and return their seconds and the ratio."""
    seconds: dict[str, list[float]] = {"own": [], "other": []}
    same = True
    with importable(OWN) as own, importable(against) as other:
        for number in range(pairs):
            order = [("own", own), ("other", other)]
            results = {}
            # Neither always runs first.
            for name, folder in order if number % 2 else reversed(order):
                took_s, results[name] = measure(folder, flags)
                seconds[name].append(round(took_s, 2))
            same = same and results["own"] == results["other"]
            own_s, other_s = seconds["own"][-1], seconds["other"][-1]
            print(f"pair {number + 1}: {own_s:.2f} s, the other {other_s:.2f} s", flush=True)
    ratios = [a / b for a, b in zip(seconds["own"], seconds["other"], strict=True)]
    return {
        **{f"{name}_s": values for name, values in seconds.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "same_results": same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, metavar="PATH", help="another checkout")
    parser.add_argument("--pairs", type=int, default=3, metavar="N", help="runs of each")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="for minserve simulate")
    args = parser.parse_args()
    flags = [*TRACE, *(() if "--profile" in args.flags else PROFILE), *args.flags]
    if args.against is not None:
        found = compare(args.against.resolve(), args.pairs, flags)
    else:
        with importable(OWN) as own:
            found = {"own_s": [round(measure(own, flags)[0], 2) for _ in range(args.pairs)]}
        print(f"{statistics.median(found['own_s']):.2f} s of one core")
    print(json.dumps({"cpu": cpu_name(), "flags": flags, **found}))


if __name__ == "__main__":
    main()
