"""What samples of a long run say: whether anything leaks, memory grows, or answers get slower."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

# The share of a run that counts as warm-up: allocators and caches fill.
WARM_UP = 0.25
# What is counted at quiet points, and has to come back to what it was.
COUNTED = ("fds", "sockets", "threads", "tasks")


@dataclass(frozen=True, slots=True)
class Sample:
    """What the server's processes hold at one moment.

    Attributes:
        at_s: seconds since the start of the run.
        rss_mib: resident memory of all its processes, in MiB.
        fds, sockets, threads: of all its processes.
        tasks: asyncio tasks of the server.
        busy: gauges of requests and blocks that are not 0.
        probe_s: seconds of the probe's requests; empty except at quiet points.
    """

    at_s: float
    rss_mib: float
    fds: int
    sockets: int
    threads: int
    tasks: int
    busy: Mapping[str, float]
    probe_s: Sequence[float] = ()


def after_warm_up(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples after the warm-up, which takes its share of the time of all samples."""
    if not samples:
        return []
    first, last = samples[0].at_s, samples[-1].at_s
    return [one for one in samples if one.at_s >= first + WARM_UP * (last - first)]


def thirds(values: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """Return the first and the last third of some values, at least one value each."""
    size = max(1, len(values) // 3)
    return values[:size], values[-size:]


def grew(values: Sequence[float]) -> bool:
    """Return whether every value of the last third is above every value of the first.

    A leak never comes back; what only goes up and down does.
    """
    if len(values) < 2:
        return False
    first, last = thirds(values)
    return min(last) > max(first)


def growth_pct(times: Sequence[float], values: Sequence[float]) -> float:
    """Return how much values have grown over the time, in percent of the first third's median.

    The growth is that of the line of Theil and Sen: the median slope of all pairs of points, which
    single peaks do not bend.
    """
    slopes = [
        (b - a) / (late - early)
        for (early, a), (late, b) in combinations(zip(times, values, strict=True), 2)
        if late > early
    ]
    if not slopes:
        return 0.0
    grown = statistics.median(slopes) * (times[-1] - times[0])
    return 100.0 * grown / statistics.median(thirds(values)[0])


def drift(quiet: Sequence[Sample]) -> float | None:
    """Return the probe's median in the last third of the quiet points over that in the first."""
    medians = [statistics.median(one.probe_s) for one in quiet if one.probe_s]
    if len(medians) < 2:
        return None
    first, last = thirds(medians)
    return statistics.median(last) / statistics.median(first)


def summary(samples: Sequence[Sample], quiet: Sequence[Sample]) -> dict[str, Any]:
    """Return a run's figures.

    Args:
        samples: of all the run.
        quiet: those taken while nothing was asked, when nothing may be left.

    Returns:
        ``leaks``, the number of kinds of things that leaked (``leaked`` names them), the growth of
        memory, and the drift of the probe's latency.
    """
    late_quiet, late = after_warm_up(quiet), after_warm_up(samples)
    leaked = [name for name in COUNTED if grew([getattr(one, name) for one in late_quiet])]
    leaked += sorted({name for one in quiet for name in one.busy})
    change = drift(late_quiet)
    memory = [one.rss_mib for one in late]
    return {
        "leaks": len(leaked),
        "leaked": leaked,
        "rss_growth_pct": round(growth_pct([one.at_s for one in late], memory), 2)
        if late
        else None,
        "rss_mib": [round(statistics.median(part)) for part in thirds(memory)] if late else None,
        "latency_drift": None if change is None else round(change, 3),
        "quiet_points": len(quiet),
        "last": {name: getattr(quiet[-1], name) for name in COUNTED} if quiet else None,
    }
