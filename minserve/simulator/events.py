"""`EventLoop`: a virtual clock. Time jumps from one event to the next."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush


class EventLoop:
    """Makes calls in order of their time; calls of the same time in the order they were added.

    Attributes:
        now: seconds since the beginning.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def clock(self) -> float:
        """Return the time, for those who ask for it by a call."""
        return self.now

    def at(self, time: float, call: Callable[[], None]) -> None:
        """Make the call at this time, or now if the time has passed."""
        self._count += 1
        heappush(self._heap, (max(time, self.now), self._count, call))

    def run(self) -> None:
        """Make calls until no more are due."""
        heap = self._heap
        while heap:
            self.now, _, call = heappop(heap)
            call()
