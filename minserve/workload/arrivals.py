"""Arrival processes: Gamma distributed gaps (shape 1: Poisson), or recorded times rescaled.

Both give exactly the wanted number of arrivals in the wanted time. The number of arrivals in a
short window would scatter widely, so that runs at the same rate would differ in load.
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
    """Check that gaps of this shape can be drawn.

    Raises:
        WorkloadError: if it is out of range.
    """
    if not LEAST_BURSTINESS <= burstiness <= MOST_BURSTINESS:
        raise WorkloadError(
            f"burstiness must be from {LEAST_BURSTINESS:g} to {MOST_BURSTINESS:g} "
            f"(1 is Poisson, below is burstier), not {burstiness}"
        )


def gamma_arrivals(
    count: int, seconds: float, rng: random.Random, *, burstiness: float = 1.0
) -> list[float]:
    """Return arrivals with independent Gamma distributed gaps, stretched to fill a time.

    Args:
        burstiness: shape of the distribution, as in ``vllm bench serve --burstiness``. The
            gaps' coefficient of variation is its inverse square root. 1 is Poisson.

    Returns:
        ascending times in seconds, in [0, seconds).
    """
    # One more gap, after the last arrival: without it the last arrival would always be at the end.
    gaps = [rng.gammavariate(burstiness, 1.0) for _ in range(count + 1)]
    return _stretched(gaps, seconds)[1:]


def recorded_arrivals(
    times: Sequence[float], period_s: float, first: int, count: int, seconds: float
) -> list[float]:
    """Return a part of a recording, all its gaps multiplied alike so that it fills a time.

    The recording is a ring: its first arrival follows its last, so that a part may start
    anywhere and be longer than the whole recording.

    Args:
        times: ascending, in seconds, all within `period_s` from the first.
        period_s: length of the recording in seconds, with the gap between its last arrival and
            the next round's first.
        first: index of the arrival to start with; arrival i of the result is row
            ``(first + i) % len(times)``.

    Returns:
        ascending times in seconds, in [0, seconds); the first is 0.
    """
    after = [*times[1:], times[0] + period_s]
    ring = [max(0.0, later - now) for now, later in zip(times, after, strict=True)]
    return _stretched([ring[(first + i) % len(ring)] for i in range(count)], seconds)


def _stretched(gaps: Sequence[float], seconds: float) -> list[float]:
    """Return arrival times from the gaps after each of them; the gaps together take `seconds`."""
    whole = math.fsum(gaps)
    # If all gaps are 0 (one burst), they stay 0.
    scale = seconds / whole if whole else 0.0
    # A last gap of 0, or rounding, would put the last arrival on the end.
    last = math.nextafter(seconds, 0.0)
    return [min(last, scale * passed) for passed in accumulate([0.0, *gaps[:-1]])]
