"""`DeltaQueue`: the news of one request, from its engine to the handler that reads them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from minserve.outputs import OutputDelta


class DeltaQueue:
    """The part of a request's handle that iterates. Belongs to one event loop, and has one reader.

    It does what a handle needs of `asyncio.Queue` in half the time, which counts: each token of each
    stream goes through it.

    Args:
        num_open: outputs of the request; iteration ends when all have ended.
    """

    def __init__(self, num_open: int) -> None:
        self._num_open = num_open
        self._deltas: deque[OutputDelta] = deque()
        self._arrival: asyncio.Future[None] | None = None

    def put(self, delta: OutputDelta) -> None:
        """Append a delta, and wake the reader if it waits."""
        self._deltas.append(delta)
        if self._arrival is not None:
            if not self._arrival.done():
                self._arrival.set_result(None)
            self._arrival = None

    async def __aiter__(self) -> AsyncIterator[OutputDelta]:
        while self._num_open:
            while not self._deltas:
                self._arrival = asyncio.get_running_loop().create_future()
                await self._arrival
            delta = self._deltas.popleft()
            self._num_open -= delta.finish_reason is not None
            yield delta

    def waiting(self, most: int) -> list[OutputDelta]:
        """Take the deltas that are there already, at most so many."""
        deltas = self._deltas
        found = [deltas.popleft() for _ in range(min(most, len(deltas)))]
        for delta in found:
            self._num_open -= delta.finish_reason is not None
        return found
