"""Server-sent events: JSON in one ``data:`` line per event.

Besides there are comments, which every reader of events leaves out, while nothing else is there to
send.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import chain
from typing import Any

from aiohttp import web
from msgspec import Raw

from minserve.server.json_array import coalesced, dump_json, dump_pieces

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    # Reverse proxies that buffer would turn a stream of tokens into one late block.
    "X-Accel-Buffering": "no",
}
_END = b"\n\n"
# An event, or its JSON.
StreamEvent = dict[str, Any] | Raw


class EventStream:
    """A streamed response.

    The headers are sent with the first event or comment, so that a failure before it can still be
    answered with its HTTP status.
    """

    def __init__(self, request: web.Request, *, named: bool = False) -> None:
        """Begin with nothing sent.

        Args:
            named: each event has its ``type`` as its name, and no marker ends the stream.
        """
        self._request = request
        self._named = named
        self._has_events = False
        # Comments are written beside the events.
        self._writing = asyncio.Lock()
        self.response = web.StreamResponse(headers=_HEADERS)

    @property
    def started(self) -> bool:
        """True once the status line has been sent and can no longer be changed."""
        return self.response.prepared

    @asynccontextmanager
    async def kept_alive(self, every_s: float) -> AsyncIterator[None]:
        """Write a comment each time that so many seconds pass before the first event.

        Proxies and clients give up a connection on which nothing comes.

        Args:
            every_s: 0 writes none.
        """
        comments = asyncio.create_task(self._comment(every_s)) if every_s else None
        try:
            yield
        finally:
            if comments is not None:
                comments.cancel()

    async def send(self, *events: StreamEvent, in_pieces: bool = False) -> None:
        """Write events, all of them at once; waits while the client reads slowly.

        Args:
            in_pieces: an event may be of megabytes, so that others run while it is written.

        Raises:
            ConnectionResetError: if the client has closed the connection.
        """
        if not events:
            return
        self._has_events = True
        if not in_pieces:
            parts = [part for one in events for part in (self._before(one), dump_json(one), _END)]
            await self._write(b"".join(parts))
            return
        for event in events:
            for piece in coalesced(chain([self._before(event)], dump_pieces(event), [_END])):
                await self._write(piece)
                await asyncio.sleep(0)

    def _before(self, event: StreamEvent) -> bytes:
        """Return what stands before an event's JSON."""
        if not self._named or isinstance(event, Raw):
            return b"data: "
        return b"event: %s\ndata: " % event["type"].encode()

    async def done(self) -> None:
        """Write the marker of a complete stream, where it has one, and end the response."""
        if not self._named:
            self._has_events = True
            await self._write(b"data: [DONE]\n\n")
        await self.response.write_eof()

    async def fail(self, events: Sequence[StreamEvent]) -> None:
        """Write events that tell of an error, and end the response without the marker."""
        await self.send(*events)
        await self.response.write_eof()

    async def _comment(self, every_s: float) -> None:
        # A client that has left is noticed where its handler is cancelled.
        with suppress(ConnectionError):
            while True:
                await asyncio.sleep(every_s)
                if self._has_events:
                    return
                await self._write(b": waiting\n\n")

    async def _write(self, data: bytes) -> None:
        if self.response.prepared and not self._writing.locked():
            # A write hands its bytes over before it waits, so that none comes between them.
            await self.response.write(data)
            return
        async with self._writing:
            if not self.response.prepared:
                await self.response.prepare(self._request)
            await self.response.write(data)
