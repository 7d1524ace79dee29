"""Processes that measure something and print events, each a line of JSON; their memory too."""

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

HERE = Path(__file__).parent
# Of what a process said last, where it fails.
LAST_LINES = 30
MEMORY_POLL_S = 1.0

Event = Mapping[str, Any]


def script(python: str, name: str, *flags: str) -> list[str]:
    """The command of a script in this folder."""
    return [python, str(HERE / name), *flags]


def run_child(
    label: str,
    command: Sequence[str],
    env: Mapping[str, str],
    on_event: Callable[[Event], None] | None = None,
) -> dict[str, Any]:
    """Run a process to its end.

    Args:
        label: in messages.
        env: beside this process's own.
        on_event: called with each event when it comes.

    Returns:
        ``events``: the last of each name; ``cold_first_token_s``: when the event "first token"
        came, if it did; ``peak_memory_gib``: of it and its children.

    Raises:
        SystemExit: where it fails or tells nothing, with what it said last.
    """
    started = time.perf_counter()
    result: dict[str, Any] = {"events": {}}
    with child(command, env) as (process, errors):
        peak = [0.0]
        threading.Thread(target=_watch_memory, args=(process.pid, peak), daemon=True).start()
        for event in events(process.stdout):
            if event["event"] == "first token":
                result["cold_first_token_s"] = time.perf_counter() - started
            if on_event is not None:
                on_event(event)
            result["events"][event["event"]] = event
        if process.wait() or not result["events"]:
            raise SystemExit(f"{label} failed:\n" + "".join(errors))
    return result | {"peak_memory_gib": peak[0]}


@contextmanager
def child(
    command: Sequence[str], env: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen, Sequence[str]]]:
    """A process with pipes and the last lines of its stderr; ended with all its own processes
    when the context ends.
    """
    # A session of its own, so that Ctrl-C reaches it through this context alone.
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | env, start_new_session=True,
    )  # fmt: skip
    errors: deque[str] = deque(maxlen=LAST_LINES)
    reader = threading.Thread(target=lambda: errors.extend(process.stderr), daemon=True)
    reader.start()
    try:
        yield process, errors
    finally:
        for one in family(process.pid):
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
        reader.join(timeout=1.0)


def events(lines: Iterable[str]) -> Iterator[Event]:
    """The events among the lines that a process prints."""
    for line in lines:
        if line.startswith('{"event"'):
            yield json.loads(line)


def family(pid: int) -> list[psutil.Process]:
    """A process and all that come from it; none where it has ended."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _watch_memory(pid: int, peak: list[float]) -> None:
    """Highest resident memory of a process and its children, in GiB, until it ends."""
    while processes := family(pid):
        peak[0] = max(peak[0], sum(map(_memory, processes)) / 2**30)
        time.sleep(MEMORY_POLL_S)


def _memory(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def say(text: str) -> None:
    """Progress goes to stderr: standard output is for results."""
    print(text, file=sys.stderr, flush=True)
