"""Server-sent events: JSON in one ``data:`` line per event, and nothing else on the wire."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

_HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache",
    # Reverse proxies that buffer would turn a stream of tokens into one late block.
    "X-Accel-Buffering": "no",
}
_encoder = msgspec.json.Encoder()


def dump_json(value: Any) -> bytes:
    """Return a value as compact JSON in UTF-8; NaN and infinity, which JSON lacks, as ``null``.

    Raises:
        UnicodeEncodeError: for a string with half of a surrogate pair.
    """
    return _encoder.encode(value)


class EventStream:
    """A streamed response.

    The headers are sent with the first event, so that a failure before it can still be answered
    with its HTTP status.
    """

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self.response = web.StreamResponse(headers=_HEADERS)

    @property
    def started(self) -> bool:
        """True once the status line has been sent and can no longer be changed."""
        return self.response.prepared

    async def send(self, event: Any) -> None:
        """Write one event; waits while the client reads slowly.

        Raises:
            ConnectionResetError: if the client has closed the connection.
        """
        await self._write(dump_json(event))

    async def done(self) -> None:
        """Write the marker of a complete stream and end the response."""
        await self._write(b"[DONE]")
        await self.response.write_eof()

    async def fail(self, event: Any) -> None:
        """Write an error event and end the response without the marker."""
        await self._write(dump_json(event))
        await self.response.write_eof()

    async def _write(self, payload: bytes) -> None:
        if not self.response.prepared:
            await self.response.prepare(self._request)
        await self.response.write(b"data: " + payload + b"\n\n")
