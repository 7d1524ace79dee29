"""Turn the outputs of the engine's handles into an HTTP answer, whole or streamed.

No function here aborts a handle. The function that submitted the handles aborts them in a
``finally``, so that the KV of a client that leaves is freed wherever the answer stands.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from itertools import chain
from typing import Any, Protocol

from aiohttp import web

from minserve.errors import EngineStoppedError, GenerationError
from minserve.outputs import OutputDelta
from minserve.request import FinishReason
from minserve.server.engine_face import Handle
from minserve.server.errors import HttpError, to_http_error
from minserve.server.pauses import Pauses
from minserve.server.protocol import GenerationCall
from minserve.server.request_record import note_error
from minserve.server.sse import EventStream, StreamEvent

# Bytes of a whole answer from which on it is sent in pieces.
LARGE_BODY = 2**20
# Deltas of one handle that are taken at a time, where so many wait.
MOST_DELTAS = 64
UNLIMITED: AbstractAsyncContextManager[None] = nullcontext()


class ReplyFace(Protocol):
    """Builds the answer to one request, in the form of its endpoint.

    For each delta it gets `note`, and then `chunks` for a stream or `add` for a whole answer.

    Attributes:
        names_events: events of a stream have names, and no marker ends it.
        has_large_events: events may be of megabytes.
    """

    names_events: bool
    has_large_events: bool

    async def note(self, prompt: int, delta: OutputDelta, pauses: Pauses) -> None:
        """Count a delta of the given prompt, and write what it tells of the prompt."""

    def chunks(self, prompt: int, delta: OutputDelta) -> Sequence[StreamEvent]:
        """Return the events of a stream that can be sent after a delta of the given prompt."""

    def last_chunks(self) -> list[dict[str, Any]]:
        """Return the events at the end of a stream, when all outputs have ended."""

    def failure(self, error: HttpError) -> list[dict[str, Any]]:
        """Return the events that end a stream which has failed."""

    def is_done(self, prompt: int, delta: OutputDelta) -> bool:
        """True where all was told of an output before it ended, so that its end tells nothing."""

    def add(self, prompt: int, delta: OutputDelta) -> None:
        """Write a delta of the given prompt for `body`."""

    def body(self) -> Iterator[bytes]:
        """Yield the whole answer's JSON in pieces."""


async def whole_response(
    request: web.Request,
    reply: ReplyFace,
    handles: Sequence[Handle],
    limit: AbstractAsyncContextManager[None] = UNLIMITED,
) -> web.StreamResponse:
    """Wait for every output and return one response with all of them.

    Args:
        limit: ends the outputs when their time is over; see `minserve.server.limits.time_limit`.

    Raises:
        MinserveError: if one of the outputs failed.
        ConnectionResetError: if the client has closed the connection.
    """
    pauses = Pauses()
    async with limit, aclosing(merged(handles)) as stream:
        async for prompt, deltas in stream:
            for delta in deltas:
                await reply.note(prompt, delta, pauses)
                if not reply.is_done(prompt, delta) and (failure := _failure(delta)) is not None:
                    raise failure
                reply.add(prompt, delta)
    pieces, size = [], 0
    body = reply.body()
    for piece in body:
        pieces.append(piece)
        size += len(piece)
        if size > LARGE_BODY:
            return await _send_pieces(request, chain(pieces, body))
    return web.Response(body=b"".join(pieces), content_type="application/json")


async def _send_pieces(request: web.Request, pieces: Iterable[bytes]) -> web.StreamResponse:
    """Send a body piece by piece, at the pace of its reader, so that no copy of it is made."""
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    for piece in pieces:
        await response.write(piece)
        # A write waits for nobody while the connection takes the bytes at once.
        await asyncio.sleep(0)
    await response.write_eof()
    return response


