"""Processes that measure something and print events as lines of JSON; their memory is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from minserve.workload.server_process import family

BENCH = Path(__file__).resolve().parents[1]
# Lines of a failed process's stderr that are shown.
LAST_LINES = 30
# Seconds that reading them may take after the end of the process, also on a busy machine.
LAST_WORDS_S = 5.0
MEMORY_POLL_S = 1.0

Event = Mapping[str, Any]


def script(python: str, name: str, *flags: str) -> list[str]:
    """Return the command that runs a script, named by its path in `bench/`."""
    return [python, str(BENCH / name), *flags]


def run_child(
    label: str,
    command: Sequence[str],
    env: Mapping[str, str],
    on_event: Callable[[Event], None] | None = None,
) -> dict[str, Any]:
    """Run a process to its end and return its events.

    Args:
        label: the process's name in messages.
        env: variables in addition to this process's own.
        on_event: called with each event when it comes.

    Returns:
        ``events``: the last event of each name; ``cold_first_token_s``: seconds until the event
        "first token", if it came; ``peak_memory_gib``: of the process and its children.

    Raises:
        SystemExit: if it fails or prints no event; the message has the end of its stderr.
    """
    started = time.perf_counter()
    result: dict[str, Any] = {"events": {}}
    with child(command, env) as (process, last_words):
        peak = [0.0]
        threading.Thread(target=_watch_memory, args=(process.pid, peak), daemon=True).start()
        for event in events(process.stdout):
            if event["event"] == "first token":
                result["cold_first_token_s"] = time.perf_counter() - started
            if on_event is not None:
                on_event(event)
            result["events"][event["event"]] = event
        if process.wait() or not result["events"]:
            raise SystemExit(f"{label} failed:\n{last_words()}")
    return result | {"peak_memory_gib": peak[0]}


@contextmanager
def child(
    command: Sequence[str], env: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen, Callable[[], str]]]:
    """Start a process, and yield it with what returns the last lines of its stderr once it has ended.

    The process and all processes that it started are killed when the context ends.
    """
    # A session of its own, so that Ctrl-C reaches it only through this context.
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | env, start_new_session=True,
    )  # fmt: skip
    errors: deque[str] = deque(maxlen=LAST_LINES)
    reader = threading.Thread(target=lambda: errors.extend(process.stderr), daemon=True)
    reader.start()

    def last_words() -> str:
        # A process of its own may keep stderr open for longer.
        reader.join(timeout=LAST_WORDS_S)
        return "".join(errors)

    try:
        yield process, last_words
    finally:
        for one in family(process.pid):
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
        reader.join(timeout=LAST_WORDS_S)


def events(lines: Iterable[str]) -> Iterator[Event]:
    """Yield the events among the lines that a process prints."""
    for line in lines:
        if line.startswith('{"event"'):
            yield json.loads(line)


def _watch_memory(pid: int, peak: list[float]) -> None:
    """Keep the highest resident memory of a process and its children, in GiB, until it ends."""
    while processes := family(pid):
        peak[0] = max(peak[0], sum(map(_memory, processes)) / 2**30)
        time.sleep(MEMORY_POLL_S)


def _memory(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def say(text: str) -> None:
    """Print progress on stderr: standard output is for results."""
    print(text, file=sys.stderr, flush=True)
