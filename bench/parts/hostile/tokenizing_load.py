"""A neighbour's time between tokens, and /health, while others send megabytes to be read.

Quiet turns and turns under load alternate, so that a machine that becomes slower or faster
changes both alike.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import statistics
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from parts.hostile.case import CHAT, COMPLETIONS, DETOKENIZE, TOKENIZE, Target
from parts.hostile.neighbour import Neighbour
from parts.hostile.wire import ANSWER_S

TURNS = 3
HEALTH_EVERY_S = 0.05
WORDS = "All work and no play makes Jack a dull boy. "


def loads() -> list[tuple[str, bytes]]:
    """Return paths and bodies that take long to read, be they refused or answered."""
    text = WORDS * (400_000 // len(WORDS))
    bodies: list[tuple[str, Any]] = [
        # Five megabytes of prompts, each far too long.
        (COMPLETIONS, {"prompt": [text] * 12}),
        (CHAT, {"messages": [{"role": "user", "content": text + text[:250_000]}]}),
        # As long as a prompt's bytes may be, if each token has several.
        (COMPLETIONS, {"prompt": WORDS * 900, "max_tokens": 1}),
        (TOKENIZE, {"prompt": text * 5}),
        (COMPLETIONS, {"prompt": [5] * 2_000_000}),
        (DETOKENIZE, {"tokens": [5] * 500_000}),
        (CHAT, {"messages": [{"role": "user", "content": "And then?"}] * 50_000}),
        (COMPLETIONS, {"prompt": "a", "metadata": {str(i): "x" for i in range(200_000)}}),
    ]  # fmt: skip
    return [(path, json.dumps(body).encode()) for path, body in bodies]


async def measure(target: Target, seconds: float = 5.0, at_once: int = 4) -> dict[str, Any]:
    """Measure turns without and with the load.

    Args:
        seconds: of each turn.
        at_once: requests of the load that run at once.

    Returns:
        the neighbour's p99 between tokens and the longest time of /health, each without and with
        the load, in milliseconds, the ratio of the p99s, and what came of the load.
    """
    quiet, loaded = Neighbour(target), Neighbour(target)
    await quiet.learn()
    await loaded.learn()
    bodies, statuses = loads(), list[int]()
    health: dict[str, list[float]] = {"quiet": [], "loaded": []}
    for _ in range(TURNS):
        async with quiet.running():
            health["quiet"] += await _health_times(target, seconds)
        ended = threading.Event()
        senders = [
            asyncio.create_task(asyncio.to_thread(_send, target, bodies[i:] + bodies[:i], ended, statuses))
            for i in range(at_once)
        ]  # fmt: skip
        async with loaded.running():
            health["loaded"] += await _health_times(target, seconds)
        ended.set()
        await asyncio.gather(*senders)
    problems = [one.problem for one in quiet.streams + loaded.streams if one.problem]
    before, after = p99_ms(quiet.gaps), p99_ms(loaded.gaps)
    return {
        "neighbour_p99_ms": {"quiet": before, "loaded": after},
        "neighbour_p99_ratio": round(after / before, 2),
        "neighbour_median_ms": {
            "quiet": round(1e3 * statistics.median(quiet.gaps), 1),
            "loaded": round(1e3 * statistics.median(loaded.gaps), 1),
        },
        "health_max_ms": {name: round(1e3 * max(times), 1) for name, times in health.items()},
        "load_answers": {str(code): statuses.count(code) for code in sorted({*statuses})},
        "problems": problems,
    }


def p99_ms(seconds: Sequence[float]) -> float:
    """Return the 99th percentile in milliseconds."""
    return round(1e3 * float(np.percentile(seconds, 99)), 1)


async def _health_times(target: Target, seconds: float) -> list[float]:
    """Ask /health again and again for a time, and return how long each answer took, in seconds."""
    times, end = [], time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        await target.ask("GET", "/health")
        times.append(time.perf_counter() - began)
        await asyncio.sleep(HEALTH_EVERY_S)
    return times


def _send(
    target: Target,
    bodies: Sequence[tuple[str, bytes]],
    ended: threading.Event,
    statuses: list[int],
) -> None:
    """Send the bodies again and again, in a thread: its sending must not delay what is measured."""
    headers = {"Content-Type": "application/json"}
    if target.key:
        headers["Authorization"] = f"Bearer {target.key}"
    while not ended.is_set():
        for path, body in bodies:
            if ended.is_set():
                return
            connection = http.client.HTTPConnection(
                target.address.host, target.address.port, timeout=ANSWER_S
            )
            with suppress(OSError, http.client.HTTPException):
                connection.request("POST", path, body, headers)
                response = connection.getresponse()
                response.read()
                statuses.append(response.status)
            connection.close()