async def streamed_response(
    request: web.Request,
    call: GenerationCall,
    reply: ReplyFace,
    handles: Sequence[Handle],
    limit: AbstractAsyncContextManager[None] = UNLIMITED,
    *,
    refusable: bool = False,
    first_byte_s: float = 0.0,
) -> web.StreamResponse:
    """Answer with server-sent events.

    A failure before the first byte is raised, so that its HTTP status can be sent. A later
    failure becomes an error event, after which the stream ends without ``[DONE]``.

    Args:
        limit: ends the outputs when their time is over; see `minserve.server.limits.time_limit`.
        refusable: true where the planner may still refuse an output that has not begun. To answer
            such a refusal with a status, nothing is sent before all outputs have begun. The
            outputs share one TTFT, so the request's last first token comes no later by this.
        first_byte_s: seconds without an event after which the status and a comment are sent, and
            a comment again as long as there is none; 0 sends none.

    Raises:
        MinserveError: if an output failed before anything was sent.
        ConnectionResetError: if the client has closed the connection.
    """
    events = EventStream(request, named=reply.names_events)
    num_held = len(handles) * call.params.n if refusable else 0
    in_pieces = reply.has_large_events
    async with events.kept_alive(first_byte_s):
        try:
            async with limit, aclosing(_chunks(reply, handles, num_held)) as batches:
                async for chunks in batches:
                    await events.send(*chunks, in_pieces=in_pieces)
            await events.send(*reply.last_chunks(), in_pieces=in_pieces)
            await events.done()
        except ConnectionError:
            raise
        except Exception as error:
            if not events.started:
                raise
            told = to_http_error(error)
            note_error(request, told)
            await events.fail(reply.failure(told))
    return events.response


async def _chunks(
    reply: ReplyFace, handles: Sequence[Handle], num_held: int
) -> AsyncGenerator[list[StreamEvent], None]:
    """Yield the chunks of a stream, all that there are at a time: they go out in one write.

    The first ones come when so many outputs have begun.
    """
    pauses = Pauses()
    begun: set[tuple[int, int]] = set()
    held: list[StreamEvent] = []
    async with aclosing(merged(handles)) as stream:
        async for prompt, deltas in stream:
            failure = None
            for delta in deltas:
                await reply.note(prompt, delta, pauses)
                if not reply.is_done(prompt, delta) and (failure := _failure(delta)) is not None:
                    break
                if len(begun) < num_held:
                    begun.add((prompt, delta.index))
                held += reply.chunks(prompt, delta)
            if held and len(begun) >= num_held:
                yield held
                held = []
            if failure is not None:
                raise failure


async def merged(
    handles: Sequence[Handle],
) -> AsyncGenerator[tuple[int, list[OutputDelta]], None]:
    """Yield the deltas of several handles as they come, each with the position of its handle.

    What is there already comes together, in order, at most `MOST_DELTAS` at a time: where this
    process is behind, many tokens then cost hardly more than one.
    """
    if len(handles) == 1:
        (handle,) = handles
        async for delta in handle:
            yield 0, [delta, *handle.waiting(MOST_DELTAS - 1)]
        return
    arrived: asyncio.Queue[tuple[int, list[OutputDelta]] | Exception | None] = asyncio.Queue()
    pumps = [asyncio.create_task(_pump(i, one, arrived)) for i, one in enumerate(handles)]
    try:
        running = len(pumps)
        while running:
            item = await arrived.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for pump in pumps:
            pump.cancel()


async def _pump(
    position: int,
    handle: Handle,
    arrived: asyncio.Queue[tuple[int, list[OutputDelta]] | Exception | None],
) -> None:
    try:
        async for delta in handle:
            arrived.put_nowait((position, [delta, *handle.waiting(MOST_DELTAS - 1)]))
    except Exception as error:
        arrived.put_nowait(error)
    else:
        arrived.put_nowait(None)


def _failure(delta: OutputDelta) -> Exception | None:
    """Return the error of a failed or aborted output; ``None`` for any other.

    A client that is still connected asked for no abort, so an abort is a failure to it too.
    """
    if delta.finish_reason is FinishReason.ERROR:
        return delta.error or GenerationError("generation failed")
    if delta.finish_reason is FinishReason.ABORT:
        return delta.error or EngineStoppedError("the server is shutting down")
    return None
