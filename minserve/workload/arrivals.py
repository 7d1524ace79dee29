"""Arrival processes: Gamma distributed gaps (1: Poisson), or recorded times to another scale.

Both give a wanted number of arrivals in a wanted time, exactly: the number that falls into a
short window scatters widely, and would make runs at one rate differ in load.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import accumulate

from minserve.errors import WorkloadError

MOST_BURSTINESS = 1e6
LEAST_BURSTINESS = 1e-3


def check_burstiness(burstiness: float) -> None:
    """
    Raises:
        WorkloadError: outside what can be drawn.
    """
    if not LEAST_BURSTINESS <= burstiness <= MOST_BURSTINESS:
        raise WorkloadError(
            f"burstiness must be from {LEAST_BURSTINESS:g} to {MOST_BURSTINESS:g} "
            f"(1 is Poisson, below is burstier), not {burstiness}"
        )


def gamma_arrivals(
    count: int, seconds: float, rng: random.Random, *, burstiness: float = 1.0
) -> list[float]:
    """Independent Gamma distributed gaps, stretched together to fill a time.

    Args:
        burstiness: shape of the distribution, as in ``vllm bench serve --burstiness``: the
            gaps' coefficient of variation is its inverse square root. 1 is Poisson.

    Returns:
        ascending times in [0, seconds).
    """
    # One more gap, after the last arrival: else it would always come at the very end.
    gaps = [rng.gammavariate(burstiness, 1.0) for _ in range(count + 1)]
    return _stretched(gaps, seconds)[1:]


def recorded_arrivals(
    times: Sequence[float], period_s: float, first: int, count: int, seconds: float
) -> list[float]:
    """A stretch of a recording, all its gaps multiplied alike so that it fills a time.

    The recording is a ring: after its last arrival comes its first again, so that a stretch
    may start anywhere and be longer than the whole.

    Args:
        times: ascending, all within `period_s` from the first.
        period_s: length of the recording, with the gap between its last arrival and its
            first again.
        first: index of the arrival to start with; arrival i of the result is that of row
            ``(first + i) % len(times)``.

    Returns:
        ascending times in [0, seconds); the first is 0.
    """
    after = [*times[1:], times[0] + period_s]
    ring = [max(0.0, later - now) for now, later in zip(times, after, strict=True)]
    return _stretched([ring[(first + i) % len(ring)] for i in range(count)], seconds)


def _stretched(gaps: Sequence[float], seconds: float) -> list[float]:
    """Times of arrivals, each before its gap; all gaps together take `seconds`."""
    whole = math.fsum(gaps)
    # Gaps that are all nothing (one burst) stay so.
    scale = seconds / whole if whole else 0.0
    # A last gap of nothing, or rounding, would put the last arrival on the end.
    last = math.nextafter(seconds, 0.0)
    return [min(last, scale * passed) for passed in accumulate([0.0, *gaps[:-1]])]
