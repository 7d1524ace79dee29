"""Prefill as a fluid: work flows at a rate that changes from one segment of time to the next.

This is the one place that turns prefill work into time: `run` for a step of an exact walk,
`FluidClock` for many times at once. A segment in which nothing can be prefilled has the rate
`NO_RATE`: work does not get done in it, and no division by 0 takes place.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Tokens per second.
NO_RATE = 1e-9


def run(
    work: float,
    now: float,
    segment: int,
    rates: SequenceOf[float],
    starts: SequenceOf[float],
    stop: float,
) -> tuple[float, int, float]:
    """Prefill until the work is done, or until ``stop``.

    Args:
        work: tokens to prefill; 0 is done at once.
        now: seconds.
        segment: index of the segment that ``now`` lies in.
        rates: tokens per second in each segment, at least `NO_RATE`.
        starts: seconds at which each segment starts, and inf behind the last one.
        stop: seconds at which the walk ends, even if work is left.

    Returns:
        the time, the segment that it lies in, and the work that is left: 0 if all is done, more
        than 0 at ``stop``.
    """
    while True:
        rate, until = rates[segment], starts[segment + 1]
        end = now + work / rate
        if end <= until and end <= stop:
            return end, segment, 0.0
        if stop <= until:
            return stop, segment, work - rate * (stop - now)
        work -= rate * (until - now)
        now = until
        segment += 1


class FluidClock:
    """Time as the number of tokens that could be prefilled by then.

    Args:
        starts: ``[J]`` float64, seconds at which segments start; the last one never ends.
        rates: ``[J]`` float64, tokens per second, at least `NO_RATE`.
    """

    # Seconds after the last start that are told apart.
    FAR_S = 1e8

    def __init__(self, starts: Floats, rates: Floats) -> None:
        self._times = np.concatenate((starts, starts[-1:] + self.FAR_S))
        self._tokens = np.zeros(len(self._times))
        np.cumsum(rates * np.diff(self._times), out=self._tokens[1:])

    def tokens(self, times: Floats) -> Floats:
        """Return the tokens by each time; -inf before the first start."""
        return np.interp(times, self._times, self._tokens, left=-np.inf)

    def times(self, tokens: Floats) -> Floats:
        """Return the time of each number of tokens; -inf for fewer than 0."""
        return np.interp(tokens, self._tokens, self._times, left=-np.inf, right=np.inf)
