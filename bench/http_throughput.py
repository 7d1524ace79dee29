"""Measures how many tokens per second a server streams over HTTP, and the processor time of each.

The device is simulated: a decode of all streams takes 1.5 ms, as on a fast GPU with a small model, and the
rest is real. One server has engine and HTTP in one process, the other one in two; with `--against` there is
a third one, of another checkout, as it serves by itself. They take turns. Each turn has so many streams,
which a process of its own reads as raw bytes; only the time in which all streams run counts.

Microseconds of processor time per token say more than tokens per second where cores are few: the slower
one of two processes, or the sum of both parts in one process, bounds what a machine with a core for each
can stream. Ratios are medians over the turns. The last line is JSON.

    .venv/bin/python bench/http_throughput.py                        # two minutes
    .venv/bin/python bench/http_throughput.py --against ../other-checkout --turns 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from minserve.planner.predict.perf_model import PerfModel, Piece
from minserve.tables import text_table
from minserve.workload.server_process import ServerCommand, ServerProcess
from shared.checkouts import OWN, importable
from shared.http_streams.processes import ENGINE, HTTP
from shared.http_streams.turn import StreamLoad, StreamTurn, turn
from shared.machine import machine
from shared.profile_file import profile_file
from shared.program import positive, run_program

MODEL = "smollm2"  # whose tokenizer makes the text
SHARED, APART, OTHER = "shared", "own", "other"
# Of a batch's time, what each token adds.
TOKEN_S = 1e-6
PROMPT_TOKENS = 16


def command_of(name: str, folder: Path, profile: Path, args: argparse.Namespace) -> ServerCommand:
    """Return the command of a server, whose package is imported from a folder."""
    arrangement = () if name == OTHER else ("--engine-process", name)
    flags = [
        "--model", MODEL, "--executor", "simulated", "--profile", str(profile),
        "--max-num-seqs", str(args.streams), "--max-model-len", str(args.tokens + PROMPT_TOKENS),
        "--num-blocks", str(args.streams * (args.tokens + PROMPT_TOKENS) // 16 + args.streams),
        "--log-requests", "off", *arrangement,
    ]  # fmt: skip
    # PYTHONSAFEPATH: the current folder would come before the package's.
    env = {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "minserve", "serve", "--port", "0", *flags]
    return ServerCommand(name, command, env)


@contextmanager
def servers(args: argparse.Namespace) -> Iterator[dict[str, ServerProcess]]:
    """Start all servers, and yield them by name."""
    device_s = args.device_ms / 1e3
    piece = Piece(tokens=TOKEN_S, base=max(0.0, device_s - args.streams * TOKEN_S))
    with ExitStack() as stack:
        profile = stack.enter_context(profile_file(PerfModel((piece,), margin=1.02), "fast"))
        checkouts = {SHARED: OWN, APART: OWN}
        if args.against is not None:
            checkouts[OTHER] = args.against.resolve()
        found = {}
        for name, checkout in checkouts.items():
            folder = stack.enter_context(importable(checkout))
            command = command_of(name, folder, profile, args)
            found[name] = stack.enter_context(ServerProcess(command))
        yield found


def figures_of(found: StreamTurn) -> dict[str, float]:
    """Return tokens per second, events per read, and microseconds of processor time per token."""
    return {
        "tokens_per_s": found.tokens_per_s,
        "events_per_read": found.counts.events / found.counts.reads,
        **{f"{part}_us": us for part, us in found.cpu_us().items()},
    }


def bound(name: str, figures: dict[str, float]) -> float:
    """Return the tokens per second that the processor times allow, with a core for each process."""
    both = (figures[f"{HTTP}_us"], figures[f"{ENGINE}_us"])
    return 1e6 / (max(both) if name == APART else sum(both))


def summary(turns: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return the medians of each server, and the ratios of all to the one with two processes."""
    found: dict[str, Any] = {
        name: {key: round(statistics.median(one[key] for one in own), 2) for key in own[0]}
        for name, own in turns.items()
    }
    for name, own in turns.items():
        found[name]["bound_per_s"] = round(statistics.median(bound(name, one) for one in own))
    for name in turns:
        if name != APART:
            pairs = list(zip(turns[APART], turns[name], strict=True))
            found[f"{APART}/{name}"] = {
                "tokens_per_s": _ratio([a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs]),
                "bound_per_s": _ratio([bound(APART, a) / bound(name, b) for a, b in pairs]),
            }
    return found


def _ratio(values: Sequence[float]) -> float:
    return round(statistics.median(values), 3)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=positive, default=128)
    parser.add_argument("--tokens", type=positive, default=1000, help="of each stream")
    parser.add_argument("--device-ms", type=float, default=1.5, help="of a decode of all streams")
    parser.add_argument("--turns", type=positive, default=3)
    parser.add_argument("--against", type=Path, metavar="PATH", help="another checkout")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    turns: dict[str, list[dict[str, float]]] = {}
    with servers(args) as started:
        for number in range(-1, args.turns):
            for name, server in started.items():
                figures = figures_of(turn(server, MODEL, StreamLoad(args.streams, args.tokens)))
                if number >= 0:  # the first one warms up
                    turns.setdefault(name, []).append(figures)
                    print(f"{name}: {figures['tokens_per_s']:.0f} tokens/s", file=sys.stderr)
    found = summary(turns)
    keys = ["tokens_per_s", "bound_per_s", "http_us", "engine_us", "client_us", "events_per_read"]
    print(text_table(("", *keys), [(name, *(found[name][key] for key in keys)) for name in turns]))
    settings = {key: getattr(args, key) for key in ("streams", "tokens", "device_ms", "turns")}
    print(json.dumps({"machine": machine(), "settings": settings, **found}))


if __name__ == "__main__":
    run_program(main)
