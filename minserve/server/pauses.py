"""`Pauses`: lets others run while an answer with much in it is written."""

from __future__ import annotations

import asyncio

# About half a millisecond of writing log probabilities, or two where each token is a new one.
UNITS_BETWEEN = 300
# What a delta costs besides its log probabilities.
UNITS_PER_DELTA = 20


class Pauses:
    """Counts work on the event loop, and gives way to others every now and then.

    A unit is one log probability of one token that is written. What is there already can be taken
    from a queue without ever giving way, so that a task has to do it by itself.
    """

    def __init__(self) -> None:
        self._units = 0

    async def after(self, units: int) -> None:
        """Count work that was done; run what others have to do, where it is time."""
        self._units += units
        if self._units >= UNITS_BETWEEN:
            self._units = 0
            await asyncio.sleep(0)
