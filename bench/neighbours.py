"""Measures how long a lone request takes beside other work on the same cores.

An engine in its own process decodes 40 tokens at batch 1: alone, beside a loop that keeps one core
busy, and beside another minserve that decodes all the time. Turns alternate, with a turn alone
before each one beside a neighbour; figures are medians of seconds. The last line is JSON:
``alone_s``, ``busy_loop_s``, ``other_minserve_s``, and ``worst_ratio``, the time beside the worse
neighbour over the time alone.

    .venv/bin/python bench/neighbours.py                          # as minserve comes; 2 minutes
    .venv/bin/python bench/neighbours.py --variants OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=2000

A variant is an environment for both engines, NAME=VALUE or several of these separated by commas;
each has its own figures under ``variants``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from tqdm import tqdm

from minserve.exit_codes import EXIT_INTERRUPTED
from minserve.progress_bar import progress_bar
from shared.children import child, events, script
from shared.cpu_time import busy_process
from shared.machine import machine
from shared.program import positive, run_program

TOKENS = 40
PROMPT = "Once upon a time"
# Seconds for a neighbour to begin or end its work.
SETTLE_S = 0.5
ALONE, BUSY_LOOP, OTHER = "alone_s", "busy_loop_s", "other_minserve_s"
# Tokens of the other engine's text, before it begins again.
OTHER_TOKENS = 1000

Seconds = dict[str, list[float]]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--turns", type=positive, default=5, help="turns beside each neighbour")
    parser.add_argument("--tokens", type=positive, default=TOKENS)
    parser.add_argument("--variants", type=environment, nargs="+", default=[], metavar="NAME=VALUE",
                        help="environments to try in addition to the present one")  # fmt: skip
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def environment(text: str) -> dict[str, str]:
    """Return variables from text like ``OMP_WAIT_POLICY=passive,GOMP_SPINCOUNT=2000``.

    Raises:
        argparse.ArgumentTypeError: for any other text.
    """
    found = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not (name and equals):
            raise argparse.ArgumentTypeError(f"must be like OMP_WAIT_POLICY=passive, not {part!r}")
        found[name] = value
    return found


def summary(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return medians in seconds, and the ratio of the slower neighbour's median to the lone one's.

    Args:
        seconds: of every turn, in lists ``alone_s``, ``busy_loop_s`` and ``other_minserve_s``.
    """
    out = {name: statistics.median(seconds[name]) for name in (ALONE, BUSY_LOOP, OTHER)}
    worst = max(out[BUSY_LOOP], out[OTHER]) / out[ALONE]
    return {name: round(value, 3) for name, value in out.items()} | {"worst_ratio": round(worst, 2)}


class EngineProcess:
    """An engine in another process, which runs one task for each line that it is sent.

    Args:
        kind: one of `CHILDREN`.
        env: variables in addition to this process's own.
    """

    def __init__(
        self, kind: str, args: argparse.Namespace, env: Mapping[str, str], stack: ExitStack
    ) -> None:
        command = script(sys.executable, "neighbours.py", "--child", kind, "--model", args.model,
                         "--tokens", str(args.tokens))  # fmt: skip
        self._process, self._last_words = stack.enter_context(child(command, env))
        self._events = events(self._process.stdout)
        self.hear()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, line: str) -> None:
        """Send the process its next task."""
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def hear(self) -> Mapping[str, Any]:
        """Return the next event of the process.

        Raises:
            SystemExit: if the process has ended instead.
        """
        event = next(self._events, None)
        if event is None:
            self._process.wait()
            raise SystemExit(f"an engine ended:\n{self._last_words()}")
        return event

    def seconds(self) -> float:
        """Return the seconds that its tokens take now."""
        self.send("go")
        return self.hear()["seconds"]


@contextmanager
def busy_engine(other: EngineProcess) -> Iterator[None]:
    """Let the other engine decode while the context lasts, which begins with its first token."""
    other.send("on")
    other.hear()
    try:
        yield
    finally:
        other.send("off")


def measure(args: argparse.Namespace, env: Mapping[str, str], bar: tqdm) -> Seconds:
    """Measure all turns in one environment."""
    found: Seconds = {ALONE: [], BUSY_LOOP: [], OTHER: []}
    with ExitStack() as stack:
        lone, other = (EngineProcess(kind, args, env, stack) for kind in CHILDREN)
        beside = {BUSY_LOOP: busy_process, OTHER: lambda: busy_engine(other)}
        for _ in range(args.turns):
            for name, neighbour in beside.items():
                time.sleep(SETTLE_S)
                found[ALONE].append(lone.seconds())
                with neighbour():
                    time.sleep(SETTLE_S)
                    found[name].append(lone.seconds())
                bar.set_postfix({name: f"{found[name][-1]:.2f}", ALONE: f"{found[ALONE][-1]:.2f}"})
                bar.update()
    return found


def child_timed(args: argparse.Namespace) -> None:
    """Decode once for every line of standard input, and print the seconds that it took."""
    from minserve import Engine, SamplingParams

    engine = Engine(args.model, prefix_caching=False)
    params = SamplingParams(temperature=0.0, max_tokens=args.tokens, ignore_eos=True)
    engine.generate(PROMPT, params)
    _tell("ready")
    for _ in sys.stdin:
        started = time.perf_counter()
        engine.generate(PROMPT, params)
        _tell("done", seconds=time.perf_counter() - started)


def child_busy(args: argparse.Namespace) -> None:
    """Decode all the time between the lines ``on`` and ``off``, until standard input ends."""
    from minserve import Engine, SamplingParams

    engine = Engine(args.model, prefix_caching=False)
    num_tokens = min(OTHER_TOKENS, engine.max_model_len // 2)
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    engine.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=2))
    wanted, asked = threading.Event(), threading.Event()
    threading.Thread(target=_obey, args=(wanted, asked), daemon=True).start()
    _tell("ready")
    while wanted.wait():
        for _ in engine.stream(PROMPT, params):
            if asked.is_set():
                asked.clear()
                _tell("busy")
            if not wanted.is_set():
                break


def _obey(wanted: threading.Event, asked: threading.Event) -> None:
    for line in sys.stdin:
        if line.strip() == "on":
            asked.set()
            wanted.set()
        else:
            wanted.clear()
    # The parent process has ended.
    os._exit(0)


def _tell(event: str, **more: Any) -> None:
    print(json.dumps({"event": event, **more}), flush=True)


CHILDREN = {"timed": child_timed, "busy": child_busy}


def main() -> None:
    args = parse_args()
    if args.child:
        CHILDREN[args.child](args)
        return
    found = []
    try:
        with progress_bar(total=2 * args.turns * (1 + len(args.variants)), unit="turn") as bar:
            for env in ({}, *args.variants):
                bar.set_description(_name(env) or "as it comes")
                found.append(summary(measure(args, env, bar)))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    print(json.dumps(machine()))
    result: dict[str, Any] = dict(found[0])
    if args.variants:
        result["variants"] = dict(zip(map(_name, args.variants), found[1:], strict=True))
    print(json.dumps(result))


def _name(env: Mapping[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in env.items())


if __name__ == "__main__":
    run_program(main)
