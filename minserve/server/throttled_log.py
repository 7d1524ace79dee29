"""Log lines that anyone who can connect may cause: a few a minute, then their number."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

MOST_LINES = 20
WINDOW_S = 60.0


class ThrottledLog:
    """Writes warnings, at most so many in a window of time, and then how many were left out.

    It belongs to one event loop, in which the number is written when the window ends.

    Args:
        most: lines in one window.
        window_s: its length in seconds.
        clock: the monotonic clock.
    """

    def __init__(
        self,
        logger: logging.Logger,
        *,
        most: int = MOST_LINES,
        window_s: float = WINDOW_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._most = most
        self._window_s = window_s
        self._clock = clock
        self._ends = float("-inf")
        self._num = 0

    def warning(self, message: str, *args: object) -> None:
        """Write one line, or count it where the window has had its lines."""
        now = self._clock()
        if now >= self._ends:
            self.tell()
            self._ends, self._num = now + self._window_s, 0
        self._num += 1
        if self._num <= self._most:
            self._logger.warning(message, *args)
        elif self._num == self._most + 1:
            asyncio.get_running_loop().call_later(self._ends - now, self.tell)

    def tell(self) -> None:
        """Write how many lines the present window has left out, if any."""
        left_out = self._num - self._most
        if left_out > 0:
            self._logger.warning("%d more lines like these were left out", left_out)
            self._num = self._most
