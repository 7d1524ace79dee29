"""`EventLoop`: a virtual clock. What happens next happens at once."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush


class EventLoop:
    """Calls what is due, in order of time; what is due at the same time, in the order it came.

    Attributes:
        now: seconds since the beginning.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def at(self, time: float, call: Callable[[], None]) -> None:
        """Call it then, or now where that has passed."""
        self._count += 1
        heappush(self._heap, (max(time, self.now), self._count, call))

    def run(self) -> None:
        """Until nothing is due any more."""
        heap = self._heap
        while heap:
            self.now, _, call = heappop(heap)
            call()
