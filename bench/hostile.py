"""Sends a server what hostile and broken clients send, and checks that nobody else notices.

It starts `minserve serve` with the embedded model in float32 and runs a few hundred cases against
it: wrong values in every field, structures and tools that cannot be held, bodies that are no
JSON or far too large, HTTP that is malformed or ambiguous, slow clients, crowds of connections, storms of aborts; and, on a second server with an
API key, every way around the key. A case has survived if

- its own answer is the right refusal in the JSON error form, or where it is no HTTP, a close;
- a neighbour, who streams greedy text all the time, gets the text of an undisturbed run;
- the next request of ten tokens is served;
- and, after every family of cases, no request and no KV block is left in /metrics.

Then it measures the neighbour's time between tokens, and /health, while megabytes of prompts are sent.

    .venv/bin/python bench/hostile.py                 # 3 minutes on two idle cores
    .venv/bin/python bench/hostile.py --replicas 2
    .venv/bin/python bench/hostile.py --only wire,keys
    .venv/bin/python bench/hostile.py --url http://127.0.0.1:8000     # a server with default limits

The last line is JSON; the exit code is 0 only if all cases have survived.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from minserve.progress_bar import progress_bar
from minserve.workload.server_process import ServerProcess, minserve_command
from parts.hostile.auth_cases import KEY
from parts.hostile.case import DETOKENIZE, HostileCase, Limits, Target
from parts.hostile.runner import CaseOutcome, run_cases
from parts.hostile.table import all_cases
from parts.hostile.tokenizing_load import measure
from parts.hostile.wire import Address
from shared.machine import machine
from shared.program import names, positive, run_program
from shared.servers import wait_until_up

MODEL = "smollm2"
TRACEBACK = "Traceback (most recent call last):\n"
MAX_BODY_MIB, MAX_QUEUE = 8, 1024
# What the neighbour's p99 and the longest /health may be under the tokenizing load.
GOALS = {"neighbour_p99_ratio": 1.3, "health_max_ms": 100.0}


async def find_target(url: str, **more: Any) -> Target:
    """Ask a server for its limits.

    Args:
        more: what else is known of it.
    """
    parts = urlsplit(url)
    address = Address(parts.hostname or "127.0.0.1", parts.port or 80)
    target = Target(address, Limits(0, 0, 0, 0), **more)
    (model,) = (await target.ask("GET", "/v1/models")).json()["data"]
    limits = Limits(
        max_model_len=model["max_model_len"],
        vocab_size=await _vocab_size(target),
        max_body=MAX_BODY_MIB * 2**20,
        max_queue=MAX_QUEUE,
    )
    return Target(address, limits, **more)


async def _vocab_size(target: Target) -> int:
    """Find the first token id that the server refuses, by bisection."""
    low, high = 0, 2**24
    while low < high:
        middle = (low + high) // 2
        taken = (await target.ask("POST", DETOKENIZE, {"tokens": [middle]})).status == 200
        low, high = (middle + 1, high) if taken else (low, middle)
    return low


@contextmanager
def served(args: argparse.Namespace, logged: list[str], key: str = "") -> Iterator[Target]:
    """Start a server, or take the one that is there.

    Args:
        logged: gets what the server has written, when the context ends.
    """
    if args.url is not None:
        yield asyncio.run(find_target(args.url, key=args.key, replicas=args.replicas))
        return
    flags = ["--model", args.model, "--dtype", "float32", "--replicas", str(args.replicas)]
    command = minserve_command(*flags, *(["--api-key", key] if key else []))
    print(f"starting a server{' with a key' if key else ''}", file=sys.stderr, flush=True)
    with ServerProcess(command) as server:
        if not key:
            wait_until_up(server.url, args.replicas)
        yield asyncio.run(find_target(server.url, pid=server.pid, key=key, replicas=args.replicas))
        logged.append(server.output())


def run(target: Target, cases: list[HostileCase]) -> list[CaseOutcome]:
    """Run the cases that fit a target, with a bar, and tell failures as they come."""
    fitting = [case for case in cases if case.fits(target)]
    with progress_bar(total=len(fitting), unit="case") as bar:

        def done(outcome: CaseOutcome) -> None:
            bar.set_description(outcome.case.family)
            bar.update()

        return asyncio.run(run_cases(target, fitting, done))


def judge_log(logged: list[str], file: Path | None) -> CaseOutcome:
    """Return the last case: that nothing in the servers' output is a traceback.

    What a client does is worth a line at most, or clients could fill a disk.

    Args:
        file: where to keep the output.
    """
    text = "\n".join(logged)
    if file is not None:
        file.write_text(text)
    found = text.count(TRACEBACK)
    outcome = CaseOutcome(HostileCase("log", "no traceback", _no_attack))
    if found:
        last = text.rpartition(TRACEBACK)[2].splitlines()
        ends = next((line for line in last if line and not line.startswith(" ")), "")
        outcome.answer = f"{found} tracebacks in {text.count(chr(10))} lines, the last of {ends}"
    return outcome


async def _no_attack(target: Target) -> None:
    """Do nothing: what the other cases did is looked at."""


def report(outcomes: list[CaseOutcome]) -> dict[str, Any]:
    """Print what is wrong, and return the counts."""
    bad = [outcome for outcome in outcomes if outcome.problems]
    for outcome in bad:
        case = outcome.case
        for problem in outcome.problems:
            print(f"FAILED {case.family} | {case.name} | {problem}")
    families = Counter(outcome.case.family for outcome in outcomes)
    failed = Counter(outcome.case.family for outcome in bad)
    return {
        "cases": len(outcomes),
        "survived": len(outcomes) - len(bad),
        "failed_in": dict(failed),
        "families": dict(families),
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--replicas", type=positive, default=1)
    parser.add_argument("--url", help="a server that runs already, with the default limits")
    parser.add_argument("--key", default="", help="the API key of the server at --url")
    parser.add_argument("--only", type=names, metavar="FAMILIES", help="names separated by commas")
    parser.add_argument("--no-load", action="store_true", help="leave the tokenizing load out")
    parser.add_argument("--load-seconds", type=float, default=5.0, help="of each of its turns")
    parser.add_argument("--log", type=Path, metavar="FILE", help="keep the servers' output")
    parser.add_argument("--results", type=Path, metavar="FILE.json")
    parser.add_argument("--list", action="store_true", help="print the cases, and run none")
    args = parser.parse_args()
    if args.only is not None:
        families = {case.family for case in all_cases()}
        if unknown := {*args.only} - families:
            parser.error(f"no such family: {', '.join(unknown)}; there are {', '.join(families)}")
    return args


def main() -> int:
    """Run all cases; returns 1 if one has not survived."""
    args = parse_args()
    cases = [case for case in all_cases() if args.only is None or case.family in args.only]
    if args.list:
        print(*(f"{case.family} | {case.name}" for case in cases), sep="\n")
        return 0
    outcomes: list[CaseOutcome] = []
    more: dict[str, Any] = {}
    logged: list[str] = []
    open_ones = [case for case in cases if case.needs != "key"]
    if open_ones or not args.no_load:
        with served(args, logged) as target:
            outcomes += run(target, open_ones)
            more |= target.figures
            if not args.no_load:
                print(
                    "measuring a neighbour beside megabytes of prompts", file=sys.stderr, flush=True
                )
                more |= asyncio.run(measure(target, args.load_seconds))
    keyed = [case for case in cases if case.needs == "key"]
    if keyed and args.url is None:
        with served(args, logged, KEY) as target:
            outcomes += run(target, keyed)
    if logged:
        outcomes.append(judge_log(logged, args.log))
    counts = report(outcomes)
    result = {**counts, **more, "replicas": args.replicas, "goals": GOALS}
    if args.results is not None:
        args.results.write_text(json.dumps({"machine": machine(), "result": result}) + "\n")
    print(json.dumps(machine()))
    print(json.dumps(result))
    return 1 if counts["survived"] < counts["cases"] else 0


if __name__ == "__main__":
    run_program(main)
